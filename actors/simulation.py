"""A pool in simulated time: the scheduling that a real pool runs, with planners that only take time.

A discrete-event simulation around :class:`~actors.scheduling.PoolState`. Generators say a token of all their
generations at once and ask for a plan of each; beyond the room that the pool has they ask for the most valuable ones
only, as the engine does. Three things take time: the pool's process (one Ray call after another), the generators' link
to the planners (one byte after another), and the searches. Deterministic for a seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actors.ranking import Ask
from actors.scheduling import PoolState


@dataclass(frozen=True, slots=True)
class Demand:
    """Who asks how much of one pool."""

    generations: int
    tokens_per_second: float
    """Of every generation."""
    lag: int = 2
    max_lag: int = 8
    simulations: int = 64
    plan_every: int = 1
    """Tokens between two requests of a generation."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What takes how long, in seconds."""

    overhead: float
    """Of a search."""
    per_step: float
    """Of all trees of a search taking one simulation."""
    per_simulation: float
    """Of one tree."""
    request_bytes: int
    spread: float = 0.1
    """Standard deviation of the logarithm of a search's time."""
    call: float = 0.0
    """Of the pool's process, per search."""
    per_request: float = 0.0
    """Of the pool's process, per request of it."""
    bandwidth: float = float("inf")
    """Bytes per second from the generators to the planners."""
    latency: float = 0.0
    """Of a message."""

    def search(self, steps: int, work: int) -> float:
        return self.overhead + steps * self.per_step + work * self.per_simulation


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the plans that were due; rates are per second of simulated time."""

    due: int
    """Plans that the generations wanted."""
    asked: int
    """Of these, for which there was room."""
    hits: int
    """Of these, back before they expired."""
    in_time: int
    """Of these, back by their deadline."""
    simulations: float
    """Mean of those that were searched."""
    searches_per_second: float
    requests_per_second: float
    """That were sent to planners."""
    plans_per_second: float
    bytes_per_second: float
    busy: float
    """Share of the time that planners searched."""
    dispatcher_busy: float
    """Share of the time that the pool's process was at work."""

    @property
    def hit_rate(self) -> float:
        """Of all plans that were due, also those that were not asked for."""
        return self.hits / self.due if self.due else 0.0

    @property
    def messages_per_second(self) -> float:
        return self.requests_per_second + self.plans_per_second


def simulate(
    planners: int, demand: Demand, costs: Costs, *, seconds: float, seed: int = 0, warm_up: float = 0.0, **rules: Any
) -> Outcome:
    """One pool under one demand.

    Args:
        planners: of the pool.
        demand: what is asked of it.
        costs: what takes how long.
        seconds: simulated and counted.
        seed: of values and search times.
        warm_up: simulated before and not counted.
        rules: of :class:`~actors.scheduling.PoolState` (``max_in_flight``, ``max_batch``, …).
    """
    return _Simulation(planners, demand, costs, warm_up, warm_up + seconds, random.Random(seed), rules).run()


class _Simulation:
    def __init__(
        self,
        planners: int,
        demand: Demand,
        costs: Costs,
        begin: float,
        end: float,
        rng: random.Random,
        rules: dict[str, Any],
    ) -> None:
        self._demand, self._costs, self._begin, self._end, self._rng = demand, costs, begin, end, rng
        self._state = PoolState(planners, **({"max_in_flight": 2} | rules))
        for planner in self._state.decide(0.0).start:
            self._state.ready(planner, 1, 0.0)
            self._state.slots[planner].warm = True  # a pool that has worked for a while
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = self._counter()
        self._pool_free = self._link_free = 0.0
        self._planner_free = [0.0] * planners
        self._wakes: set[float] = set()
        self._ticket = self._due = self._asked = self._hits = self._in_time = 0
        self._searches = self._sent = self._answered = self._simulations = 0
        self._busy = self._dispatching = 0.0

    @staticmethod
    def _counter() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    def _at(self, time: float, kind: str, what: Any = None) -> None:
        heapq.heappush(self._events, (time, next(self._order), kind, what))

    def run(self) -> Outcome:
        token = 1 / self._demand.tokens_per_second
        period = self._demand.plan_every * token
        steps = round(self._end / period)
        for step in range(steps):
            self._at(step * period, "step")
        last = (steps - 1) * period + (1 + self._demand.lag + self._demand.max_lag) * token
        while self._events and self._events[0][0] <= last:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "step":
                self._step(now)
            elif kind == "done":
                self._done(now, *what)
            else:
                self._wakes.discard(now)
            self._dispatch(now)
        seconds = self._end - self._begin
        return Outcome(
            due=self._due,
            asked=self._asked,
            hits=self._hits,
            in_time=self._in_time,
            simulations=self._simulations / self._sent if self._sent else 0.0,
            searches_per_second=self._searches / seconds,
            requests_per_second=self._sent / seconds,
            plans_per_second=self._answered / seconds,
            bytes_per_second=self._sent * self._costs.request_bytes / seconds,
            busy=self._busy / seconds / max(1, len(self._planner_free)),
            dispatcher_busy=self._dispatching / seconds,
        )

    def _counts(self, time: float) -> bool:
        return self._begin <= time < self._end

    def _step(self, now: float) -> None:
        """A token of every generation."""
        demand = self._demand
        period = 1 / demand.tokens_per_second
        deadline = now + (1 + demand.lag) * period
        expires = deadline + demand.max_lag * period
        room = self._state.room() or 0
        wants = [(self._rng.lognormvariate(0, 1), generation) for generation in range(demand.generations)]
        taken = sorted(wants, reverse=True)[:room]
        asks = []
        for value, generation in taken:
            asks.append(Ask(self._ticket, f"g{generation}", value, demand.simulations, 1, deadline, expires))
            self._ticket += 1
        self._state.arrived(asks)
        if self._counts(now):
            self._due += demand.generations
            self._asked += len(asks)

    def _done(self, now: float, planner: int, number: int, asked_since: float) -> None:
        batch = self._state.answered(planner, 1, number, now)
        assert batch is not None
        self._answered += len(batch.grants) * self._counts(now)
        lead = (1 + self._demand.lag) / self._demand.tokens_per_second
        for grant in batch.grants:
            deadline, expires = grant.ask.deadline, grant.ask.expires
            assert deadline is not None and expires is not None
            if self._counts(deadline - lead):
                self._hits += now <= expires
                self._in_time += now <= deadline

    def _dispatch(self, now: float) -> None:
        """What the pool's process does, one thing after another."""
        if self._pool_free > now:
            self._wake(self._pool_free)
            return
        costs, free = self._costs, now
        decision = self._state.decide(now)
        for planner in decision.ask:
            free += costs.call
            self._state.heard(planner, 1, now)
        for planner, batch in decision.send:
            requests = len(batch.grants)
            free += costs.call + requests * costs.per_request
            self._link_free = max(self._link_free, free) + requests * costs.request_bytes / costs.bandwidth
            start = max(self._link_free + costs.latency, self._planner_free[planner])
            took = costs.search(batch.steps, batch.work) * self._rng.lognormvariate(0, costs.spread)
            self._planner_free[planner] = start + took
            self._at(start + took + costs.latency, "done", (planner, batch.number, now))
            if self._counts(now):
                self._searches += 1
                self._sent += requests
                self._simulations += batch.work
                self._busy += took
        if self._counts(now):
            self._dispatching += free - now
        self._pool_free = free
        if (wake_at := self._state.wake_at()) is not None:
            self._wake(max(wake_at, now + 1e-4))

    def _wake(self, at: float) -> None:
        if at not in self._wakes:
            self._wakes.add(at)
            self._at(at, "wake")
