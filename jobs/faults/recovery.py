"""Hit rates over time, and how long they take to come back. Pure.

Plans that were made bad on purpose do not count here, neither way: the question is how soon plans come again, not
whether bad ones are refused. What the planners had no room for counts as missed.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from crsm.types import Reason

MISSES = (Reason.STALE, Reason.MISMATCH, Reason.LOST, Reason.SHED, Reason.DECLINED)
WINDOW = 1.5
"""Seconds of requests that a rate is of."""
FEWEST = 10
"""Requests that a rate needs."""
BACK = 0.9
"""Share of the calm rate that counts as back."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters at a moment."""

    at: float
    hits: int
    misses: int


def sample(at: float, outcomes: Mapping[str, int]) -> Sample:
    """From a generator's counters."""
    hits = sum(outcomes.get(reason.value, 0) for reason in Reason if reason.is_hit)
    return Sample(at, hits, sum(outcomes.get(reason.value, 0) for reason in MISSES))


def rate_between(samples: Sequence[Sample], start: float, end: float) -> float | None:
    """Hit rate of what was settled in a time; None: too little was."""
    times = [sample.at for sample in samples]
    first, last = bisect_left(times, start), bisect_left(times, end)
    if last >= len(samples) or times[last] > end:
        last -= 1
    if first >= len(samples) or last <= first:
        return None
    hits = samples[last].hits - samples[first].hits
    settled = hits + samples[last].misses - samples[first].misses
    return hits / settled if settled >= FEWEST else None


def calm_rate(samples: Sequence[Sample], calm: Iterable[tuple[float, float]]) -> float | None:
    """Median over the calm times."""
    rates = [rate for start, end in calm if (rate := rate_between(samples, start, end)) is not None]
    return statistics.median(rates) if rates else None


def recovery_seconds(
    samples: Sequence[Sample], faults: Iterable[float], usual: float, until: float, window: float = WINDOW
) -> tuple[list[float], int]:
    """How long after each fault the hit rate was back, and how many never saw it back.

    A rate is back at the start of the first window after the fault in which it reaches ``BACK`` of the usual one: 0 if
    the fault made no dent. A fault that is followed by others waits for the end of them all; one that never sees the
    rate back counts with the time that was left.
    """
    seconds, never = [], 0
    for fault in faults:
        for start in (sample.at for sample in samples if sample.at >= fault):
            if start + window > until:
                seconds.append(max(0.0, until - fault))
                never += 1
                break
            rate = rate_between(samples, start, start + window)
            if rate is not None and rate >= BACK * usual:
                seconds.append(start - fault)
                break
        else:
            never += 1
    return seconds, never
