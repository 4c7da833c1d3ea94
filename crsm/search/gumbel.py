"""Gumbel MuZero: Sequential Halving at the root, a deterministic rule below it.

"Policy improvement by planning with Gumbel", https://openreview.net/forum?id=bERaNdoegnO. The operations and their
defaults are those of mctx's ``gumbel_muzero_policy``.

`B` denotes any batch of nodes, `A` their children.
"""

from __future__ import annotations

import numpy as np

from crsm.search.numerics import BoolArray, FloatArray, IntArray, TokenArray, softmax, sum_actions

# The least range by which values are rescaled; mctx's epsilon.
_MIN_RANGE = np.float32(1e-8)
# Stands in for a zero prior, which would make the weighted value of a visited child 0 / 0.
_TINY = np.finfo(np.float32).tiny
# Finite, so that a hopeless action is still visited when it alone is considered.
_LOW_SCORE = np.float32(-1e9)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MINUS_INFINITY = np.float32(-np.inf)


def sample_gumbel(seed_B: TokenArray, num_actions: int, scale: float) -> FloatArray:
    """Root noise. A tree's depends on its own seed only, so that it is the same in whatever batch it is searched.

    Args:
        seed_B: Seeds, not negative. Shape `[B]`.
        num_actions: A.
        scale: Factor of the noise; 0: none.

    Returns:
        Shape `[B, A]`.
    """
    noise_BA = np.zeros((len(seed_B), num_actions), np.float32)
    if scale > 0.0:
        for tree, seed in enumerate(seed_B):
            noise_BA[tree] = scale * np.random.default_rng(int(seed)).gumbel(size=num_actions)
    return noise_BA


def mixed_value(
    values_BA: FloatArray,
    visits_BA: IntArray,
    prior_probs_BA: FloatArray,
    raw_values_B: FloatArray,
) -> FloatArray:
    """An estimate of the node's value from its own evaluation and its visited children: appendix D of the paper.

    ``v = (raw + N · Σ_visited (P·Q / Σ_visited P)) / (N + 1)`` with N the visits of the children.

    Args:
        values_BA: Q, consensus values of the children. Shape `[B, A]`.
        visits_BA: Visits of the children. Shape `[B, A]`.
        prior_probs_BA: P. Shape `[B, A]`.
        raw_values_B: Consensus of what the evaluator said of the node. Shape `[B]`.

    Returns:
        Shape `[B]`.
    """
    visited_BA = visits_BA > 0
    probs_BA = np.maximum(_TINY, prior_probs_BA)
    total_probs_B = sum_actions(np.where(visited_BA, probs_BA, _ZERO))
    divisor_B1 = np.where(total_probs_B > 0, total_probs_B, _ONE)[:, np.newaxis]
    weighted_B = sum_actions(np.where(visited_BA, probs_BA * values_BA / divisor_B1, _ZERO))
    count_B = visits_BA.sum(axis=1, dtype=np.int32).astype(np.float32)
    value_B: FloatArray = (raw_values_B + count_B * weighted_B) / (count_B + _ONE)
    return value_B


