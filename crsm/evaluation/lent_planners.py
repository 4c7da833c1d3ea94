"""Planners that outlive the engine they plan for: starting actors takes longer than a short evaluation."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from crsm.planners import Arrivals, Planners
from crsm.types import PlanRequest


class LentPlanners:
    """The same planners for one engine after the other.

    An engine may leave requests behind: ``close`` waits until all have come back, so that the next engine does not find
    the planners at work on them, and leaves the planners alive.
    """

    def __init__(self, inner: Planners) -> None:
        self._inner = inner
        self._out: set[int] = set()

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self._out.update(request.request_id for request in requests)
        self._inner.submit(requests)

    def room(self) -> int | None:
        return self._inner.room()

    def soonest(self) -> float:
        return self._inner.soonest()

    def poll(self) -> Arrivals:
        return self._seen(self._inner.poll())

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        return self._seen(self._inner.wait(request_ids))

    def close(self) -> None:
        while self._out:
            self._seen(self._inner.wait(tuple(self._out)))

    def _seen(self, arrivals: Arrivals) -> Arrivals:
        self._out -= arrivals.request_ids
        return arrivals
