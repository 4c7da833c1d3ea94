"""The targeted delta buffer: which plan is due, and what becomes of every other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from crsm.delta_buffer import DeltaBuffer, check_plan, matches
from crsm.model import Checkpoint
from crsm.types import Plan, Reason
from tests.fixtures import a_request, make_plan, tiny_checkpoint, tiny_config

TOKENS = [50, 51, 52, 53, 54, 55]
"""Said so far; the first of them at position 10."""
FIRST = 10


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return tiny_checkpoint()


def plan_for(
    checkpoint: Checkpoint, position: int, lag: int, request_id: int = 0, confidence: float = 1.0, **changes: Any
) -> Plan:
    """A plan that foresaw ``TOKENS``."""
    start = position + 1 - FIRST
    request = a_request(request_id=request_id, position=position, lag=lag)
    said = tuple(TOKENS[start:])
    fields: dict[str, Any] = {"assumed": said[:lag], "line": said[lag : lag + 3], **changes}
    return make_plan(request, checkpoint, confidence=confidence, **fields)


def take(buffer: DeltaBuffer, position: int, max_lag: int = 3) -> tuple[Plan | None, int, list[tuple[int, Reason]]]:
    due = buffer.take("g", position, TOKENS[: position + 1 - FIRST], FIRST, max_lag)
    return due.plan, due.late, [(plan.request_id, reason) for plan, reason in due.outcomes]


def filled(*plans: Plan) -> DeltaBuffer:
    buffer = DeltaBuffer()
    for plan in plans:
        buffer.put(plan)
    assert len(buffer) == len(plans)
    return buffer


def test_a_plan_waits_for_its_position_and_is_taken_once(checkpoint: Checkpoint) -> None:
    plan = plan_for(checkpoint, 10, 2)
    buffer = filled(plan)
    assert take(buffer, 10) == take(buffer, 11) == (None, 0, [])
    assert take(buffer, 12) == (plan, 0, [(0, Reason.ON_TIME)])
    assert take(buffer, 12) == take(buffer, 13) == (None, 0, []) and len(buffer) == 0


@pytest.mark.parametrize(("position", "late", "reason"), [(12, 1, Reason.LATE), (13, 2, Reason.LATE)])
def test_a_late_plan_whose_line_came_true_so_far_is_used(
    checkpoint: Checkpoint, position: int, late: int, reason: Reason
) -> None:
    plan = plan_for(checkpoint, 10, 1)
    assert take(filled(plan), position) == (plan, late, [(0, reason)])


def test_a_plan_is_stale_after_max_lag_tokens(checkpoint: Checkpoint) -> None:
    assert take(filled(plan_for(checkpoint, 10, 0)), 12, max_lag=1) == (None, 0, [(0, Reason.STALE)])
    assert take(filled(plan_for(checkpoint, 10, 0)), 12, max_lag=2)[2] == [(0, Reason.LATE)]


@pytest.mark.parametrize(
    ("changes", "position"),
    [
        ({"assumed": (51, 0)}, 12),  # an assumption that did not come true
        ({"line": (0, 54)}, 13),  # late, and the text went another way since its target
        ({"line": (53,)}, 13),  # late, and its whole line is said: there is nothing left to shape
        ({"line": ()}, 13),
    ],
)
def test_a_plan_that_the_text_left_is_a_mismatch(
    checkpoint: Checkpoint, changes: dict[str, Any], position: int
) -> None:
    assert take(filled(plan_for(checkpoint, 10, 2, **changes)), position) == (None, 0, [(0, Reason.MISMATCH)])


def test_of_several_futures_the_likeliest_that_matches_is_used_and_the_request_settled_once(
    checkpoint: Checkpoint,
) -> None:
    wrong = plan_for(checkpoint, 10, 1, assumed=(0,))
    right, also = plan_for(checkpoint, 10, 1, seed=1), plan_for(checkpoint, 10, 1, seed=2)
    chosen, _, outcomes = take(filled(wrong, right, also), 11)
    assert chosen is right and outcomes == [(0, Reason.ON_TIME)]
    assert take(filled(wrong, wrong), 11) == (None, 0, [(0, Reason.MISMATCH)])


def test_the_newest_target_wins_and_the_others_are_superseded_or_shut(checkpoint: Checkpoint) -> None:
    plans = [
        plan_for(checkpoint, 10, 0, request_id=0),
        plan_for(checkpoint, 11, 0, request_id=1),
        plan_for(checkpoint, 12, 0, request_id=2, confidence=0.0),
    ]
    chosen, late, outcomes = take(filled(*reversed(plans)), 12)
    assert chosen is plans[1] and late == 1
    assert sorted(outcomes) == [(0, Reason.SUPERSEDED), (1, Reason.LATE), (2, Reason.SHUT)]


def test_of_two_requests_for_one_target_the_later_one_wins(checkpoint: Checkpoint) -> None:
    older, newer = plan_for(checkpoint, 10, 2, request_id=0), plan_for(checkpoint, 11, 1, request_id=1)
    chosen, _, outcomes = take(filled(older, newer), 12)
    assert chosen is newer and sorted(outcomes) == [(0, Reason.SUPERSEDED), (1, Reason.ON_TIME)]


def test_one_open_layer_is_enough_to_be_used(checkpoint: Checkpoint) -> None:
    plan = plan_for(checkpoint, 10, 0, confidence_L=np.array([0.0, 0.1], np.float32))
    assert take(filled(plan), 10)[2] == [(0, Reason.ON_TIME)]
    assert take(filled(plan_for(checkpoint, 10, 0, confidence=0.0)), 10) == (None, 0, [(0, Reason.SHUT)])


def test_plans_of_other_generations_are_never_seen(checkpoint: Checkpoint) -> None:
    plan = plan_for(checkpoint, 10, 0, generation_id="other")
    buffer = filled(plan)
    assert take(buffer, 10) == (None, 0, [])
    assert buffer.end("other") == [plan] and len(buffer) == 0 and buffer.end("other") == []


def test_an_ended_generation_drops_its_plans_only(checkpoint: Checkpoint) -> None:
    mine = [plan_for(checkpoint, 10, lag, request_id=lag) for lag in (0, 1)]
    other = plan_for(checkpoint, 10, 0, generation_id="other")
    buffer = filled(*mine, other)
    assert buffer.end("g") == mine and len(buffer) == 1
    assert take(buffer, 11) == (None, 0, [])


def test_a_dropped_request_leaves_the_others_of_its_target(checkpoint: Checkpoint) -> None:
    one, other = plan_for(checkpoint, 10, 0, request_id=0), plan_for(checkpoint, 10, 0, request_id=1)
    buffer = filled(one, other, one)
    buffer.drop("g", 10, 0)
    buffer.drop("g", 99, 1)
    buffer.drop("unknown", 10, 1)
    assert len(buffer) == 1 and take(buffer, 10)[0] is other


def test_a_plan_matches_as_far_as_its_own_words_reach(checkpoint: Checkpoint) -> None:
    plan = plan_for(checkpoint, 10, 2)  # assumes 51 52 for 11 and 12, plans 53 54 55 for 13 to 15
    assert [matches(plan, TOKENS[: position + 1 - FIRST], FIRST, position) for position in range(12, 16)] == [
        True,
        True,
        True,
        False,
    ]


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nan in u": ({"write_u_LRE": np.full((2, 1, 32), np.nan, np.float32)}, "write_u_LRE holds NaN"),
    "infinity in b": ({"write_b_LRN": np.full((2, 1, 8), np.inf, np.float32)}, "write_b_LRN holds NaN or inf"),
    "nan value": ({"value_plan_L": f32(0.5, np.nan)}, "value_plan_L holds NaN"),
    "nan confidence": ({"confidence_L": f32(0.5, np.nan)}, "confidence_L holds NaN"),
    "confidence over 1": ({"confidence_L": f32(0.5, 1.1)}, r"confidence_L = .*allowed: \[0, 1\]"),
    "negative confidence": ({"confidence_L": f32(-0.1, 0.5)}, "confidence_L"),
    "layers": ({"value_root_L": f32(0.5)}, r"value_root_L is float32\[1\]; allowed: .*\(2,\)"),
    "rank": ({"write_u_LRE": np.zeros((2, 2, 32), np.float32)}, "write_u_LRE"),
    "width": ({"write_b_LRN": np.zeros((2, 1, 9), np.float32)}, "write_b_LRN"),
    "list": ({"write_b_LRN": [[0.0]]}, "write_b_LRN is list"),
    "integers": ({"write_b_LRN": np.zeros((2, 1, 8), np.int64)}, "write_b_LRN is int64"),
    "objects": ({"confidence_L": np.array([None, None])}, "confidence_L is object"),
    "no actions": ({"policy_tokens_A": None}, "policy_tokens_A is NoneType"),
    "one action": ({"policy_tokens_A": np.array(3)}, "policy_tokens_A is int64"),
    "float actions": ({"policy_tokens_A": f32(1, 2)}, "policy_tokens_A is float32"),
    "action outside": ({"policy_tokens_A": np.array([1, 31])}, "outside the vocabulary of 31"),
    "too few probabilities": ({"policy_probs_A": f32(1.0)}, "policy_probs_A"),
    "probabilities of 2": ({"policy_probs_A": f32(1.0, 1.0)}, "sum to 1"),
    "negative probability": ({"policy_probs_A": f32(-1.0, 2.0)}, "sum to 1"),
    "line outside": ({"line": (3, -1)}, "outside the vocabulary"),
    "assumed outside": ({"assumed": (31,)}, "outside the vocabulary"),
    "assumed too many": ({"assumed": (1, 2)}, "2 assumed tokens for a lag of 1"),
    "target before": ({"target": 3, "assumed": ()}, "for a lag of -3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_of_the_wrong_form_is_refused_in_words(checkpoint: Checkpoint, name: str) -> None:
    changes, message = REFUSED[name]
    plan = dataclasses.replace(make_plan(a_request(lag=1), checkpoint, assumed=(4,)), **changes)
    fault = check_plan(plan, checkpoint.config.model.backbone, 1)
    assert fault is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(fault)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_well_formed_plan_passes(rank: int) -> None:
    checkpoint = tiny_checkpoint(tiny_config(rank=rank))
    build: Callable[..., Plan] = make_plan
    plan = build(a_request(lag=2), checkpoint, assumed=(4, 30), line=())
    assert check_plan(plan, checkpoint.config.model.backbone, rank) is None
