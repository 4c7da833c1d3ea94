"""Each figure against a hand-computed value or an independent implementation (SciPy, scikit-learn)."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, rankdata
from sklearn.metrics import roc_auc_score

from crsm.evaluation import statistics

flags = st.lists(st.booleans(), min_size=1, max_size=60)
scores = st.lists(st.integers(-3, 3), min_size=2, max_size=60)


def test_accuracy_is_the_share_of_ones():
    assert statistics.accuracy([True, False, True, True]) == 0.75
    assert statistics.accuracy(np.array([0.0, 0.0, 1.0])) == pytest.approx(1 / 3)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_the_binomial_test_on_the_problems_that_differ(pairs):
    a, b = zip(*pairs, strict=True)
    only_a = sum(x and not y for x, y in pairs)
    only_b = sum(y and not x for x, y in pairs)
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert statistics.mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert statistics.mcnemar(a, b) == statistics.mcnemar(b, a)


def test_mcnemar_by_hand():
    # 5 problems only the second solves, none only the first: 2 · (1/2)^5.
    assert statistics.mcnemar([0] * 5 + [1] * 7, [1] * 12) == 2 / 32


def test_mcnemar_of_many_problems_neither_overflows_nor_stops_at_zero():
    p = statistics.mcnemar([0] * 1000, [1] * 1000)
    assert p == math.ldexp(1.0, -999)
    p = statistics.mcnemar([0] * 3000 + [1] * 2800, [1] * 3000 + [0] * 2800)
    assert p == pytest.approx(binomtest(2800, 5800).pvalue, rel=1e-6)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_interval_matches_scipy(counts, confidence):
    successes, trials = counts
    expected = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    low, high = statistics.wilson_interval(successes, trials, confidence)
    assert (low, high) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))
    assert 0 <= low <= successes / trials <= high <= 1


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = statistics.bootstrap_interval(rng.normal(1.0, 2.0, 60), 0.9, samples=400, seed=trial)
        hits += low <= 1.0 <= high
    assert 0.82 <= hits / 200 <= 0.96  # 0.9 ± 3 standard errors, and a little for the bootstrap's own bias


def test_bootstrap_interval_is_near_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(0, 1, 2000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    low, high = statistics.bootstrap_interval(values, samples=4000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_depends_on_the_seed_only(monkeypatch):
    values = np.random.default_rng(2).random(50)
    first = statistics.bootstrap_interval(values, seed=3)
    assert first == statistics.bootstrap_interval(values, seed=3)
    assert first != statistics.bootstrap_interval(values, seed=4)
    monkeypatch.setattr(statistics, "_CHUNK", 64)
    assert first == statistics.bootstrap_interval(values, seed=3), "memory limit changes the result"


def test_bootstrap_of_a_constant_is_that_constant():
    assert statistics.bootstrap_interval([2.5] * 4, samples=10) == (2.5, 2.5)


def test_paired_bootstrap_removes_what_the_pairs_share():
    rng = np.random.default_rng(5)
    difficulty = rng.normal(0, 100, 80)
    a, b = difficulty + 1.0, difficulty + rng.normal(0, 0.1, 80)
    low, high = statistics.bootstrap_difference(a, b)
    assert 0.9 < low < 1.0 < high < 1.1


def test_calibration_error_by_hand():
    # Bin [0, 0.5): says 0.2 and 0.4, happened 1 of 2. Bin [0.5, 1]: says 0.9 and 1.0, happened 1 of 2.
    error = statistics.expected_calibration_error([0.2, 0.4, 0.9, 1.0], [0, 1, 1, 0], bins=2)
    assert error == pytest.approx(0.5 * abs(0.3 - 0.5) + 0.5 * abs(0.95 - 0.5))


def test_calibration_error_of_a_calibrated_source_is_small_and_of_a_liar_large():
    rng = np.random.default_rng(6)
    probabilities = rng.random(20_000)
    outcomes = rng.random(20_000) < probabilities
    assert statistics.expected_calibration_error(probabilities, outcomes) < 0.02
    assert statistics.expected_calibration_error(1 - probabilities, outcomes) > 0.4


@given(scores, st.data())
def test_auc_matches_scikit_learn_with_ties(values, data):
    outcomes = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    result = statistics.roc_auc(values, outcomes)
    if len(set(outcomes)) < 2:
        assert math.isnan(result)
    else:
        assert result == pytest.approx(roc_auc_score(outcomes, values), abs=1e-12)


@given(scores)
def test_ranks_match_scipy(values):
    np.testing.assert_array_equal(statistics._ranks(np.array(values, dtype=float)), rankdata(values))


def test_pairwise_accuracy_counts_ties_half():
    assert statistics.pairwise_accuracy([3, 1, 2, 0], [2, 2, 2, 2]) == (1 + 0 + 0.5 + 0) / 4


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30))
def test_branch_accuracy_is_the_share_over_all_pairs_of_a_problem(branches):
    values, outcomes, problems = zip(*branches, strict=True)
    pairs = [
        (1.0 if good > bad else 0.5 if good == bad else 0.0)
        for good, good_outcome, p in branches
        for bad, bad_outcome, q in branches
        if good_outcome and not bad_outcome and p == q
    ]
    result = statistics.pairwise_branch_accuracy(values, outcomes, problems)
    if pairs:
        assert result == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(result)


def test_branches_of_different_problems_are_never_compared():
    values, outcomes = [0.9, 0.8, 0.2, 0.1], [1, 0, 1, 0]
    assert statistics.pairwise_branch_accuracy(values, outcomes, ["a", "a", "b", "b"]) == 1.0
    assert statistics.roc_auc(values, outcomes) == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.accuracy([]), "correct has shape"),
        (lambda: statistics.accuracy([[True]]), "correct has shape"),
        (lambda: statistics.accuracy([0, 2]), r"correct\[1\] = 2"),
        (lambda: statistics.accuracy(["yes"]), "correct holds <U3"),
        (lambda: statistics.mcnemar([1, 0], [1]), "correct_a: 2, correct_b: 1"),
        (lambda: statistics.roc_auc([0.5, float("nan")], [0, 1]), "scores holds NaN or infinity at index 1"),
        (lambda: statistics.roc_auc([0.5], [0, 1]), "scores: 1, outcomes: 2"),
        (lambda: statistics.bootstrap_interval([1.0], confidence=1.0), "confidence = 1.0"),
        (lambda: statistics.bootstrap_interval([1.0], samples=0), "samples = 0"),
        (lambda: statistics.bootstrap_difference([1.0], [1.0, 2.0]), "values_a: 1, values_b: 2"),
        (lambda: statistics.wilson_interval(3, 2), "successes = 3 of trials = 2"),
        (lambda: statistics.wilson_interval(0, 0), "trials = 0"),
        (lambda: statistics.expected_calibration_error([1.5], [1]), "allowed: 0 to 1"),
        (lambda: statistics.expected_calibration_error([0.5], [1], bins=0), "bins = 0"),
        (lambda: statistics.pairwise_accuracy([1.0], [float("inf")]), "values_bad holds NaN or infinity"),
        (lambda: statistics.pairwise_branch_accuracy([1.0], [1], [[0]]), "problems has shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ pass@k and ratios


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    answers = [True] * correct + [False] * (samples - correct)
    draws = list(itertools.combinations(answers, k))
    assert statistics.pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("arguments", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_refuses_what_cannot_be(arguments):
    with pytest.raises(ValueError, match="allowed: 1 ≤ k ≤ samples"):
        statistics.pass_at_k(*arguments)


def test_a_ratio_is_bootstrapped_by_drawing_both_values_together():
    rng = np.random.default_rng(1)
    bottoms = rng.integers(50, 2000, 400).astype(float)
    tops = 2.0 * bottoms + rng.normal(0, 30, 400)
    low, high = statistics.bootstrap_ratio(tops, bottoms, samples=2000)
    assert low < tops.sum() / bottoms.sum() < high
    assert high - low < 0.02  # the windows differ by a factor of 40 in size, hardly in their ratio
    assert (low, high) == statistics.bootstrap_ratio(tops, bottoms, samples=2000)
    assert (low, high) != statistics.bootstrap_ratio(tops, bottoms, samples=2000, seed=1)
    assert statistics.bootstrap_ratio(tops, np.ones(400), samples=500) == pytest.approx(
        statistics.bootstrap_interval(tops, samples=500)
    )


def test_a_ratio_needs_something_to_divide_by():
    with pytest.raises(ValueError, match="bottoms holds 0; allowed: above 0"):
        statistics.bootstrap_ratio([1.0, 2.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="lengths differ"):
        statistics.bootstrap_ratio([1.0], [1.0, 1.0])
