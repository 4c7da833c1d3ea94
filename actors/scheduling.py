"""What is searched when, and what is shed: decisions of the planner pool, without Ray, threads or a clock.

Invariants:

* a request is in exactly one place: waiting, in flight at one planner, or out (answered, shed, stranded, lost);
* in order (``shed=False``, virtual clock): batches are sent as they were submitted, oldest first, and wait as long as
  they must;
* ranked (``shed=True``, wall clock): each request waits by itself, and a planner that has room gets as many as fit into
  one search (:mod:`actors.ranking`, :mod:`actors.microbatch`). A request that cannot be back before it expires is shed,
  and so is what the waiting room cannot hold. Once in a while one that looks too late is sent all the same, since the
  estimate may be wrong and only answers correct it;
* a request waits only while a planner is ready or is about to start for the first time; else it is stranded at once;
* what planners do is up to :mod:`actors.fleet`: their deaths, restarts, stalls, replacements, and how many there are.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from actors.autoscaling import ScalingPolicy
from actors.fleet import DEFAULT_RESTART, Batch, Failure, Fleet, Phase, RestartPolicy, Slot
from actors.health import DEFAULT_HEALTH, HealthPolicy
from actors.microbatch import Grant, as_asked, fill, hopeless, in_excess
from actors.ranking import Ask, FairShare, Turn
from actors.service_time import ServiceTime

_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, in this order."""

    stop: tuple[int, ...] = ()
    """Planners to kill: replaced for their health, or no longer needed."""
    start: tuple[int, ...] = ()
    send: tuple[tuple[int, Batch], ...] = ()
    """(planner, batch)."""
    ask: tuple[int, ...] = ()
    """Planners to ask whether they live."""
    cancel: tuple[int, ...] = ()
    """Planners whose running search is to end."""
    shed: tuple[int, ...] = ()
    """Requests to report as dropped: all planners are busy, or the plan would be too late."""
    stranded: tuple[int, ...] = ()
    """Requests to report as lost: there is no planner."""
    lost: tuple[int, ...] = ()
    """Requests to report as lost: their planner is replaced."""


NOT_SOON = 3600.0
"""Seconds until a plan could be back while no planner works."""
_MARGIN_STEP, _MARGIN_BOUND = 2e-4, 0.1


