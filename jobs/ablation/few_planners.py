"""Planners of which there are only so many, by the virtual clock.

Every answer has planners of its own, and a planner is busy with a plan for a number of tokens: what is asked while all
are busy, or could not be ready at its target, is shed, as a pool does it. Time is counted in tokens, so that no figure
depends on the machine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from crsm.planners import Arrivals, Planners
from crsm.types import PlanRequest


class FewPlanners:
    """Passes on what the planners find time for."""

    def __init__(self, inner: Planners, count: int, plan_tokens: float) -> None:
        """
        Args:
            inner: who plans.
            count: planners of one answer.
            plan_tokens: tokens that are said while a planner makes a plan.
        """
        self._inner, self._count, self._plan_tokens = inner, count, plan_tokens
        self._free_at: dict[str, list[float]] = {}
        """By generation: positions at which its planners are free again."""
        self._shed: list[PlanRequest] = []

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        taken = [request for request in requests if self._takes(request)]
        ids = {request.request_id for request in taken}
        self._shed += [request for request in requests if request.request_id not in ids]
        if taken:
            self._inner.submit(taken)

    def _takes(self, request: PlanRequest) -> bool:
        free_at = self._free_at.setdefault(request.generation_id, [0.0] * self._count)
        planner = min(range(self._count), key=free_at.__getitem__)
        done = max(float(request.position), free_at[planner]) + self._plan_tokens
        if done > request.target:
            return False
        free_at[planner] = done
        return True

    def room(self) -> int | None:
        return self._inner.room()

    def soonest(self) -> float:
        return self._inner.soonest()

    def poll(self) -> Arrivals:
        return self._with_shed(self._inner.poll())

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        shed = {request.request_id for request in self._shed}
        missing = [request_id for request_id in request_ids if request_id not in shed]
        return self._with_shed(self._inner.wait(missing) if missing else self._inner.poll())

    def close(self) -> None:
        self._inner.close()

    def _with_shed(self, arrivals: Arrivals) -> Arrivals:
        if not self._shed:
            return arrivals
        shed, self._shed = self._shed, []
        return Arrivals([*arrivals.plans], [*arrivals.lost], [*arrivals.shed, *shed])
