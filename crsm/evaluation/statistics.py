"""Figures and their uncertainty: accuracy, paired tests, intervals, calibration, ranking. NumPy only.

Every function takes one-dimensional arrays (or sequences) of equal length and raises ``ValueError``, naming the
argument, for an empty or differently long one, for NaN, and for values outside their range. Outcomes (``correct``,
``outcomes``) are booleans or the numbers 0 and 1. Letters of the shape suffixes: ``M`` samples, ``Q`` pairs.
"""

from __future__ import annotations

from math import comb
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 1 << 22
"""Resampled values held at once by the bootstrap."""


def accuracy(correct: ArrayLike) -> float:
    """Share of the answers that are correct."""
    return float(_outcomes("correct", correct).mean())


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Exact two-sided p-value that two systems, tried on the same problems, are equally often right.

    Only the problems on which they differ count: under the null hypothesis each is a fair coin. 1.0 without any.
    """
    a_M, b_M = _same_length(
        ("correct_a", _outcomes("correct_a", correct_a)), ("correct_b", _outcomes("correct_b", correct_b))
    )
    only_a, only_b = int(np.sum(a_M & ~b_M)), int(np.sum(b_M & ~a_M))
    flips, fewer = only_a + only_b, min(only_a, only_b)
    # Σ_{i ≤ fewer} C(flips, i) in integers: exact, and no underflow before the one division.
    term = tail = 1
    for i in range(fewer):
        term = term * (flips - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**flips)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share; unlike the normal one it holds near 0 and 1 and for few trials."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes = {successes} of trials = {trials}; allowed: 0 ≤ successes ≤ trials, trials ≥ 1")
    z = NormalDist().inv_cdf(0.5 + _confidence(confidence) / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * float(np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)))
    # At the ends the interval touches 0 or 1 exactly; rounding must not lift it off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``."""
    values_M = _numbers("values", values)
    tail = (1 - _confidence(confidence)) / 2
    if samples < 1:
        raise ValueError(f"samples = {samples}; allowed: at least 1")
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    rows = max(1, _CHUNK // len(values_M))
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        means[start : start + count] = values_M[rng.integers(0, len(values_M), (count, len(values_M)))].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_difference(
    values_a: ArrayLike, values_b: ArrayLike, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``mean(a) − mean(b)`` for values paired by problem: problems are resampled."""
    a_M, b_M = _same_length(("values_a", _numbers("values_a", values_a)), ("values_b", _numbers("values_b", values_b)))
    return bootstrap_interval(a_M - b_M, confidence, samples, seed)


def bootstrap_ratio(
    tops: ArrayLike, bottoms: ArrayLike, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``Σ tops / Σ bottoms``, a sample's two values drawn together: bits per byte, or
    with the differences of two systems in ``tops`` the difference of theirs."""
    tops_M, bottoms_M = _same_length(("tops", _numbers("tops", tops)), ("bottoms", _numbers("bottoms", bottoms)))
    if bottoms_M.min() <= 0:
        raise ValueError(f"bottoms holds {bottoms_M.min():g}; allowed: above 0")
    if samples < 1:
        raise ValueError(f"samples = {samples}; allowed: at least 1")
    tail = (1 - _confidence(confidence)) / 2
    rng = np.random.default_rng(seed)
    ratios = np.empty(samples)
    rows = max(1, _CHUNK // len(tops_M))
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        drawn = rng.integers(0, len(tops_M), (count, len(tops_M)))
        ratios[start : start + count] = tops_M[drawn].sum(axis=1) / bottoms_M[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of ``k`` answers at least is right, where ``correct`` of ``samples`` were: the unbiased
    estimate ``1 − C(n − c, k) / C(n, k)`` of arXiv 2107.03374."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"k = {k}, correct = {correct} of samples = {samples}; allowed: 1 ≤ k ≤ samples, 0 ≤ correct ≤ samples"
        )
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> float:
    """Mean distance between stated probability and frequency over equally wide bins, weighted by their samples.

    Bins are ``[0, 1/bins), …, [1 − 1/bins, 1]``; empty ones do not count.
    """
    probabilities_M, outcomes_M = _same_length(
        ("probabilities", _numbers("probabilities", probabilities)), ("outcomes", _outcomes("outcomes", outcomes))
    )
    if probabilities_M.min() < 0 or probabilities_M.max() > 1:
        raise ValueError(
            f"probabilities between {probabilities_M.min():g} and {probabilities_M.max():g}; allowed: 0 to 1"
        )
    if bins < 1:
        raise ValueError(f"bins = {bins}; allowed: at least 1")
    bin_M = np.minimum((probabilities_M * bins).astype(int), bins - 1)
    stated = np.bincount(bin_M, weights=probabilities_M, minlength=bins)
    happened = np.bincount(bin_M, weights=outcomes_M, minlength=bins)
    return float(np.abs(stated - happened).sum() / len(probabilities_M))


def roc_auc(scores: ArrayLike, outcomes: ArrayLike) -> float:
    """Probability that a good sample scores higher than a bad one, ties half: the area under the ROC curve.

    NaN, not an error, where all outcomes are the same: there is no pair to rank.
    """
    scores_M, outcomes_M = _same_length(
        ("scores", _numbers("scores", scores)), ("outcomes", _outcomes("outcomes", outcomes))
    )
    good = int(outcomes_M.sum())
    bad = len(outcomes_M) - good
    if not good or not bad:
        return float("nan")
    rank_sum = float(_ranks(scores_M)[outcomes_M].sum())
    return (rank_sum - good * (good + 1) / 2) / (good * bad)


def pairwise_accuracy(values_good: ArrayLike, values_bad: ArrayLike) -> float:
    """Share of pairs ``(values_good[q], values_bad[q])`` in which the good one is valued higher, ties half."""
    good_Q, bad_Q = _same_length(
        ("values_good", _numbers("values_good", values_good)), ("values_bad", _numbers("values_bad", values_bad))
    )
    return float(np.mean((good_Q > bad_Q) + 0.5 * (good_Q == bad_Q)))


def pairwise_branch_accuracy(values: ArrayLike, outcomes: ArrayLike, problems: ArrayLike) -> float:
    """Share of all (good, bad) pairs *of the same problem* in which the good branch is valued higher, ties half.

    ``problems`` holds a problem's id (number or text) for each branch. NaN where no problem has both kinds.
    """
    ids_M = np.asarray(problems)
    if ids_M.ndim != 1:
        raise ValueError(f"problems has shape {ids_M.shape}; allowed: one dimension")
    values_M, outcomes_M, ids_M = _same_length(
        ("values", _numbers("values", values)), ("outcomes", _outcomes("outcomes", outcomes)), ("problems", ids_M)
    )
    _, problem_M = np.unique(ids_M, return_inverse=True)
    order = np.argsort(problem_M, kind="stable")
    won = pairs = 0.0
    for group in np.split(order, np.flatnonzero(np.diff(problem_M[order])) + 1):
        good, bad = values_M[group[outcomes_M[group]]], values_M[group[~outcomes_M[group]]]
        won += float(np.sum(good[:, None] > bad)) + 0.5 * float(np.sum(good[:, None] == bad))
        pairs += len(good) * len(bad)
    return won / pairs if pairs else float("nan")


def _ranks(values_M: np.ndarray) -> np.ndarray:
    """Ranks from 1 on; tied values share the mean of their ranks."""
    _, index_M, counts = np.unique(values_M, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: np.ndarray = last - (counts - 1) / 2
    return mean_rank[index_M]


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; allowed: one dimension, at least one value")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.dtype}; allowed: numbers")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity at index {int(np.flatnonzero(~np.isfinite(array))[0])}")
    return array


def _outcomes(name: str, values: ArrayLike) -> np.ndarray:
    array = _numbers(name, values)
    wrong = np.flatnonzero((array != 0) & (array != 1))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] = {array[wrong[0]]:g}; allowed: 0 and 1")
    return array == 1


def _same_length(*named: tuple[str, np.ndarray]) -> list[np.ndarray]:
    if len({len(array) for _, array in named}) > 1:
        lengths = ", ".join(f"{name}: {len(array)}" for name, array in named)
        raise ValueError(f"lengths differ ({lengths}); allowed: one value each per sample")
    return [array for _, array in named]


def _confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}; allowed: between 0 and 1, exclusive")
    return confidence
