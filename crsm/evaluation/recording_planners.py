"""Planners whose plans are kept, for whoever wants to look at them afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from crsm.planners import Arrivals, Planners
from crsm.types import Plan, PlanRequest


class RecordingPlanners:
    """Passes everything through and keeps the plans, in the order in which they came back."""

    def __init__(self, inner: Planners) -> None:
        self._inner = inner
        self.plans: list[Plan] = []

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self._inner.submit(requests)

    def room(self) -> int | None:
        return self._inner.room()

    def soonest(self) -> float:
        return self._inner.soonest()

    def poll(self) -> Arrivals:
        return self._kept(self._inner.poll())

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        return self._kept(self._inner.wait(request_ids))

    def close(self) -> None:
        self._inner.close()

    def _kept(self, arrivals: Arrivals) -> Arrivals:
        self.plans += arrivals.plans
        return arrivals
