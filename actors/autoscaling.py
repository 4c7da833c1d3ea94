"""How many planners there should be. Pure.

Planners are added while too many requests miss their deadline, or while there is no room for more requests (the
generator then asks for less than it would). They are removed one at a time, and only if those that are left would have
had little to do. Between the two lies a wide band in which nothing changes, and after every change a pause: new
planners must first show what they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """When planners are added and removed."""

    min_count: int
    max_count: int
    low: float = 0.9
    """In-time rate below which planners are added."""
    high: float = 0.98
    """In-time rate from which planners may be removed."""
    full: float = 0.1
    """Share of the time without room above which planners are added."""
    busy: float = 0.6
    """Share of the time that those who stay may have been busy, had they done the work of all."""
    period: float = 2.0
    """Seconds of a window."""
    cool_down: float = 10.0
    """Seconds after a change before planners are removed; half of it before more are added."""
    min_settled: int = 20
    """Requests without which a window's rate says nothing."""


@dataclass(frozen=True, slots=True)
class Window:
    """What happened since the last look."""

    planners: int
    """That are to be there: ready, starting, or to be started again."""
    starting: int
    """Of these, not ready."""
    settled: int
    """Requests answered or shed; what was lost with a planner says nothing about the load."""
    in_time: int
    """Of these, answered by their deadline."""
    busy_seconds: float
    """Summed over planners."""
    full_seconds: float
    """During which there was no room."""
    seconds: float
    since_change: float
    """Seconds since planners were added or removed."""


def in_time_rate(settled: int, in_time: int) -> float:
    """1 where nothing was asked."""
    return in_time / settled if settled else 1.0


def autoscale(policy: ScalingPolicy, window: Window) -> int:
    """How many planners there should be after this window."""
    count = window.planners
    bounded = min(max(count, policy.min_count), policy.max_count)
    if bounded != count or window.seconds <= 0:
        return bounded
    rate = in_time_rate(window.settled, window.in_time)
    full = window.full_seconds / window.seconds
    telling = window.settled >= policy.min_settled
    if (telling and rate < policy.low) or full > policy.full:
        # Those that are starting are the answer to what was missed so far.
        if window.starting or window.since_change < policy.cool_down / 2:
            return count
        # As many as would have answered all, had each done as much; at most twice as many.
        wanted = math.ceil(count / max(rate, 0.5)) if telling else count + 1
        return min(max(wanted, count + 1), policy.max_count)
    idle = window.busy_seconds / window.seconds <= policy.busy * (count - 1)
    quiet = full == 0 and (not telling or rate >= policy.high)
    if quiet and idle and not window.starting and window.since_change >= policy.cool_down:
        return max(count - 1, policy.min_count)
    return count
