"""PUCT, the selection rule of AlphaZero and MuZero.

``score(a) = Q(a) + c(N) · P(a) · sqrt(N) / (1 + n(a))`` with ``c(N) = c_init + log((N + c_base + 1) / c_base)``:
MuZero, appendix B, https://arxiv.org/abs/1911.08265. N counts the node's own evaluation too (so that the first choice
at a new node follows the prior), as in mctx.

`B` denotes any batch of nodes, `A` their children.
"""

from __future__ import annotations

import math

import numpy as np

from crsm.search.numerics import FloatArray, IntArray

# The least range by which values are normalized; mctx's epsilon.
_MIN_RANGE = np.float32(1e-8)


def exploration_table(max_visits: int, *, c_init: float, c_base: float) -> FloatArray:
    """``c(N) · sqrt(N)`` for every visit count that a search can reach.

    The logarithm is no exact operation: a table, computed once in double precision and rounded, keeps it out of the
    arithmetic of a simulation.

    Args:
        max_visits: The largest N.
        c_init: Weight of exploration at few visits.
        c_base: Visits at which the logarithm starts to matter.

    Returns:
        Shape `[max_visits + 1]`.
    """
    factors = [math.sqrt(n) * (c_init + math.log((n + c_base + 1.0) / c_base)) for n in range(max_visits + 1)]
    return np.array(factors, np.float32)


def raw_value_scores(values_BA: FloatArray, visits_BA: IntArray, node_values_B: FloatArray) -> FloatArray:
    """Q as it is: values are probabilities, comparable over the whole tree.

    An unvisited child is taken to be worth what its parent is worth on average so far (first-play urgency): neither
    hopeless, which would tie the search to the first child it tries, nor a promise.

    Args:
        values_BA: Q, consensus values of the children. Shape `[B, A]`.
        visits_BA: Visits of the children. Shape `[B, A]`.
        node_values_B: Consensus of the node's mean value. Shape `[B]`.

    Returns:
        Shape `[B, A]`.
    """
    scores_BA: FloatArray = np.where(visits_BA > 0, values_BA, node_values_B[:, np.newaxis])
    return scores_BA


def minmax_value_scores(values_BA: FloatArray, visits_BA: IntArray, node_values_B: FloatArray) -> FloatArray:
    """Q normalized by the range of the node and its visited children: mctx's ``qtransform_by_parent_and_siblings``.

    Args:
        values_BA: Q, consensus values of the children. Shape `[B, A]`.
        visits_BA: Visits of the children. Shape `[B, A]`.
        node_values_B: Consensus of the node's mean value. Shape `[B]`.

    Returns:
        ``(Q − min) / (max − min)`` in [0, 1]; 0 for an unvisited child. Shape `[B, A]`.
    """
    visited_BA = visits_BA > 0
    node_values_B1 = node_values_B[:, np.newaxis]
    # The node's own value stands in for the unvisited, and so always takes part in both extremes.
    known_BA = np.where(visited_BA, values_BA, node_values_B1)
    min_B1 = np.minimum(node_values_B1, known_BA.min(axis=1, keepdims=True))
    max_B1 = np.maximum(node_values_B1, known_BA.max(axis=1, keepdims=True))
    completed_BA = np.where(visited_BA, values_BA, min_B1)
    scores_BA: FloatArray = (completed_BA - min_B1) / np.maximum(max_B1 - min_B1, _MIN_RANGE)
    return scores_BA


def puct_scores(
    value_scores_BA: FloatArray, prior_probs_BA: FloatArray, visits_BA: IntArray, exploration_B: FloatArray
) -> FloatArray:
    """``score = value + (c(N)·sqrt(N) · P) / (n + 1)``.

    Args:
        value_scores_BA: Values, by one of the two transforms above. Shape `[B, A]`.
        prior_probs_BA: P. Shape `[B, A]`.
        visits_BA: n. Shape `[B, A]`.
        exploration_B: ``c(N)·sqrt(N)``, from ``exploration_table``. Shape `[B]`.

    Returns:
        Scores; the highest is taken, the first among equals. Shape `[B, A]`.
    """
    counts_BA = (visits_BA + np.int32(1)).astype(np.float32)
    scores_BA: FloatArray = value_scores_BA + exploration_B[:, np.newaxis] * prior_probs_BA / counts_BA
    return scores_BA
