"""The planners of a pool: their lives, their health, who is free, how many there are. Pure: time is passed in.

Invariants:

* a planner has never more than ``max_in_flight`` batches; the one with the fewest is given the next;
* one that died, cannot be reached or has to be replaced loses what it had, and is started again after a pause that
  doubles with every failure in a row; an error of one deliberation costs its batch and nothing else;
* one that stalls gets nothing new; at most a quarter of the pool is replaced for its health within one timeout, and
  none because this process itself was held up;
* one that is no longer needed finishes what it has, and is stopped;
* news of a planner that has been replaced meanwhile (an older ``incarnation``) changes nothing.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.autoscaling import ScalingPolicy, Window, autoscale
from actors.health import HealthPolicy, Verdict, Vitals, examine, stalls_at
from actors.microbatch import Grant

_NEVER = float("inf")


class Phase(str, enum.Enum):
    """Where a planner is in its life."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    """Dead; to be started again."""
    RETIRED = "retired"
    """Dead; not started again."""
    LEAVING = "leaving"
    """No longer needed; finishes what it has."""
    PARKED = "parked"
    """Stopped since it was not needed; may be started again."""


MOST_ASKED = 8
"""Planners that are asked in one turn, ..."""
ASK_PAUSE = 0.1
"""... and seconds until the next turn: a question is a Ray call, and a thousand at once would hold up the pool."""

_ALIVE = (Phase.STARTING, Phase.READY, Phase.LEAVING)


class Failure(str, enum.Enum):
    """What came back instead of plans."""

    PLANNER_ERROR = "planner_error"
    """The deliberation refused its requests or failed; the actor is well."""
    RESULT_LOST = "result_lost"
    """The actor answered, or was never asked, and the message was lost (object store full, object evicted)."""
    ACTOR_DIED = "actor_died"
    UNREACHABLE = "unreachable"
    """No connection. The planner is replaced: it holds nothing that the weights do not."""

    @property
    def is_fatal(self) -> bool:
        """The planner has to be replaced."""
        return self in (Failure.ACTOR_DIED, Failure.UNREACHABLE)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a planner that died is started again."""

    first_delay: float = 0.1
    """Seconds before the first restart in a row; doubled by each further one."""
    max_delay: float = 30.0
    max_restarts: int | None = None
    """Restarts of one planner over its life; None: no bound."""

    def delay(self, failures: int) -> float:
        """Seconds to pause after this many failures in a row."""
        # The exponent is bounded: a float cannot hold the doublings of a planner that fails for days.
        return min(self.max_delay, self.first_delay * 2.0 ** min(failures - 1, 60))


DEFAULT_RESTART = RestartPolicy()


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests of one search, on their way."""

    number: int
    grants: tuple[Grant, ...]
    sent_at: float

    @property
    def steps(self) -> int:
        return max(grant.simulations for grant in self.grants)

    @property
    def work(self) -> int:
        return sum(grant.simulations * grant.ask.hypotheses for grant in self.grants)

    @property
    def tickets(self) -> tuple[int, ...]:
        return tuple(grant.ask.ticket for grant in self.grants)


@dataclass(slots=True, eq=False)
class Slot:
    """One planner's place in the pool; the actors that fill it, one after another, are its incarnations."""

    phase: Phase = Phase.DOWN
    incarnation: int = 0
    in_flight: list[Batch] = field(default_factory=list)
    """Oldest first; the first is being searched."""
    failures: int = 0
    """Deaths since it last answered."""
    restart_at: float = 0.0
    parked: int = 0
    """Incarnations that were stopped since they were not needed."""
    idle_since: float = 0.0
    """When it last answered a batch."""
    warm: bool = False
    """It has answered before: its first answer takes longer, for memory, weights and connections, and is no measure."""
    stalled: bool = False
    vitals: Vitals = field(default_factory=Vitals)

    @property
    def is_sound(self) -> bool:
        """It may be given batches."""
        return self.phase is Phase.READY and not self.stalled

    @property
    def restarts(self) -> int:
        return max(0, self.incarnation - 1 - self.parked)

    @property
    def searching_since(self) -> float | None:
        return max(self.in_flight[0].sent_at, self.idle_since) if self.in_flight else None


@dataclass(slots=True)
class Care:
    """What planners need now."""

    stop: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    ask: list[int] = field(default_factory=list)
    cancel: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    """Requests that went with planners."""


