"""The cheapest setting for a target accuracy, from a fit over all points.

The fit is a logistic regression of the counts on the swept settings: main effects, squares of numbers, and pairwise
interactions, with a ridge that keeps it finite where every answer is right. A setting with few values enters as
categories, one with many, or one drawn from a range, as a number. With two settings of few values the fit reproduces
the cells up to the ridge; with more it pools what cells have in common, so that one lucky cell is not taken for the
best one.

A setting *reaches* a target where the lower end of the fit's 95 % interval does. Cost is multiply-adds per answer after
the prompt: it knows nothing of waiting, so that of two lags the shorter one is cheaper, though harder to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.ablation.table import Pooled

MAX_CATEGORIES = 16
RIDGE = 0.1
"""Inverse variance of an effect's prior, in squared log-odds."""
SAME_COST = 1.01
"""Settings within this factor cost the same; the most accurate of them is named."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted accuracy of every point, with its 95 % interval."""

    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray


def fit(points: Sequence[Pooled]) -> Fit:
    """Fits all points; NumPy only (Newton's method on the penalised likelihood, which is concave)."""
    x = design(points)
    right = np.array([point.tally.correct.count("1") for point in points], float)
    count = np.array([point.tally.problems for point in points], float)
    ridge = np.full(x.shape[1], RIDGE)
    ridge[0] = 1e-3
    weights = np.zeros(x.shape[1])

    def loss(weights: np.ndarray) -> float:
        eta = x @ weights
        return float(np.sum(count * np.logaddexp(0, eta) - right * eta) + 0.5 * np.sum(ridge * weights**2))

    hessian = np.eye(x.shape[1])
    for _ in range(100):
        p = _sigmoid(x @ weights)
        gradient = x.T @ (count * p - right) + ridge * weights
        hessian = (x.T * (count * p * (1 - p))) @ x + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        scale, here = 1.0, loss(weights)
        while scale > 1e-6 and loss(weights - scale * step) > here:
            scale /= 2
        weights = weights - scale * step
        if np.abs(scale * step).max() < 1e-8:
            break
    eta = x @ weights
    spread = 1.96 * np.sqrt(np.einsum("ij,ji->i", x, np.linalg.solve(hessian, x.T)))
    return Fit(_sigmoid(eta), _sigmoid(eta - spread), _sigmoid(eta + spread))


def design(points: Sequence[Pooled]) -> np.ndarray:
    """The regressors: a row per point; the first column is 1."""
    blocks = []
    for key in points[0].point:
        values = [point.point[key] for point in points]
        distinct = list(dict.fromkeys(values))
        if len(distinct) < 2:
            continue
        if _is_category(distinct, len(points), len(points[0].point)):
            blocks.append(np.array([[float(value == other) for other in distinct] for value in values]))
        else:
            number = np.array(values, float)
            number = (number - number.mean()) / number.std()
            blocks.append(np.stack([number, number**2], axis=1))
    columns = [np.ones((len(points), 1)), *blocks]
    for a, b in itertools.combinations(blocks, 2):
        columns.append((a[:, :, None] * b[:, None, :]).reshape(len(points), -1))
    return np.concatenate(columns, axis=1)


def _is_category(distinct: Sequence[Any], points: int, settings: int) -> bool:
    """Words are; numbers are where they are few, and the points tell their effect from that of the other settings."""
    if not all(_is_number(value) for value in distinct):
        return True
    return len(distinct) <= MAX_CATEGORIES and (settings == 1 or len(distinct) <= 5 or points >= 2 * len(distinct))


def cheapest(points: Sequence[Pooled], targets: Sequence[float]) -> dict[str, Any]:
    """The cheapest setting for every target; where the lag was swept, also the longest lag that reaches it.

    Returns:
        ``targets``: per target ``setting`` (None where no point reaches it) with ``multiply_adds``, measured and fitted
        accuracy, ``longest_lag`` in the same form, and ``best``, the highest fitted accuracy; ``largest_residual``: how
        far the fit is from what was measured, at most.
    """
    found = fit(points)
    cost = np.array([point.multiply_adds for point in points])
    measured = np.array([point.accuracy for point in points])

    def describe(index: int) -> dict[str, Any]:
        point = points[index]
        return {
            "setting": point.point,
            "multiply_adds": point.multiply_adds,
            "over_system1": point.tally.multiply_adds / point.tally.system1_multiply_adds,
            "measured": point.accuracy,
            "measured_interval": list(point.interval),
            "fitted": float(found.accuracy[index]),
            "fitted_interval": [float(found.low[index]), float(found.high[index])],
        }

    answers = []
    for target in targets:
        reached = [int(i) for i in np.flatnonzero(found.low >= target)]
        answer: dict[str, Any] = {"target": target, "reached_by": len(reached), "cheapest": None, "longest_lag": None}
        if reached:
            affordable = [i for i in reached if cost[i] <= SAME_COST * cost[reached].min()]
            answer["cheapest"] = describe(max(affordable, key=lambda i: found.accuracy[i]))
            if "lag" in points[0].point:
                longest = max(points[i].point["lag"] for i in reached)
                lasting = [i for i in reached if points[i].point["lag"] == longest]
                answer["longest_lag"] = describe(min(lasting, key=lambda i: (cost[i], -found.accuracy[i])))
        answers.append(answer)
    return {
        "targets": answers,
        "best": describe(int(found.accuracy.argmax())),
        "largest_residual": float(np.abs(found.accuracy - measured).max()),
    }


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
