"""Whether a planner lives, is stuck, or has to be replaced. Pure: what was heard and when is passed in.

A planner that has been silent is asked; any answer of it, plans too, is a sign of life. It is

* *stalled* when its question or its search takes far longer than it should: it gets nothing more to do;
* *frozen* when a question stays unanswered for ``timeout``: replaced;
* *stuck* when questions are answered and a search does not end: cancelled first, replaced if that does not help.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """How long is too long, in seconds."""

    interval: float = 1.0
    """Silence after which a planner is asked; an answer that takes longer is a stall."""
    timeout: float = 15.0
    """Without an answer, or without an end after a cancel."""
    search_timeout: float | None = 60.0
    """Of one search; None: searches may take as long as they do."""
    slow: float = 4.0
    """A search that takes this many times what was expected, and more than ``interval``, is a stall."""


DEFAULT_HEALTH = HealthPolicy()


@dataclass(slots=True)
class Vitals:
    """What is known of one planner."""

    heard_at: float = 0.0
    """Last sign of life."""
    asked_at: float | None = None
    """Since when a question has been open."""
    cancelled_at: float | None = None
    """When its running search was cancelled."""

    def heard(self, now: float) -> None:
        self.heard_at, self.asked_at = now, None


class Verdict(enum.Enum):
    """What to do with a planner."""

    WELL = enum.auto()
    ASK = enum.auto()
    CANCEL = enum.auto()
    FROZEN = enum.auto()
    STUCK = enum.auto()

    @property
    def is_fatal(self) -> bool:
        return self in (Verdict.FROZEN, Verdict.STUCK)


def examine(policy: HealthPolicy, vitals: Vitals, searching_since: float | None, now: float) -> Verdict:
    """What to do now.

    Args:
        policy: how long is too long.
        vitals: of the planner.
        searching_since: when its running search began, if one is running.
        now: seconds.
    """
    if vitals.asked_at is not None and now >= vitals.asked_at + policy.timeout:
        return Verdict.FROZEN
    if searching_since is not None and policy.search_timeout is not None:
        if vitals.cancelled_at is not None and now >= vitals.cancelled_at + policy.timeout:
            return Verdict.STUCK
        if vitals.cancelled_at is None and now >= searching_since + policy.search_timeout:
            return Verdict.CANCEL
    if vitals.asked_at is None and now >= vitals.heard_at + policy.interval:
        return Verdict.ASK
    return Verdict.WELL


def stalls_at(policy: HealthPolicy, vitals: Vitals, searching_since: float | None, expected: float) -> float:
    """From when on a planner counts as stalled if nothing is heard of it; infinity where nothing is awaited.

    Args:
        expected: seconds that its running search should take.
    """
    asked = float("inf") if vitals.asked_at is None else vitals.asked_at + policy.interval
    if searching_since is None:
        return asked
    return min(asked, searching_since + max(policy.interval, policy.slow * expected))