class Fleet:
    """All planners of a pool. One thread owns it."""

    def __init__(
        self,
        count: int,
        max_in_flight: int,
        counts: Counter[str],
        *,
        may_stall: bool,
        restart: RestartPolicy,
        health: HealthPolicy,
        scaling: ScalingPolicy | None,
    ) -> None:
        """
        Args:
            count: planners at first.
            max_in_flight: batches sent to one planner and not yet answered.
            counts: where to count what happens.
            may_stall: give nothing more to a planner that takes far too long.
            restart: when dead planners are started again.
            health: when a planner is asked, and replaced.
            scaling: how many planners there should be; None: always ``count``.
        """
        self.slots = [Slot() for _ in range(count)]
        self.max_in_flight, self.counts, self.restart = max_in_flight, counts, restart
        self._may_stall, self._health, self._scaling = may_stall, health, scaling
        self._free: list[tuple[int, int]] = []
        """Heap of (batches in flight, planner); entries that no longer hold are skipped."""
        self.timers_at = -_NEVER
        """When planners are to be looked at again."""
        self._leaving: list[int] = []
        """Planners that have finished what they had."""
        self._replaced: deque[float] = deque()
        self._window_at = self._changed_at = 0.0
        self._window: Counter[str] = Counter()
        self._busy = self._full = 0.0

    # ---------------------------------------------------------------- news

    def ready(self, planner: int, incarnation: int, now: float) -> bool:
        """A planner has started. Whether that is news of its present incarnation."""
        slot = self.slots[planner]
        if slot.incarnation != incarnation or slot.phase is not Phase.STARTING:
            return False
        slot.phase, slot.stalled, slot.vitals, slot.idle_since = Phase.READY, False, Vitals(now), now
        slot.warm = False
        self._look_at(now + self._health.interval)
        self._offer(planner)
        return True

    def heard(self, planner: int, incarnation: int, now: float) -> None:
        """A planner has said that it lives."""
        slot = self.slots[planner]
        if slot.incarnation == incarnation and slot.phase in _ALIVE:
            slot.vitals.heard(now)
            if slot.stalled:
                self._look_at(now)

    def finished(self, planner: int, incarnation: int, number: int, now: float) -> tuple[Batch, float, bool] | None:
        """A batch came back, as plans or as an error: the batch, the seconds it took, and whether the planner was warm
        before; None: nobody asks for it."""
        slot = self.slots[planner]
        batch = next((batch for batch in slot.in_flight if batch.number == number), None)
        if slot.incarnation != incarnation or batch is None:
            return None
        seconds = max(0.0, now - max(batch.sent_at, slot.idle_since))
        slot.in_flight.remove(batch)
        slot.idle_since, slot.stalled, slot.vitals.cancelled_at = now, False, None
        was_warm, slot.warm = slot.warm, True
        slot.vitals.heard(now)
        self._busy += seconds
        if slot.phase is Phase.LEAVING and not slot.in_flight:
            self._leaving.append(planner)
        self._offer(planner)
        return batch, seconds, was_warm

    def die(self, planner: int, incarnation: int, now: float) -> tuple[int, ...]:
        """A planner is gone. The requests that are lost by it."""
        slot = self.slots[planner]
        if slot.incarnation != incarnation or slot.phase not in _ALIVE:
            return ()
        lost = tuple(ticket for batch in slot.in_flight for ticket in batch.tickets)
        slot.in_flight, slot.stalled = [], False
        if slot.phase is Phase.LEAVING:
            slot.phase, slot.parked = Phase.PARKED, slot.parked + 1
            return lost
        slot.failures += 1
        bound = self.restart.max_restarts
        if bound is not None and slot.restarts >= bound:
            slot.phase = Phase.RETIRED
        else:
            slot.phase, slot.restart_at = Phase.DOWN, now + self.restart.delay(slot.failures)
            self._look_at(slot.restart_at)
        return lost

    def settled(self, requests: int, in_time: int) -> None:
        """So many requests were answered or shed, so many of them answered by their deadline."""
        for counts in (self.counts, self._window):
            counts["settled"] += requests
            counts["in_time"] += in_time

    def was_full(self, seconds: float) -> None:
        """There was no room for requests."""
        self._full += seconds

    # ---------------------------------------------------------------- who is free

    def send(self, planner: int, batch: Batch) -> None:
        self.slots[planner].in_flight.append(batch)
        self._offer(planner)

    def least_loaded(self) -> int | None:
        """The planner that is given the next batch; None: all have enough."""
        while self._free:
            load, planner = self._free[0]
            if self._has_room(planner) and len(self.slots[planner].in_flight) == load:
                return planner
            heapq.heappop(self._free)
        return None

    def _offer(self, planner: int) -> None:
        """Notes that a planner may have room."""
        if self._has_room(planner):
            heapq.heappush(self._free, (len(self.slots[planner].in_flight), planner))

    def _has_room(self, planner: int) -> bool:
        slot = self.slots[planner]
        return slot.is_sound and len(slot.in_flight) < self.max_in_flight

    def worth_waiting(self) -> bool:
        """Whether a planner is ready or about to start for the first time."""
        return any(
            slot.phase is Phase.READY or (slot.phase is Phase.STARTING and slot.restarts == 0) for slot in self.slots
        )

    # ---------------------------------------------------------------- what they need

    def look_after(self, now: float, overslept: float, expected: Callable[[Batch], float]) -> Care:
        """Starts, stops, questions and replacements that are due; the fleet counts them as done.

        Args:
            now: seconds.
            overslept: seconds since this should have been called.
            expected: seconds that the search of a batch should take.
        """
        care = Care()
        if now >= self.timers_at:
            self.timers_at = _NEVER
            self._scale(now)
            for planner, slot in enumerate(self.slots):
                if slot.phase is Phase.DOWN and slot.restart_at <= now:
                    slot.phase, slot.incarnation = Phase.STARTING, slot.incarnation + 1
                    care.start.append(planner)
                elif slot.phase in (Phase.READY, Phase.LEAVING):
                    if slot.vitals.asked_at is not None and overslept > self._health.interval:
                        # This process was held up: silence is no proof, the answers may be lying there unread.
                        slot.vitals.asked_at += overslept
                    self._examine(planner, now, care, expected)
                if slot.phase is Phase.DOWN:
                    self._look_at(slot.restart_at)
        for planner in self._leaving:
            slot = self.slots[planner]
            if slot.phase is Phase.LEAVING:
                slot.phase, slot.parked = Phase.PARKED, slot.parked + 1
                care.stop.append(planner)
        self._leaving.clear()
        return care

    def _examine(self, planner: int, now: float, care: Care, expected: Callable[[Batch], float]) -> None:
        slot, policy = self.slots[planner], self._health
        since = slot.searching_since
        verdict = examine(policy, slot.vitals, since, now)
        if verdict.is_fatal and self._may_replace(now):
            self.counts["replaced"] += 1
            care.lost += self.die(planner, slot.incarnation, now)
            care.stop.append(planner)
            return
        if verdict is Verdict.ASK:
            # In a large pool each is asked less often, so that all have their turn.
            quiet = now - slot.vitals.heard_at
            if quiet >= 1.25 * len(self.slots) * ASK_PAUSE / MOST_ASKED or len(self.slots) <= MOST_ASKED:
                if len(care.ask) < MOST_ASKED:
                    slot.vitals.asked_at = now
                    care.ask.append(planner)
                else:
                    self._look_at(now + ASK_PAUSE)
        elif verdict is Verdict.CANCEL:
            slot.vitals.cancelled_at = now
            care.cancel.append(planner)
        stalls = stalls_at(policy, slot.vitals, since, expected(slot.in_flight[0]) if slot.in_flight else 0.0)
        was, slot.stalled = slot.stalled, self._may_stall and stalls <= now
        self.counts["stalled"] += slot.stalled and not was
        if was and not slot.stalled:
            self._offer(planner)
        timeouts = [now + policy.interval, stalls]
        if slot.vitals.asked_at is not None:
            timeouts.append(slot.vitals.asked_at + policy.timeout)
        if slot.vitals.cancelled_at is not None:
            timeouts.append(slot.vitals.cancelled_at + policy.timeout)
        elif since is not None and policy.search_timeout is not None:
            timeouts.append(since + policy.search_timeout)
        self._look_at(min(at for at in timeouts if at > now))

    def _may_replace(self, now: float) -> bool:
        while self._replaced and self._replaced[0] <= now - self._health.timeout:
            self._replaced.popleft()
        if len(self._replaced) >= max(1, len(self.slots) // 4):
            return False
        self._replaced.append(now)
        return True

    def _look_at(self, at: float) -> None:
        self.timers_at = min(self.timers_at, at)

    # ---------------------------------------------------------------- how many there are

    def resize(self, count: int, now: float) -> None:
        """So many planners from now on, whatever the load."""
        self._scaling = ScalingPolicy(count, count)
        self._window_at = now - self._scaling.period
        self._look_at(now)

    def _scale(self, now: float) -> None:
        policy = self._scaling
        if policy is None:
            return
        if now >= self._window_at + policy.period:
            there = [slot for slot in self.slots if slot.phase in (Phase.STARTING, Phase.READY, Phase.DOWN)]
            window = Window(
                planners=len(there),
                starting=sum(slot.phase is not Phase.READY for slot in there),
                settled=self._window["settled"],
                in_time=self._window["in_time"],
                busy_seconds=self._busy,
                full_seconds=self._full,
                seconds=now - self._window_at,
                since_change=now - self._changed_at,
            )
            self._window_at, self._busy, self._full = now, 0.0, 0.0
            self._window.clear()
            wanted = autoscale(policy, window)
            if wanted != len(there):
                self._changed_at = now
            for _ in range(wanted - len(there)):
                self._add(now)
            for _ in range(len(there) - wanted):
                self._remove()
        self._look_at(self._window_at + policy.period)

    def _add(self, now: float) -> None:
        self.counts["scaled_up"] += 1
        slot = next((slot for slot in self.slots if slot.phase is Phase.PARKED), None)
        if slot is None:
            slot = Slot()
            self.slots.append(slot)
        slot.phase, slot.restart_at, slot.failures = Phase.DOWN, now, 0

    def _remove(self) -> None:
        ready = [planner for planner, slot in enumerate(self.slots) if slot.phase is Phase.READY]
        if not ready:
            return
        self.counts["scaled_down"] += 1
        planner = min(ready, key=lambda planner: (len(self.slots[planner].in_flight), -planner))
        self.slots[planner].phase = Phase.LEAVING
        if not self.slots[planner].in_flight:
            self._leaving.append(planner)