def completed_values(
    values_BA: FloatArray,
    visits_BA: IntArray,
    prior_probs_BA: FloatArray,
    raw_values_B: FloatArray,
    *,
    value_scale: float,
    maxvisit_init: float,
) -> FloatArray:
    """Values on the scale of logits, completed by the mixed value: mctx's ``qtransform_completed_by_mix_value``.

    ``((maxvisit_init + max_b n(b)) · value_scale) · (Q − min Q) / (max Q − min Q)``: the more visits, the more they
    count against the prior.

    Args:
        values_BA: Q, consensus values of the children. Shape `[B, A]`.
        visits_BA: Visits of the children. Shape `[B, A]`.
        prior_probs_BA: P. Shape `[B, A]`.
        raw_values_B: Consensus of what the evaluator said of the node. Shape `[B]`.
        value_scale: Scale of the values.
        maxvisit_init: Offset to the highest visit count.

    Returns:
        Shape `[B, A]`.
    """
    value_B = mixed_value(values_BA, visits_BA, prior_probs_BA, raw_values_B)
    completed_BA = np.where(visits_BA > 0, values_BA, value_B[:, np.newaxis])
    min_B1 = completed_BA.min(axis=1, keepdims=True)
    range_B1 = np.maximum(completed_BA.max(axis=1, keepdims=True) - min_B1, _MIN_RANGE)
    rescaled_BA = (completed_BA - min_B1) / range_B1
    visit_scale_B1 = np.float32(maxvisit_init) + visits_BA.max(axis=1, keepdims=True).astype(np.float32)
    result_BA: FloatArray = visit_scale_B1 * np.float32(value_scale) * rescaled_BA
    return result_BA


def root_scores(
    completed_values_BA: FloatArray,
    prior_logits_BA: FloatArray,
    gumbel_BA: FloatArray,
    visits_BA: IntArray,
    considered_visit_B: IntArray,
    considered_BA: BoolArray,
) -> FloatArray:
    """``gumbel + logit + value`` for the actions whose turn it is, -inf for all others.

    Args:
        completed_values_BA: From ``completed_values``. Shape `[B, A]`.
        prior_logits_BA: Prior logits. Shape `[B, A]`.
        gumbel_BA: Root noise. Shape `[B, A]`.
        visits_BA: Visits of the children. Shape `[B, A]`.
        considered_visit_B: The visit count whose turn it is, from Sequential Halving. Shape `[B]`.
        considered_BA: Root actions that were not cut. Shape `[B, A]`.

    Returns:
        Scores; the highest is taken, the first among equals. Shape `[B, A]`.
    """
    logits_BA = np.where(considered_BA, prior_logits_BA, _MINUS_INFINITY)
    logits_BA = logits_BA - logits_BA.max(axis=1, keepdims=True)
    scores_BA = np.maximum(_LOW_SCORE, gumbel_BA + logits_BA + completed_values_BA)
    turn_BA = considered_BA & (visits_BA == considered_visit_B[:, np.newaxis])
    result_BA: FloatArray = np.where(turn_BA, scores_BA, _MINUS_INFINITY)
    return result_BA


def interior_scores(completed_values_BA: FloatArray, prior_logits_BA: FloatArray, visits_BA: IntArray) -> FloatArray:
    """``softmax(logit + value) − n / (1 + N)``: visits come to follow the improved policy (section 5 of the paper).

    Args:
        completed_values_BA: From ``completed_values``. Shape `[B, A]`.
        prior_logits_BA: Prior logits. Shape `[B, A]`.
        visits_BA: Visits of the children, N their sum. Shape `[B, A]`.

    Returns:
        Scores; the highest is taken, the first among equals. Shape `[B, A]`.
    """
    probs_BA = softmax(prior_logits_BA + completed_values_BA)
    total_B1 = visits_BA.sum(axis=1, dtype=np.int32, keepdims=True) + np.int32(1)
    result_BA: FloatArray = probs_BA - visits_BA.astype(np.float32) / total_B1.astype(np.float32)
    return result_BA


def action_weights(
    completed_values_BA: FloatArray, prior_logits_BA: FloatArray, considered_BA: BoolArray
) -> FloatArray:
    """``softmax(logit + value)`` over the actions that were not cut: the improved policy, equation 11 of the paper.

    Args:
        completed_values_BA: From ``completed_values``. Shape `[B, A]`.
        prior_logits_BA: Prior logits. Shape `[B, A]`.
        considered_BA: Root actions that were not cut. Shape `[B, A]`.

    Returns:
        Probabilities. Shape `[B, A]`.
    """
    return softmax(np.where(considered_BA, prior_logits_BA + completed_values_BA, _MINUS_INFINITY))
