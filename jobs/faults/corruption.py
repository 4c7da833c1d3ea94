"""How a plan is made bad. Pure: a plan and a draw give another plan; the original is not touched.

Every plan that passes through here carries what was done to it in its ``planner_id``, the one field that the engine
passes on without looking at it: who finds an injected plan can tell whether it was a good one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crsm.types import Plan
from jobs.faults.schedule import BadPlan

GOOD = "good"
_MARK = ":"
_NOT_FINITE = {BadPlan.NAN: (np.nan, 0x7FC0), BadPlan.INFINITY: (np.inf, 0x7F80)}
"""As a number, and as the bits of a bfloat16, which numpy does not know and which travels as uint16."""
UNKNOWN_REQUESTS = 2**48
"""No engine counts this far."""


def mark(plan: Plan, fate: BadPlan | None) -> Plan:
    """The plan with a note of what was done to it."""
    return replace(plan, planner_id=f"{plan.planner_id}{_MARK}{fate.value if fate else GOOD}")


def marked(planner_id: str) -> BadPlan | None:
    """What was done to a plan; None: nothing.

    Raises:
        ValueError: it carries no note.
    """
    _, sign, note = planner_id.rpartition(_MARK)
    if not sign:
        raise ValueError(f"planner_id = {planner_id!r}; allowed: one with a note of what was done to the plan")
    return None if note == GOOD else BadPlan(note)


def corrupt(plan: Plan, fate: BadPlan, vocabulary: int, others: Sequence[str], draw: random.Random) -> Plan:
    """The plan as it is after its fate; the same one where its fate is not in what it holds.

    Args:
        plan: as the deliberation made it.
        fate: what to do to it.
        vocabulary: tokens that the model knows.
        others: generations that are running as well.
        draw: where and by how much.
    """
    match fate:
        case BadPlan.NAN | BadPlan.INFINITY:
            name = draw.choice(("write_u_LRE", "write_b_LRN", "confidence_L", "value_plan_L", "policy_probs_A"))
            return _with(plan, name, _spoiled(getattr(plan, name), fate, draw))
        case BadPlan.SHAPE:
            name = draw.choice(("write_u_LRE", "write_b_LRN", "confidence_L", "value_root_L"))
            array = getattr(plan, name)
            longer = np.concatenate([array, array[:1]])
            return _with(plan, name, draw.choice((array[:-1], longer, array[None])).copy())
        case BadPlan.VOCABULARY:
            outside = draw.choice((vocabulary, vocabulary + 10**6, -1))
            if draw.random() < 0.5:
                return replace(plan, line=(*plan.line[:-1], outside))
            tokens = plan.policy_tokens_A.copy()
            tokens[draw.randrange(len(tokens))] = outside
            return replace(plan, policy_tokens_A=tokens)
        case BadPlan.CONFIDENCE:
            gates = plan.confidence_L.copy()
            gates[draw.randrange(len(gates))] = draw.choice((-0.5, 1.5, 100.0))
            return replace(plan, confidence_L=gates)
        case BadPlan.VERSION:
            # By two: while planners have the next version's weights, one less would be the right one.
            return replace(plan, model_version=plan.model_version + draw.choice((-2, 2)))
        case BadPlan.GENERATION:
            elsewhere = [name for name in others if name != plan.generation_id] or [plan.generation_id + "-never"]
            return replace(plan, generation_id=draw.choice(elsewhere))
        case BadPlan.POSITION:  # as if made a token later: what it holds fits together
            return replace(plan, position=plan.position + 1, target=plan.target + 1)
        case BadPlan.TARGET:
            return replace(plan, target=plan.target + 1, assumed=(*plan.assumed, *plan.line[:1]))
        case BadPlan.UNKNOWN:
            return replace(plan, request_id=plan.request_id + UNKNOWN_REQUESTS)
        case _:
            return plan


def _with(plan: Plan, name: str, array: np.ndarray) -> Plan:
    changes: dict[str, Any] = {name: array}
    return replace(plan, **changes)


def _spoiled(array: np.ndarray, fate: BadPlan, draw: random.Random) -> np.ndarray:
    number, bits = _NOT_FINITE[fate]
    spoiled = array.copy()
    spoiled.flat[draw.randrange(spoiled.size)] = bits if spoiled.dtype == np.uint16 else number
    return spoiled
