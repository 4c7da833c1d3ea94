"""Which root actions a search considers at all."""

from __future__ import annotations

import numpy as np

from crsm.search.numerics import BoolArray, FloatArray, exp


def root_actions_by_prior_mass(prior_logits_BA: FloatArray, mass: float) -> BoolArray:
    """The smallest set of root actions whose probability reaches ``mass``, the most likely first.

    The position that a plan is made for is often forced: all but one continuation are noise, and a budget spent on
    ranking them is lost. The mass is that of the policy over the full vocabulary; if all A together do not reach it,
    all are kept. ``mass = 1`` keeps all: in float32 a single action can reach 1 by rounding.

    Args:
        prior_logits_BA: Log-probabilities under the full-vocabulary policy. Shape `[B, A]`.
        mass: In (0, 1].

    Returns:
        True for the actions to keep, at least one per tree. Shape `[B, A]`.
    """
    keep_BA = np.ones(prior_logits_BA.shape, np.bool_)
    if mass >= 1.0:
        return keep_BA
    order_BA = np.argsort(-prior_logits_BA, axis=1, kind="stable")
    probs_BA = exp(np.minimum(np.take_along_axis(prior_logits_BA, order_BA, axis=1), np.float32(0.0)))
    gathered_B = np.zeros(len(prior_logits_BA), np.float32)
    for rank in range(prior_logits_BA.shape[1]):
        action_B1 = order_BA[:, rank : rank + 1]
        np.put_along_axis(keep_BA, action_B1, (gathered_B < np.float32(mass))[:, np.newaxis], axis=1)
        gathered_B = gathered_B + probs_BA[:, rank]
    return keep_BA
