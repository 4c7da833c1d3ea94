"""Planners as the engine sees them, and the two kinds that live in its own process.

The protocol has verbs that never block (``submit``, ``room``, ``soonest``, ``poll``), one that does (``wait``), which
only the virtual clock uses, and ``close``. The actor pool implements the same protocol.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from crsm.reasoning import Deliberator
from crsm.types import Plan, PlanRequest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Arrivals:
    """What came back since the last look."""

    plans: list[Plan] = field(default_factory=list)
    lost: list[PlanRequest] = field(default_factory=list)
    """Requests that will never be answered: their planner died, or the message was lost."""
    shed: list[PlanRequest] = field(default_factory=list)
    """Requests that were dropped: all planners were busy, or the plan would have come too late."""

    def add(self, more: Arrivals) -> None:
        self.plans += more.plans
        self.lost += more.lost
        self.shed += more.shed

    @property
    def request_ids(self) -> set[int]:
        """Requests that are settled by this."""
        return {settled.request_id for part in (self.plans, self.lost, self.shed) for settled in part}


NOTHING = Arrivals()
"""Nothing came back; nobody may put anything into it. What ``poll`` returns most of the time costs no memory then."""


class Planners(Protocol):
    """Whoever answers plan requests."""

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        """Hands over the requests of one step of the engine. Never blocks, never raises for a dead planner."""

    def room(self) -> int | None:
        """How many requests would be taken now without dropping others; None: any number. Never blocks.

        Who asks for more than this wastes snapshots: all planners are busy, or there is none.
        """

    def soonest(self) -> float:
        """Seconds in which the smallest search handed over now would be back, as a rule; 0: not known. Never blocks.

        Who asks for a plan that is worthless before that wastes a snapshot.
        """

    def poll(self) -> Arrivals:
        """What is there. Never blocks."""

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        """Everything up to and with the answers to these requests, or the news that they are lost. Blocks."""

    def close(self) -> None:
        """Stops all planners; returns when they have stopped."""


def split_batch(requests: Sequence[PlanRequest], max_batch: int) -> list[list[PlanRequest]]:
    """The search batches of one step: a function of the requests alone, so that every kind of planner searches the same
    batches and gets the same bits."""
    return [list(requests[start : start + max_batch]) for start in range(0, len(requests), max_batch)]


class InlinePlanners:
    """Plans at once, in the caller's thread: the synchronous reference."""

    def __init__(self, deliberator: Deliberator, max_batch: int = 128) -> None:
        self._deliberator, self._max_batch = deliberator, max_batch
        self._plans: list[Plan] = []

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        for batch in split_batch(requests, self._max_batch):
            self._plans += self._deliberator(batch)

    def room(self) -> int | None:
        return None

    def soonest(self) -> float:
        return 0.0

    def poll(self) -> Arrivals:
        plans, self._plans = self._plans, []
        return Arrivals(plans)

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        return self.poll()

    def close(self) -> None:
        self._plans.clear()


class ThreadPlanners:
    """Planners in threads of this process: the embedded default.

    Invariants: the caller's thread never waits in ``submit`` or ``poll``; every request comes back exactly once, as
    plans or as lost; at most ``max_in_flight`` batches per thread are queued, and the oldest are shed beyond that.
    """

    def __init__(
        self, deliberator: Deliberator, count: int = 1, max_batch: int = 128, max_in_flight: int | None = None
    ) -> None:
        """
        Args:
            deliberator: shared by the threads; it keeps no state between calls.
            count: threads.
            max_batch: requests of one search.
            max_in_flight: batches queued per thread before the oldest is shed; None: no bound (virtual clock).
        """
        if count < 1:
            raise ValueError(f"planners.count = {count}; allowed: at least 1 (or no planners at all)")
        self._deliberator, self._max_batch = deliberator, max_batch
        self._bound = None if max_in_flight is None else max_in_flight * count
        self._todo: queue.SimpleQueue[list[PlanRequest] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Arrivals] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"planner-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        for batch in split_batch(requests, self._max_batch):
            self._todo.put(batch)
        while self._bound is not None and self._todo.qsize() > self._bound:
            try:
                oldest = self._todo.get_nowait()
            except queue.Empty:
                break
            self._done.put(Arrivals(shed=oldest or []))

    def room(self) -> int | None:
        if self._bound is None:
            return None
        return max(0, self._bound - self._todo.qsize()) * self._max_batch

    def soonest(self) -> float:
        return 0.0

    def poll(self) -> Arrivals:
        found = Arrivals()
        while True:
            try:
                found.add(self._done.get_nowait())
            except queue.Empty:
                return found

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        missing = set(request_ids)
        found = Arrivals()
        while missing:
            arrived = self._done.get()
            found.add(arrived)
            missing -= arrived.request_ids
        return found

    def close(self) -> None:
        self._stopping.set()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (batch := self._todo.get()) is not None:
            try:
                plans = self._deliberator(batch, should_stop=self._stopping.is_set)
            except Exception:
                # Whatever it was, it costs the plans of this batch only, and who waits for them must hear of it. The
                # loss is counted by the engine.
                logger.exception("a deliberation on %d requests failed", len(batch))
                self._done.put(Arrivals(lost=batch))
            else:
                self._done.put(Arrivals(plans))
