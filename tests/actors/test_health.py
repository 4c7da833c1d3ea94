"""When a planner is asked, cancelled and replaced."""

from __future__ import annotations

from actors.health import HealthPolicy, Verdict, Vitals, examine, stalls_at

POLICY = HealthPolicy(interval=1.0, timeout=5.0, search_timeout=20.0, slow=4.0)
NEVER = float("inf")


def test_who_has_been_silent_is_asked_once_and_is_frozen_if_no_answer_comes() -> None:
    vitals = Vitals(heard_at=10.0)
    assert examine(POLICY, vitals, None, 10.9) is Verdict.WELL
    assert examine(POLICY, vitals, None, 11.0) is Verdict.ASK
    vitals.asked_at = 11.0
    assert examine(POLICY, vitals, None, 15.9) is Verdict.WELL
    assert examine(POLICY, vitals, None, 16.0) is Verdict.FROZEN
    vitals.heard(15.95)
    assert examine(POLICY, vitals, None, 16.0) is Verdict.WELL and vitals.asked_at is None


def test_a_search_that_does_not_end_is_cancelled_and_then_the_planner_is_stuck() -> None:
    vitals = Vitals(heard_at=20.0)
    assert examine(POLICY, vitals, 0.5, 20.4) is Verdict.WELL
    assert examine(POLICY, vitals, 0.5, 20.5) is Verdict.CANCEL
    vitals.cancelled_at = 20.5
    vitals.heard(25.0)
    assert examine(POLICY, vitals, 0.5, 25.4) is Verdict.WELL
    assert examine(POLICY, vitals, 0.5, 25.5) is Verdict.STUCK
    assert examine(HealthPolicy(search_timeout=None), Vitals(heard_at=1e6), 0.0, 1e6) is Verdict.WELL


def test_only_what_cannot_be_waited_for_is_fatal() -> None:
    assert [verdict.name for verdict in Verdict if verdict.is_fatal] == ["FROZEN", "STUCK"]


def test_a_stall_is_an_open_question_or_a_search_that_takes_far_too_long() -> None:
    assert stalls_at(POLICY, Vitals(3.0), None, 0.0) == NEVER
    assert stalls_at(POLICY, Vitals(3.0, asked_at=4.0), None, 0.0) == 5.0
    assert stalls_at(POLICY, Vitals(3.0), 3.0, 0.01) == 4.0
    assert stalls_at(POLICY, Vitals(3.0), 3.0, 0.5) == 5.0
    assert stalls_at(POLICY, Vitals(3.0, asked_at=3.5), 3.0, 0.5) == 4.5
