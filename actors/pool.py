"""Planners as the engine sees them: actors behind a dispatcher thread and a mailbox.

Invariants:

* the caller's thread only puts into one queue (``submit``) and takes from another (``poll``, ``wait``): it makes no Ray
  call and takes no lock that it could wait on; ``wait`` alone blocks, and on the mailbox only;
* everything else happens in the dispatcher thread, which owns all state and blocks on its inbox only. Ray's completion
  callbacks put news into the inbox and do nothing else;
* every request comes back exactly once, as plans or as lost: shed, stranded, refused by its planner, lost with it, or
  handed in when the pool is closed or broken;
* without shedding (virtual clock) batches are those of :func:`crsm.planners.split_batch`, searched one by one: the bits
  of planners in threads. With it (wall clock) requests that wait are merged into one search, which is one Ray call with
  one argument for them all: calls are what a pool costs its own process;
* what is sent, shed, asked and replaced is decided by :mod:`actors.scheduling`; this module only does it;
* planners are started, watched and replaced by the pool, not by Ray, so that a replacement has the newest weights;
* ``close`` kills every planner, also in mid-search, and returns when their processes are gone.

Requests and plans are arguments and results of actor calls: Ray keeps those above 100 KB in the object store, where
planners of one node read them without a copy, and sends smaller ones along with the call, which is quicker.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from actors.autoscaling import ScalingPolicy
from actors.devices import planner_device
from actors.fleet import DEFAULT_RESTART, Batch, Failure, Phase, RestartPolicy
from actors.health import HealthPolicy
from actors.microbatch import Grant
from actors.news import (
    Answered,
    Close,
    Gone,
    News,
    NewWeights,
    Ponged,
    Resize,
    Submitted,
    Updated,
    classify,
    describe,
)
from actors.planner import AS_TRAINED, CONCURRENCY_GROUPS, PlannerActor, PlannerInfo, PlannerSettings
from actors.pool_stats import PoolStats
from actors.ranking import Ask
from actors.scheduling import PoolState
from actors.weights import share
from crsm.config import PlannersConfig
from crsm.model import Checkpoint
from crsm.planners import Arrivals, split_batch
from crsm.types import PlanRequest

logger = logging.getLogger(__name__)

KILL_TIMEOUT = 10.0
"""Seconds that ``close`` waits for planners to be gone."""


@dataclass(slots=True)
class _Incarnation:
    """The actor that fills a slot now."""

    handle: Any
    source: Any
    """The weights that it was last sent."""
    info: PlannerInfo | None = None
    """Known once it is ready."""
    version: int = 0
    """Of its weights."""


class PlannerPool:
    """A pool of planner actors; implements :class:`crsm.planners.Planners`. Ray must be initialised."""

    def __init__(
        self,
        checkpoint: Checkpoint | str | Path | ray.ObjectRef,
        config: PlannersConfig = PlannersConfig(),
        settings: PlannerSettings = AS_TRAINED,
        *,
        shed: bool,
        restart: RestartPolicy = DEFAULT_RESTART,
        scaling: ScalingPolicy | None = None,
        num_cpus: float | None = None,
        planner_class: type = PlannerActor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the planners and returns at once; requests wait for the first of them.

        Args:
            checkpoint: put into the object store once; or a folder that every node can read; or a reference to
                :class:`~actors.weights.Weights` that are there already.
            config: how many planners, their threads, the size of a search batch and what may be in flight.
            settings: how they deliberate.
            shed: rank, merge, shrink and drop requests so that plans are in time; False for the virtual clock, which
                waits.
            restart: when dead planners are started again.
            scaling: how many planners there should be; None: what the settings say.
            num_cpus: CPUs that Ray reserves for each; None: what the settings say.
            planner_class: what each actor is.
            clock: seconds; the clock of the requests' deadlines.

        Raises:
            ValueError: a GPU is asked for and none is reserved, or the cluster has fewer than are reserved.
        """
        self._config, self._clock = config, clock
        self._settings = replace(settings, device=planner_device(config))
        self._state = PoolState(
            config.count,
            config.max_in_flight,
            max_batch=config.max_batch,
            max_waiting=config.max_waiting,
            min_simulations=config.min_simulations,
            probe_interval=config.probe_interval,
            shed=shed,
            restart=restart,
            # Under the virtual clock a search may take as long as it does: time must not change what is said.
            health=HealthPolicy(config.health_interval, config.health_timeout, config.search_timeout if shed else None),
            scaling=scaling or scaling_of(config),
        )
        self._source = share(checkpoint)
        self._actor_class = ray.remote(
            concurrency_groups=CONCURRENCY_GROUPS,
            num_cpus=config.num_cpus if num_cpus is None else num_cpus,
            num_gpus=config.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(planner_class)
        self._actors: dict[int, _Incarnation] = {}
        self._requests: dict[int, PlanRequest] = {}
        """Requests that are waiting or in flight, by ticket."""
        self._tickets = itertools.count()
        self._counts: Counter[str] = Counter()
        self._submitted = 0
        """Requests handed in; counted by the caller's thread, which alone writes it."""
        self._room: tuple[int | None, int] = self._state.room(), 0
        """The state's room, and how many requests it had taken then."""
        self._soonest = 0.0
        self._typical = 0, 0
        """Steps and work of the last search."""
        self._last_error = ""
        self._broken = False
        self._inbox: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._mailbox: queue.SimpleQueue[Arrivals] = queue.SimpleQueue()
        self._finished = False
        self._stats = PoolStats(planners={Phase.STARTING.value: config.count} if config.count else {})
        self._thread = threading.Thread(target=self._run, name="planner-pool", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the engine's side

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self._submitted += len(requests)
        self._inbox.put(Submitted(tuple(requests)))
        if self._finished:
            self._hand_in()

    def room(self) -> int | None:
        room, taken = self._room
        # What is still in the inbox has been promised a place already.
        return None if room is None else max(0, room - (self._submitted - taken))

    def soonest(self) -> float:
        return self._soonest

    def poll(self) -> Arrivals:
        found = Arrivals()
        while True:
            try:
                found.add(self._mailbox.get_nowait())
            except queue.Empty:
                return found

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        missing = set(request_ids)
        found = Arrivals()
        while missing:
            arrived = self._mailbox.get()
            found.add(arrived)
            missing -= arrived.request_ids
        return found

    def take(self, timeout: float) -> Arrivals:
        """What comes back next; nothing, if nothing does within ``timeout`` seconds."""
        try:
            found = self._mailbox.get(timeout=timeout)
        except queue.Empty:
            return Arrivals()
        found.add(self.poll())
        return found

    def close(self) -> None:
        self._inbox.put(Close())
        self._thread.join()

    # ---------------------------------------------------------------- the operator's side

    def stats(self) -> PoolStats:
        """Counters and planners, as of the dispatcher's last turn. Never blocks."""
        return self._stats

    def update_weights(self, checkpoint: Checkpoint | str | Path | ray.ObjectRef) -> None:
        """Sends new weights to every planner. A request submitted after this is planned with them."""
        self._inbox.put(NewWeights(share(checkpoint)))

    def resize(self, count: int) -> None:
        """So many planners from now on; those that are too many finish what they have.

        Raises:
            ValueError: under the virtual clock, whose batches must not depend on who is there.
        """
        if not self._state.shed:
            raise ValueError("the number of planners is fixed under the virtual clock; allowed: the wall clock")
        self._inbox.put(Resize(count))

    def wait_until_ready(self, timeout: float = 60.0) -> int:
        """Waits until no planner is about to start; returns how many are ready."""
        until = time.monotonic() + timeout
        while (planners := self._stats.planners).get(Phase.READY.value, 0) < self._config.count:
            waiting = planners.get(Phase.STARTING.value, 0) + planners.get(Phase.DOWN.value, 0)
            if not waiting or time.monotonic() > until:
                break
            time.sleep(0.01)
        return planners.get(Phase.READY.value, 0)

    # ---------------------------------------------------------------- the dispatcher

    def _run(self) -> None:
        closing = False
        while not closing:
            try:
                self._decide()
                closing = self._take_news()
            except Exception as error:
                # A bug must not leave the engine waiting: the pool says so, and every request is lost from now on.
                logger.exception("the planner pool is broken; generation goes on without it")
                self._broken, self._last_error = True, f"{type(error).__name__}: {error}"
                self._lose(list(self._requests), "stranded")
                self._publish()
        try:
            self._stop_planners()
        finally:
            self._lose(list(self._requests), "stranded")
            self._finished = True
            self._hand_in()
            self._publish()

    def _take_news(self) -> bool:
        """Waits for news and handles all there is; whether the pool is to close."""
        wake_at = None if self._broken else self._state.wake_at()
        timeout = None if wake_at is None else max(0.0, wake_at - self._clock())
        try:
            news = self._inbox.get(timeout=timeout)
            while True:
                if isinstance(news, Close):
                    return True
                self._handle(news)
                news = self._inbox.get_nowait()
        except queue.Empty:
            return False

    def _handle(self, news: News) -> None:
        if self._broken and not isinstance(news, Submitted):
            return
        match news:
            case Submitted(requests):
                self._counts["requests"] += len(requests)
                for group in [requests] if self._state.shed else split_batch(requests, self._config.max_batch):
                    asks = self._admit(group)
                    if self._broken:
                        self._lose([ask.ticket for ask in asks], "stranded")
                    else:
                        self._state.arrived(asks)
            case Answered():
                self._answered(news)
            case Ponged(planner, incarnation, result):
                self._ponged(planner, incarnation, result)
            case Updated(planner, incarnation, result):
                if (error := result.exception()) is not None:
                    self._failed(planner, incarnation, error, classify(error))
                elif self._state.slots[planner].incarnation == incarnation and (actor := self._actors.get(planner)):
                    actor.version = result.result()
            case Gone(planner, incarnation, result):
                self._failed(planner, incarnation, result.exception() or ActorDiedError(), Failure.ACTOR_DIED)
            case Resize(count):
                self._state.fleet.resize(count, self._clock())
            case NewWeights(source):
                self._source = source
                for planner, slot in enumerate(self._state.slots):
                    if slot.phase is Phase.READY:
                        self._bring_up_to_date(planner)

    def _admit(self, requests: Sequence[PlanRequest]) -> list[Ask]:
        """Keeps the requests under tickets of this pool; what the scheduling has to know of them."""
        asks = []
        for request in requests:
            ticket = next(self._tickets)
            self._requests[ticket] = request
            asks.append(
                Ask(
                    ticket,
                    request.generation_id,
                    request.value,
                    request.simulations,
                    request.hypotheses,
                    request.deadline,
                    request.expires,
                )
            )
        return asks

    def _answered(self, news: Answered) -> None:
        if (error := news.result.exception()) is not None:
            self._failed(news.planner, news.incarnation, error, classify(error), news.batch)
            return
        plans = news.result.result()
        spent = [plan.simulations for plan in plans]
        self._typical = typical = max(spent, default=0), sum(spent)
        now = self._clock()
        batch = self._state.answered(news.planner, news.incarnation, news.batch, now, typical if spent else None)
        if batch is None:
            return
        known = {plan.request_id for plan in plans}
        requests = [self._requests.pop(ticket) for ticket in batch.tickets]
        unanswered = [request for request in requests if request.request_id not in known]
        self._counts["plans"] += len(plans)
        self._counts["undelivered"] += len(unanswered)
        self._counts["received_bytes"] += sum(plan.num_bytes for plan in plans)
        self._mailbox.put(Arrivals(plans, lost=unanswered))

    def _ponged(self, planner: int, incarnation: int, result: Future[PlannerInfo]) -> None:
        """A planner has started, or says that it lives."""
        starting = self._state.slots[planner].phase is Phase.STARTING
        if (error := result.exception()) is not None:
            self._failed(planner, incarnation, error, Failure.ACTOR_DIED if starting else classify(error))
        elif self._state.ready(planner, incarnation, self._clock()):
            actor = self._actors[planner]
            actor.info = result.result()
            actor.version = actor.info.model_version
            self._bring_up_to_date(planner)
        else:
            self._state.heard(planner, incarnation, self._clock())

    def _failed(
        self, planner: int, incarnation: int, error: BaseException, failure: Failure, batch: int | None = None
    ) -> None:
        """An actor call came back with an error."""
        slot = self._state.slots[planner]
        alive = slot.incarnation == incarnation and slot.phase in (Phase.STARTING, Phase.READY, Phase.LEAVING)
        lost = self._state.failed(planner, incarnation, failure, self._clock(), batch)
        if not alive:
            return
        self._complain(planner, describe(error))
        counters = {Failure.PLANNER_ERROR: "refused", Failure.RESULT_LOST: "undelivered"}
        self._lose(lost, counters.get(failure, "lost_with_planner"))
        if failure.is_fatal:
            self._counts["deaths"] += 1
            self._kill(self._actors.pop(planner))

    def _complain(self, planner: int, what: str) -> None:
        self._last_error = f"planner-{planner}: {what}"
        logger.warning("%s", self._last_error)

    def _decide(self) -> None:
        if not self._broken:
            decision = self._state.decide(self._clock())
            self._lose(decision.lost, "lost_with_planner")
            for planner in decision.stop:
                if self._state.slots[planner].phase is not Phase.PARKED:
                    self._complain(planner, "no sign of life, or no end of its search: replaced")
                self._kill(self._actors.pop(planner))
            for planner in decision.start:
                self._start(planner)
            for planner, batch in decision.send:
                self._send(planner, batch)
            for planner in decision.ask:
                self._ping(planner)
            for planner in decision.cancel:
                self._counts["cancelled"] += 1
                self._actors[planner].handle.cancel.remote()
            self._lose(decision.shed, "shed")
            self._lose(decision.stranded, "stranded")
        self._publish()

    # ---------------------------------------------------------------- calls to actors

    def _start(self, planner: int) -> None:
        incarnation = self._state.slots[planner].incarnation
        handle = self._actor_class.remote(self._source, self._settings, f"planner-{planner}", self._config.threads)
        self._actors[planner] = _Incarnation(handle, self._source)
        if self._state.slots[planner].failures:
            self._counts["restarts"] += 1
        self._follow(handle.watch.remote(), lambda result: Gone(planner, incarnation, result))
        self._ping(planner)

    def _ping(self, planner: int) -> None:
        incarnation = self._state.slots[planner].incarnation
        answer = self._actors[planner].handle.ping.remote(self._clock())
        self._follow(answer, lambda result: Ponged(planner, incarnation, result))

    def _send(self, planner: int, batch: Batch) -> None:
        incarnation, number = self._state.slots[planner].incarnation, batch.number
        requests = [as_granted(self._requests[grant.ask.ticket], grant) for grant in batch.grants]
        self._counts["sent_bytes"] += sum(request.num_bytes for request in requests)
        try:
            answer = self._actors[planner].handle.plan.remote(requests, self._clock())
        except RayError as error:  # the object store is full, or the planner is known to be dead
            self._failed(planner, incarnation, error, classify(error), number)
        else:
            self._follow(answer, lambda result: Answered(planner, incarnation, number, result))

    def _bring_up_to_date(self, planner: int) -> None:
        """New weights queue up behind the batches that the planner already has, and before all later ones."""
        actor, incarnation = self._actors[planner], self._state.slots[planner].incarnation
        if actor.source is not self._source:
            actor.source = self._source
            updated = actor.handle.update_weights.remote(self._source)
            self._follow(updated, lambda result: Updated(planner, incarnation, result))

    def _follow(self, reference: Any, as_news: Callable[[Future[Any]], News]) -> None:
        """Has the result of a call put into the inbox."""
        reference.future().add_done_callback(lambda result: self._inbox.put(as_news(result)))

    def _kill(self, actor: _Incarnation) -> None:
        try:
            ray.kill(actor.handle)
        except (RayError, ValueError) as error:  # gone already, or known to no cluster any more
            logger.debug("kill: %s", error)

    # ---------------------------------------------------------------- the end of requests, planners and the pool

    def _lose(self, tickets: Collection[int], counter: str) -> None:
        lost = [self._requests.pop(ticket) for ticket in tickets if ticket in self._requests]
        if lost:
            self._counts[counter] += len(lost)
            self._mailbox.put(Arrivals(shed=lost) if counter == "shed" else Arrivals(lost=lost))

    def _hand_in(self) -> None:
        """Gives back what was submitted to a pool that has ended."""
        while True:
            try:
                news = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(news, Submitted):
                self._mailbox.put(Arrivals(lost=list(news.requests)))

    def _stop_planners(self) -> None:
        """Kills every planner; returns when Ray and, on this node, the kernel say that they are gone."""
        if not self._actors or not ray.is_initialized():
            return
        here = ray.get_runtime_context().get_node_id()
        pids = [actor.info.pid for actor in self._actors.values() if actor.info and actor.info.node_id == here]
        for actor in self._actors.values():
            self._kill(actor)
        until = time.monotonic() + KILL_TIMEOUT
        left = {(planner, self._state.slots[planner].incarnation) for planner in self._actors}
        while left and (remaining := until - time.monotonic()) > 0:
            try:
                news = self._inbox.get(timeout=remaining)
            except queue.Empty:
                break
            if isinstance(news, Gone):
                left.discard((news.planner, news.incarnation))
            elif isinstance(news, Submitted):
                self._mailbox.put(Arrivals(lost=list(news.requests)))
        while any(map(_is_running, pids)) and time.monotonic() < until:
            time.sleep(0.005)
        self._actors.clear()

    def _publish(self) -> None:
        state, ended = self._state, self._finished or self._broken
        phases = Counter(slot.phase.value for slot in state.slots)
        if self._finished:
            phases = Counter({Phase.RETIRED.value: len(state.slots)})
        ready = [actor for _, actor in sorted(self._actors.items()) if actor.info is not None]
        room = 0 if ended and state.shed else state.room()
        self._room = room, self._counts["requests"]
        self._soonest = state.soonest(self._clock()) if state.shed else 0.0
        self._stats = PoolStats(
            planners=dict(phases),
            pids=tuple(actor.info.pid for actor in ready if actor.info is not None),
            versions=tuple(actor.version for actor in ready),
            in_flight=0 if ended else sum(len(slot.in_flight) for slot in state.slots),
            waiting=0 if ended else len(state.waiting),
            stalled_now=sum(slot.stalled for slot in state.slots),
            room=room,
            search_seconds=state.service.mean(*self._typical),
            last_error=self._last_error,
            **self._counts,
            **state.counts,
        )


def scaling_of(config: PlannersConfig) -> ScalingPolicy | None:
    """When planners are added and removed by the settings; None: never."""
    if config.max_count is None:
        return None
    return ScalingPolicy(config.count, config.max_count, low=config.target_rate)


def as_granted(request: PlanRequest, grant: Grant) -> PlanRequest:
    """The request with the budget and the deadline that it is granted; itself if they are those it asks for."""
    if (request.simulations, request.deadline) == (grant.simulations, grant.deadline):
        return request
    return replace(request, simulations=grant.simulations, deadline=grant.deadline)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
