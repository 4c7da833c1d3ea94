"""When a generation may say its next token. Pure.

Beats, not intervals: a pace of ``p`` tokens a second allows one token per beat, and beat ``k`` comes ``k / p`` seconds
after the engine's beginning. Generations of one pace share their beats and so stay in one batch; a step that came late
costs beats and makes no burst.
"""

from __future__ import annotations

import math

_ROUNDING = 1e-6
"""Of a beat: a clock that shows the time of a beat must count as having reached it."""


def beat(now: float, pace: float) -> int:
    """The last beat that has come, ``now`` seconds after the beginning."""
    return math.floor(now * pace + _ROUNDING)


def first_beat(now: float, pace: float) -> int:
    """What counts as the beat of a token said between two: at least a whole interval lies before the next."""
    return math.ceil(now * pace - _ROUNDING)


def time_of(beat: int, pace: float) -> float:
    """Seconds after the beginning."""
    return beat / pace
