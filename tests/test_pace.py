"""Beats: a pace is never exceeded, and a clock that shows the time of a beat has reached it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crsm.pace import beat, first_beat, time_of

PACES = st.floats(0.01, 1e4)


@given(pace=PACES, number=st.integers(0, 10**6))
def test_the_time_of_a_beat_belongs_to_it_and_the_moment_before_to_the_one_before(pace: float, number: int) -> None:
    assert beat(time_of(number, pace), pace) == number
    assert beat(time_of(number, pace) - 0.01 / pace, pace) == number - 1


@given(pace=PACES, now=st.floats(0, 1e5))
def test_a_token_between_two_beats_counts_as_said_at_the_later_one(pace: float, now: float) -> None:
    """So that at least a whole interval passes before the beat after it."""
    counted = first_beat(now, pace)
    assert time_of(counted, pace) >= now - 1e-5 / pace and counted - beat(now, pace) in (0, 1)
    assert time_of(counted + 1, pace) - now >= (1 - 1e-5) / pace
