"""Who may begin: a bounded number of generations, and when to come again for those that may not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from actors.serving.errors import ApiError
from actors.serving.telemetry import Telemetry

MIN_RETRY, MAX_RETRY = 1, 30
"""Bounds of ``Retry-After``, in seconds."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A generation that was let in."""

    generation_id: str
    owner: str
    max_tokens: int
    since: float
    said: int = 0


class Admission:
    """The generations that run or wait. Belongs to the event loop."""

    def __init__(
        self,
        limit: int,
        telemetry: Telemetry,
        is_draining: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            limit: generations at most.
            telemetry: counts.
            is_draining: whether new generations are turned away now; those that run go on.
            clock: seconds.
        """
        self._limit, self._telemetry, self._is_draining, self._clock = limit, telemetry, is_draining, clock
        self._tickets: dict[str, Ticket] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def enter(self, generations: Iterable[tuple[str, int]], owner: str) -> list[Ticket]:
        """Lets generations in, by id and most tokens: all or none.

        Raises:
            ApiError: 503 while draining, 429 when there are too many.
        """
        wanted = list(generations)
        if self._is_draining():
            raise ApiError(503, "the server is shutting down", headers={"retry-after": str(MIN_RETRY)})
        if len(self._tickets) + len(wanted) > self._limit:
            raise self.full(f"{len(self._tickets)} generations run or wait; allowed: {self._limit} (max_concurrent)")
        now = self._clock()
        tickets = [Ticket(name, owner, max_tokens, now) for name, max_tokens in wanted]
        self._tickets |= {ticket.generation_id: ticket for ticket in tickets}
        self._waiting += len(tickets)
        self._count()
        return tickets

    def says(self, ticket: Ticket, tokens: int) -> None:
        """Takes note of tokens."""
        if ticket.said == 0:
            self._waiting -= 1
            self._count()
        ticket.said += tokens

    def leave(self, ticket: Ticket) -> None:
        """A generation is over. Once more does nothing."""
        if self._tickets.pop(ticket.generation_id, None) is not None:
            self._waiting -= ticket.said == 0
            self._count()

    def is_running(self, generation_id: str, owner: str) -> bool:
        """Whether there is such a generation of this owner."""
        ticket = self._tickets.get(generation_id)
        return ticket is not None and ticket.owner == owner

    def full(self, message: str) -> ApiError:
        """What whoever is turned away for want of room is told."""
        seconds = seconds_to_room(self._tickets.values(), self._clock())
        return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})

    def _count(self) -> None:
        self._telemetry.generations(len(self._tickets) - self._waiting, self._waiting)


def seconds_to_room(tickets: Iterable[Ticket], now: float) -> int:
    """Whole seconds, within bounds, until the first of some generations has said all it may at its present rate."""
    soonest = min(
        (
            (ticket.max_tokens - ticket.said) * (now - ticket.since) / ticket.said
            for ticket in tickets
            if ticket.said > 0
        ),
        default=float(MIN_RETRY),
    )
    return min(MAX_RETRY, max(MIN_RETRY, math.ceil(soonest)))
