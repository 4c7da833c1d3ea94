"""Who gets a batch, what is shed, what a failure means: decisions of the planner pool, without Ray, threads or a clock.

Invariants:

* a batch is in exactly one place: waiting, in flight at one planner, or out (answered, shed, stranded, lost);
* batches are sent oldest first, to the ready planner with the fewest in flight, never more than ``max_in_flight`` each;
* under shedding at most one batch per planner waits beyond that, and the oldest goes first: a plan for the past is
  worthless. Without shedding (virtual clock) batches wait as long as they must;
* a batch waits only while a planner is ready or is about to start for the first time; else it is stranded at once;
* a planner that died or cannot be reached costs what it had in flight, and is started again after a pause that doubles
  with every failure in a row; an error of one deliberation costs its batch and nothing else;
* news of a planner that has been replaced meanwhile (an older ``incarnation``) changes nothing.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field


class Phase(str, enum.Enum):
    """Where a planner is in its life."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    """Dead; to be started again."""
    RETIRED = "retired"
    """Dead; not started again."""


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


@dataclass(slots=True)
class Slot:
    """One planner's place in the pool; the actors that fill it, one after another, are its incarnations."""

    phase: Phase = Phase.DOWN
    incarnation: int = 0
    in_flight: list[int] = field(default_factory=list)
    """Batches, oldest first."""
    failures: int = 0
    """Deaths since it last answered."""
    restart_at: float = 0.0

    @property
    def restarts(self) -> int:
        return max(0, self.incarnation - 1)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, in this order."""

    start: tuple[int, ...] = ()
    """Planners to start."""
    send: tuple[tuple[int, int], ...] = ()
    """(planner, batch)."""
    shed: tuple[int, ...] = ()
    """Batches to report lost: all planners are busy."""
    stranded: tuple[int, ...] = ()
    """Batches to report lost: there is no planner."""


class PoolState:
    """The pool as its dispatcher sees it. One thread owns it; time is passed in."""

    def __init__(
        self, count: int, max_in_flight: int, *, shed: bool = True, restart: RestartPolicy = DEFAULT_RESTART
    ) -> None:
        """
        Args:
            count: planners.
            max_in_flight: batches sent to one planner and not yet answered.
            shed: drop the oldest batch when all are busy; False: let it wait.
            restart: when dead planners are started again.
        """
        self.slots = [Slot() for _ in range(count)]
        self.waiting: deque[int] = deque()
        self.max_in_flight, self.shed, self.restart = max_in_flight, shed, restart

    # ---------------------------------------------------------------- news

    def arrived(self, batch: int) -> None:
        """A new batch."""
        self.waiting.append(batch)

    def ready(self, planner: int, incarnation: int) -> bool:
        """A planner has started. Whether that is news of its present incarnation."""
        slot = self.slots[planner]
        if slot.incarnation != incarnation or slot.phase is not Phase.STARTING:
            return False
        slot.phase = Phase.READY
        return True

    def answered(self, planner: int, incarnation: int, batch: int) -> bool:
        """Plans came back. Whether they are still asked for."""
        slot = self.slots[planner]
        if slot.incarnation != incarnation or batch not in slot.in_flight:
            return False
        slot.in_flight.remove(batch)
        slot.failures = 0
        return True

    def failed(
        self, planner: int, incarnation: int, failure: Failure, now: float, batch: int | None = None
    ) -> tuple[int, ...]:
        """Something went wrong, with one batch or with the planner itself. The batches that are lost by it."""
        slot = self.slots[planner]
        if slot.incarnation != incarnation or slot.phase not in (Phase.STARTING, Phase.READY):
            return ()
        if not failure.is_fatal:
            if batch not in slot.in_flight:
                return ()
            slot.in_flight.remove(batch)
            return (batch,)
        lost, slot.in_flight = tuple(slot.in_flight), []
        slot.failures += 1
        bound = self.restart.max_restarts
        if bound is not None and slot.restarts >= bound:
            slot.phase = Phase.RETIRED
        else:
            slot.phase, slot.restart_at = Phase.DOWN, now + self.restart.delay(slot.failures)
        return lost

    # ---------------------------------------------------------------- decisions

    def decide(self, now: float) -> Decision:
        """What is to be done at this time; the state counts it as done."""
        start = []
        for planner, slot in enumerate(self.slots):
            if slot.phase is Phase.DOWN and slot.restart_at <= now:
                slot.phase, slot.incarnation = Phase.STARTING, slot.incarnation + 1
                start.append(planner)
        send = []
        while self.waiting and (chosen := self._least_loaded()) is not None:
            batch = self.waiting.popleft()
            self.slots[chosen].in_flight.append(batch)
            send.append((chosen, batch))
        shed: list[int] = []
        stranded: list[int] = []
        if not self._worth_waiting():
            stranded = list(self.waiting)
            self.waiting.clear()
        while self.shed and len(self.waiting) > len(self.slots):
            shed.append(self.waiting.popleft())
        return Decision(tuple(start), tuple(send), tuple(shed), tuple(stranded))

    def wake_at(self) -> float | None:
        """When there will be something to decide without any news."""
        return min((slot.restart_at for slot in self.slots if slot.phase is Phase.DOWN), default=None)

    def count(self, phase: Phase) -> int:
        return sum(slot.phase is phase for slot in self.slots)

    def _least_loaded(self) -> int | None:
        free = [
            (len(slot.in_flight), planner)
            for planner, slot in enumerate(self.slots)
            if slot.phase is Phase.READY and len(slot.in_flight) < self.max_in_flight
        ]
        return min(free)[1] if free else None

    def _worth_waiting(self) -> bool:
        return any(
            slot.phase is Phase.READY or (slot.phase is Phase.STARTING and slot.incarnation == 1) for slot in self.slots
        )