class PoolState:
    """The pool as its dispatcher sees it. One thread owns it; time is passed in and never runs backwards."""

    def __init__(
        self,
        count: int,
        max_in_flight: int,
        *,
        max_batch: int = 128,
        max_waiting: int | None = None,
        min_simulations: int = 16,
        probe_interval: float = 0.5,
        shed: bool = True,
        restart: RestartPolicy = DEFAULT_RESTART,
        health: HealthPolicy = DEFAULT_HEALTH,
        scaling: ScalingPolicy | None = None,
    ) -> None:
        """
        Args:
            count: planners at first.
            max_in_flight: batches sent to one planner and not yet answered.
            max_batch: requests of one search, where they are merged.
            max_waiting: requests that wait; None: a batch for every sound planner, and one at least.
            min_simulations: no budget is cut below this.
            probe_interval: seconds without a search after which a request is sent that looks too late.
            shed: rank, merge, shrink and shed; False: batches as submitted, in order.
            restart: when dead planners are started again.
            health: when a planner is asked, and replaced.
            scaling: how many planners there should be; None: always ``count``. Only where requests are shed.
        """
        self.shed, self.max_batch = shed, max_batch
        self.counts: Counter[str] = Counter()
        self.service = ServiceTime()
        self.fleet = Fleet(
            count,
            max_in_flight,
            self.counts,
            may_stall=shed,
            restart=restart,
            health=health,
            scaling=scaling if shed else None,
        )
        self._bound, self._least, self._probe_interval = max_waiting, min_simulations, probe_interval
        self._share = FairShare()
        self._waiting: dict[int, Ask] = {}
        self._groups: deque[tuple[Ask, ...]] = deque()
        self._batches = 0
        self._sent_at = -_NEVER
        self._margin = 0.0
        """Seconds that requests need until they are seen here, as far as one can tell: more whenever some came too late
        to be sent, less with every answer."""
        self._decided_at = 0.0
        self._promised: float | None = None
        """When this state said that it wants to be asked again."""

    @property
    def slots(self) -> list[Slot]:
        return self.fleet.slots

    # ---------------------------------------------------------------- news

    def arrived(self, asks: Sequence[Ask]) -> None:
        """New requests; in order, they are one batch."""
        if self.shed:
            self._waiting.update((ask.ticket, ask) for ask in asks)
        elif asks:
            self._groups.append(tuple(asks))

    def ready(self, planner: int, incarnation: int, now: float) -> bool:
        """A planner has started. Whether that is news of its present incarnation."""
        return self.fleet.ready(planner, incarnation, now)

    def heard(self, planner: int, incarnation: int, now: float) -> None:
        """A planner has said that it lives."""
        self.fleet.heard(planner, incarnation, now)

    def answered(
        self, planner: int, incarnation: int, number: int, now: float, spent: tuple[int, int] | None = None
    ) -> Batch | None:
        """Plans came back.

        Args:
            planner: who answers.
            incarnation: of it.
            number: of the batch.
            now: seconds.
            spent: largest budget and sum of the budgets that were really spent; None: those that were granted.

        Returns:
            The batch; None if nobody asks for it any more.
        """
        finished = self.fleet.finished(planner, incarnation, number, now)
        if finished is None:
            return None
        batch, seconds, was_warm = finished
        self.slots[planner].failures = 0
        if was_warm:
            self.service.observe(*(spent or (batch.steps, batch.work)), seconds)
        self._margin *= 0.9
        in_time = sum(grant.ask.deadline is None or now <= grant.ask.deadline for grant in batch.grants)
        self.fleet.settled(len(batch.grants), in_time)
        self.counts["late"] += len(batch.grants) - in_time
        return batch

    def failed(
        self, planner: int, incarnation: int, failure: Failure, now: float, number: int | None = None
    ) -> tuple[int, ...]:
        """Something went wrong, with one batch or with the planner itself. The requests that are lost by it."""
        if failure.is_fatal:
            return self.fleet.die(planner, incarnation, now)
        finished = None if number is None else self.fleet.finished(planner, incarnation, number, now)
        return finished[0].tickets if finished else ()

    # ---------------------------------------------------------------- decisions

    def decide(self, now: float) -> Decision:
        """What is to be done at this time; the state counts it as done."""
        if self.room() == 0:
            self.fleet.was_full(max(0.0, now - self._decided_at))
        self._decided_at = now
        overslept = 0.0 if self._promised is None else now - self._promised
        care = self.fleet.look_after(now, overslept, lambda batch: self.service.mean(batch.steps, batch.work))
        stranded = () if self.fleet.worth_waiting() else self._clear()
        shed: list[int] = []
        send = self._send_ranked(now, shed) if self.shed else self._send_in_order(now)
        self._promised = self.wake_at()
        return Decision(
            stop=tuple(care.stop),
            start=tuple(care.start),
            send=tuple(send),
            ask=tuple(care.ask),
            cancel=tuple(care.cancel),
            shed=tuple(shed),
            stranded=stranded,
            lost=tuple(care.lost),
        )

    def wake_at(self) -> float | None:
        """When there will be something to decide without any news."""
        expiry = min((ask.expires for ask in self._waiting.values() if ask.expires is not None), default=_NEVER)
        wake_at = min(self.fleet.timers_at, expiry)
        return None if wake_at == _NEVER else wake_at

    def room(self) -> int | None:
        """How many requests would be taken now without dropping others; None: any number."""
        if not self.shed:
            return None
        if not self.fleet.worth_waiting():
            return 0
        sound = [slot for slot in self.slots if slot.is_sound]
        free = len(sound) * self.fleet.max_in_flight - sum(len(slot.in_flight) for slot in sound)
        return max(0, free * self.max_batch + self._waiting_room(len(sound)) - len(self._waiting))

    def soonest(self, now: float) -> float:
        """Seconds in which the smallest search would be back that is handed over now, behind what is waiting and in
        flight; 0: not known yet."""
        if not self.service.answers:
            return 0.0
        sound = [planner for planner, slot in enumerate(self.slots) if slot.is_sound]
        if not sound:
            return NOT_SOON
        free = min(self._free_at(planner, now) + self._overdue(planner, now) for planner in sound) - now
        work = sum(ask.simulations * ask.hypotheses for ask in self._waiting.values())
        search = self.service.estimate(self._least, self._least)
        return free + self.service.mean(0, work) / len(sound) + search + self._margin

    @property
    def waiting(self) -> list[int]:
        """Requests that were not sent."""
        return [*self._waiting, *(ask.ticket for group in self._groups for ask in group)]

    def count(self, phase: Phase) -> int:
        return sum(slot.phase is phase for slot in self.slots)

    # ---------------------------------------------------------------- sending

    def _send_in_order(self, now: float) -> list[tuple[int, Batch]]:
        send = []
        while self._groups and (planner := self.fleet.least_loaded()) is not None:
            send.append(self._send(planner, as_asked(self._groups.popleft()), now))
        return send

    def _send_ranked(self, now: float, shed: list[int]) -> list[tuple[int, Batch]]:
        send: list[tuple[int, Batch]] = []
        late = [ask for ask in self._waiting.values() if hopeless(ask, now, self.service, self._least)]
        if late:
            send += self._probe(late, now)
            self._shed([ask for ask in late if ask.ticket in self._waiting], shed)
            self._margin = min(max(_MARGIN_STEP, 1.5 * self._margin), _MARGIN_BOUND)
        order: list[Turn] = []
        while self._waiting and (planner := self.fleet.least_loaded()) is not None:
            order = order or self._share.order(self._waiting.values())
            turns, grants = fill(order, self._free_at(planner, now), self.service, self.max_batch, self._least)
            if not turns:
                break  # whoever comes next is free even later
            self._share.serve(turns)
            for turn in turns:
                del self._waiting[turn.ask.ticket]
            order = [turn for turn in order if turn.ask.ticket in self._waiting]
            send.append(self._send(planner, grants, now))
        bound = self._waiting_room(sum(slot.is_sound for slot in self.slots))
        if len(self._waiting) > bound:
            self._shed(in_excess(order or self._share.order(self._waiting.values()), bound, now), shed)
        return send

    def _probe(self, late: Sequence[Ask], now: float) -> list[tuple[int, Batch]]:
        """One request that looks too late, if nothing has been sent for long: were the estimate wrong and everything
        shed because of it, no answer would ever correct it."""
        if now < self._sent_at + self._probe_interval:
            return []
        alive = [ask for ask in late if ask.expires is None or ask.expires > now]
        planner = self.fleet.least_loaded() if alive else None
        if planner is None:
            return []
        turns = self._share.order(alive)[:1]
        self._share.serve(turns)
        ask = self._waiting.pop(turns[0].ask.ticket)
        self.counts["probes"] += 1
        # Without a deadline: a search that is cut off would say little of how long one takes.
        return [self._send(planner, (Grant(ask, min(self._least, ask.simulations), None),), now)]

    def _send(self, planner: int, grants: tuple[Grant, ...], now: float) -> tuple[int, Batch]:
        batch = Batch(self._batches, grants, now)
        self._batches += 1
        self._sent_at = now
        self.fleet.send(planner, batch)
        self.counts["batches"] += 1
        self.counts["batched"] += len(grants)
        self.counts["shrunk"] += sum(grant.is_shrunk for grant in grants)
        return planner, batch

    def _free_at(self, planner: int, now: float) -> float:
        """When a planner will have done what it has, as far as one can tell."""
        slot = self.slots[planner]
        since = slot.searching_since
        if since is None:
            return now
        first, *others = (self.service.mean(batch.steps, batch.work) for batch in slot.in_flight)
        return max(now, since + first) + sum(others)

    def _overdue(self, planner: int, now: float) -> float:
        """A search that has taken longer than expected may take as much longer again."""
        slot = self.slots[planner]
        if slot.searching_since is None:
            return 0.0
        first = slot.in_flight[0]
        return max(0.0, now - slot.searching_since - self.service.mean(first.steps, first.work))

    def _shed(self, asks: Sequence[Ask], shed: list[int]) -> None:
        """Oldest first."""
        tickets = sorted(ask.ticket for ask in asks)
        for ticket in tickets:
            del self._waiting[ticket]
        self.fleet.settled(len(tickets), 0)
        shed += tickets

    def _clear(self) -> tuple[int, ...]:
        stranded = tuple(self.waiting)
        self._waiting.clear()
        self._groups.clear()
        return stranded

    def _waiting_room(self, sound: int) -> int:
        return self.max_batch * max(1, sound) if self._bound is None else self._bound
