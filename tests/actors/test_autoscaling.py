"""How many planners there should be, window by window."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from actors.autoscaling import ScalingPolicy, Window, autoscale

POLICY = ScalingPolicy(1, 8)
BUSY = Window(4, 0, 100, 100, busy_seconds=3.9, full_seconds=0.0, seconds=1.0, since_change=100.0)
IDLE = replace(BUSY, busy_seconds=0.5)


def test_planners_are_added_in_proportion_to_what_is_missed_and_at_most_doubled() -> None:
    assert autoscale(POLICY, replace(BUSY, in_time=80)) == 5
    assert autoscale(POLICY, replace(BUSY, in_time=10)) == 8
    assert autoscale(POLICY, replace(BUSY, planners=2, in_time=10)) == 4


def test_between_the_lines_nothing_changes() -> None:
    for in_time in (90, 95, 100):
        assert autoscale(POLICY, replace(BUSY, in_time=in_time)) == 4
    assert autoscale(POLICY, replace(IDLE, in_time=95)) == 4


def test_where_there_is_no_room_planners_are_added_although_all_that_is_taken_is_in_time() -> None:
    assert autoscale(POLICY, replace(BUSY, full_seconds=0.5)) == 5
    assert autoscale(POLICY, replace(BUSY, full_seconds=0.05)) == 4


def test_a_planner_is_removed_only_if_the_others_would_have_had_little_to_do() -> None:
    assert autoscale(POLICY, IDLE) == 3
    # 0.6 of the time of the three that stay.
    assert autoscale(POLICY, replace(BUSY, busy_seconds=1.79)) == 3
    assert autoscale(POLICY, replace(BUSY, busy_seconds=1.81)) == 4
    # Nobody asks for anything.
    assert autoscale(POLICY, replace(IDLE, settled=0, in_time=0, busy_seconds=0.0)) == 3


def test_after_a_change_there_is_a_pause_and_who_is_starting_is_waited_for() -> None:
    missed = replace(BUSY, in_time=10)
    assert autoscale(POLICY, replace(missed, since_change=4.9)) == 4
    assert autoscale(POLICY, replace(missed, since_change=5.0)) == 8
    assert autoscale(POLICY, replace(missed, starting=1)) == 4
    assert autoscale(POLICY, replace(IDLE, since_change=9.9)) == 4
    assert autoscale(POLICY, replace(IDLE, starting=1)) == 4


def test_too_few_requests_say_nothing() -> None:
    assert autoscale(POLICY, replace(BUSY, settled=19, in_time=0)) == 4


@given(
    st.integers(0, 12),
    st.integers(0, 3),
    st.integers(0, 200),
    st.floats(0, 1),
    st.floats(0, 20),
    st.floats(0, 2),
    st.floats(0, 100),
)
def test_the_bounds_hold_and_a_step_down_is_one(
    planners: int, starting: int, settled: int, rate: float, busy: float, full: float, since: float
) -> None:
    window = Window(planners, starting, settled, int(rate * settled), busy, full, 2.0, since)
    wanted = autoscale(POLICY, window)
    assert 1 <= wanted <= 8
    assert wanted >= min(planners, 8) - 1 and wanted <= max(2 * planners, planners + 1, 1)
