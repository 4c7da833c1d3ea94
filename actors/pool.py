"""Planners as the engine sees them: actors behind a dispatcher thread and a mailbox.

Invariants:

* the caller's thread only puts into one queue (``submit``) and takes from another (``poll``, ``wait``): it makes no Ray
  call and takes no lock that it could wait on; ``wait`` alone blocks, and on the mailbox only;
* everything else happens in the dispatcher thread, which owns all state and blocks on its inbox only. Ray's completion
  callbacks put news into the inbox and do nothing else;
* every request comes back exactly once, as plans or as lost: shed, stranded, refused by its planner, lost with it, or
  handed in when the pool is closed or broken;
* batches are those of :func:`crsm.planners.split_batch`, searched one by one: the bits of planners in threads;
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.planner import AS_TRAINED, CONCURRENCY_GROUPS, PlannerActor, PlannerInfo, PlannerSettings
from actors.scheduling import DEFAULT_RESTART, Failure, Phase, PoolState, RestartPolicy
from actors.weights import share
from crsm.config import PlannersConfig
from crsm.model import Checkpoint
from crsm.planners import Arrivals, split_batch
from crsm.types import Plan, PlanRequest

logger = logging.getLogger(__name__)

KILL_TIMEOUT = 10.0
"""Seconds that ``close`` waits for planners to be gone."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The pool's counters and what its planners are doing: one consistent view, a moment old at most."""

    planners: dict[str, int] = field(default_factory=dict)
    """Planners by phase."""
    pids: tuple[int, ...] = ()
    """Processes of the planners that are ready."""
    versions: tuple[int, ...] = ()
    """Versions of their weights."""
    in_flight: int = 0
    """Batches sent and not answered."""
    waiting: int = 0
    """Batches not sent."""
    requests: int = 0
    plans: int = 0
    shed: int = 0
    """Requests dropped since all planners were busy."""
    stranded: int = 0
    """Requests dropped since there was no planner."""
    lost_with_planner: int = 0
    """Requests whose planner died or could not be reached."""
    refused: int = 0
    """Requests whose deliberation failed; the planner is well."""
    undelivered: int = 0
    """Requests or plans that Ray lost under way."""
    deaths: int = 0
    restarts: int = 0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class _Submitted:
    requests: tuple[PlanRequest, ...]


@dataclass(frozen=True, slots=True)
class _Answered:
    planner: int
    incarnation: int
    batch: int
    result: Future[list[Plan]]


@dataclass(frozen=True, slots=True)
class _Ponged:
    planner: int
    incarnation: int
    result: Future[PlannerInfo]


@dataclass(frozen=True, slots=True)
class _Updated:
    planner: int
    incarnation: int
    result: Future[int]


@dataclass(frozen=True, slots=True)
class _Gone:
    planner: int
    incarnation: int
    result: Future[None]


@dataclass(frozen=True, slots=True)
class _NewWeights:
    source: Any


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_News = _Submitted | _Answered | _Ponged | _Updated | _Gone | _NewWeights | _Close


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
        num_cpus: float = 1.0,
        planner_class: type = PlannerActor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the planners and returns at once; requests wait for the first of them.

        Args:
            checkpoint: put into the object store once; or a folder that every node can read; or a reference to
                :class:`~actors.weights.Weights` that are there already.
            config: how many planners, their threads, the size of a search batch and what may be in flight.
            settings: how they deliberate.
            shed: drop the oldest requests when all planners are busy; False for the virtual clock, which waits.
            restart: when dead planners are started again.
            num_cpus: CPUs that Ray reserves for each.
            planner_class: what each actor is.
            clock: seconds; the clock of the requests' deadlines.
        """
        self._config, self._settings, self._clock = config, settings, clock
        self._state = PoolState(config.count, config.max_in_flight, shed=shed, restart=restart)
        self._source = share(checkpoint)
        self._actor_class = ray.remote(
            concurrency_groups=CONCURRENCY_GROUPS,
            num_cpus=num_cpus,
            num_gpus=config.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(planner_class)
        self._actors: dict[int, _Incarnation] = {}
        self._batches: dict[int, list[PlanRequest]] = {}
        """Batches that are waiting or in flight."""
        self._batch_ids = itertools.count()
        self._counts: Counter[str] = Counter()
        self._last_error = ""
        self._broken = False
        self._inbox: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._mailbox: queue.SimpleQueue[Arrivals] = queue.SimpleQueue()
        self._finished = False
        self._stats = PoolStats(planners={Phase.STARTING.value: config.count} if config.count else {})
        self._thread = threading.Thread(target=self._run, name="planner-pool", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the engine's side

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self._inbox.put(_Submitted(tuple(requests)))
        if self._finished:
            self._hand_in()

    def room(self) -> int | None:
        return None

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
        self._inbox.put(_Close())
        self._thread.join()

    # ---------------------------------------------------------------- the operator's side

    def stats(self) -> PoolStats:
        """Counters and planners, as of the dispatcher's last turn. Never blocks."""
        return self._stats

    def update_weights(self, checkpoint: Checkpoint | str | Path | ray.ObjectRef) -> None:
        """Sends new weights to every planner. A request submitted after this is planned with them."""
        self._inbox.put(_NewWeights(share(checkpoint)))

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
                self._lose(list(self._batches), "stranded")
        try:
            self._stop_planners()
        finally:
            self._lose(list(self._batches), "stranded")
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
                if isinstance(news, _Close):
                    return True
                self._handle(news)
                news = self._inbox.get_nowait()
        except queue.Empty:
            return False

    def _handle(self, news: _News) -> None:
        if self._broken and not isinstance(news, _Submitted):
            return
        match news:
            case _Submitted(requests):
                self._counts["requests"] += len(requests)
                for batch in split_batch(requests, self._config.max_batch):
                    number = next(self._batch_ids)
                    self._batches[number] = batch
                    self._state.arrived(number)
                if self._broken:
                    self._lose(list(self._batches), "stranded")
            case _Answered():
                self._answered(news)
            case _Ponged(planner, incarnation, result):
                self._ponged(planner, incarnation, result)
            case _Updated(planner, incarnation, result):
                if (error := result.exception()) is not None:
                    self._failed(planner, incarnation, error, classify(error))
                elif self._state.slots[planner].incarnation == incarnation and (actor := self._actors.get(planner)):
                    actor.version = result.result()
            case _Gone(planner, incarnation, result):
                self._failed(planner, incarnation, result.exception() or ActorDiedError(), Failure.ACTOR_DIED)
            case _NewWeights(source):
                self._source = source
                for planner, slot in enumerate(self._state.slots):
                    if slot.phase is Phase.READY:
                        self._bring_up_to_date(planner)

    def _answered(self, news: _Answered) -> None:
        error = news.result.exception()
        if error is not None:
            self._failed(news.planner, news.incarnation, error, classify(error), news.batch)
        elif self._state.answered(news.planner, news.incarnation, news.batch):
            plans, requests = news.result.result(), self._batches.pop(news.batch)
            known = {plan.request_id for plan in plans}
            unanswered = [request for request in requests if request.request_id not in known]
            self._counts["plans"] += len(plans)
            self._counts["undelivered"] += len(unanswered)
            self._mailbox.put(Arrivals(plans, lost=unanswered))

    def _ponged(self, planner: int, incarnation: int, result: Future[PlannerInfo]) -> None:
        if (error := result.exception()) is not None:
            self._failed(planner, incarnation, error, Failure.ACTOR_DIED)
        elif self._state.ready(planner, incarnation):
            actor = self._actors[planner]
            actor.info = result.result()
            actor.version = actor.info.model_version
            self._bring_up_to_date(planner)

    def _failed(
        self, planner: int, incarnation: int, error: BaseException, failure: Failure, batch: int | None = None
    ) -> None:
        """An actor call came back with an error."""
        slot = self._state.slots[planner]
        alive = slot.incarnation == incarnation and slot.phase in (Phase.STARTING, Phase.READY)
        lost = self._state.failed(planner, incarnation, failure, self._clock(), batch)
        if not alive:
            return
        self._last_error = f"planner-{planner}: {_describe(error)}"
        logger.warning("%s", self._last_error)
        counters = {Failure.PLANNER_ERROR: "refused", Failure.RESULT_LOST: "undelivered"}
        self._lose(lost, counters.get(failure, "lost_with_planner"))
        if failure.is_fatal:
            self._counts["deaths"] += 1
            self._kill(self._actors.pop(planner).handle)

    def _decide(self) -> None:
        if not self._broken:
            decision = self._state.decide(self._clock())
            for planner in decision.start:
                self._start(planner)
            for planner, batch in decision.send:
                self._send(planner, batch)
            self._lose(decision.shed, "shed")
            self._lose(decision.stranded, "stranded")
        self._publish()

    # ---------------------------------------------------------------- calls to actors

    def _start(self, planner: int) -> None:
        incarnation = self._state.slots[planner].incarnation
        handle = self._actor_class.remote(self._source, self._settings, f"planner-{planner}", self._config.threads)
        self._actors[planner] = _Incarnation(handle, self._source)
        if incarnation > 1:
            self._counts["restarts"] += 1
        self._follow(handle.watch.remote(), lambda result: _Gone(planner, incarnation, result))
        self._follow(handle.ping.remote(self._clock()), lambda result: _Ponged(planner, incarnation, result))

    def _send(self, planner: int, batch: int) -> None:
        incarnation = self._state.slots[planner].incarnation
        try:
            answer = self._actors[planner].handle.plan.remote(self._batches[batch], self._clock())
        except RayError as error:  # the object store is full, or the planner is known to be dead
            self._failed(planner, incarnation, error, classify(error), batch)
        else:
            self._follow(answer, lambda result: _Answered(planner, incarnation, batch, result))

    def _bring_up_to_date(self, planner: int) -> None:
        """New weights queue up behind the batches that the planner already has, and before all later ones."""
        actor, incarnation = self._actors[planner], self._state.slots[planner].incarnation
        if actor.source is not self._source:
            actor.source = self._source
            updated = actor.handle.update_weights.remote(self._source)
            self._follow(updated, lambda result: _Updated(planner, incarnation, result))

    def _follow(self, reference: Any, as_news: Callable[[Future[Any]], _News]) -> None:
        """Has the result of a call put into the inbox."""
        reference.future().add_done_callback(lambda result: self._inbox.put(as_news(result)))

    def _kill(self, handle: Any) -> None:
        try:
            ray.kill(handle)
        except (RayError, ValueError) as error:  # gone already, or known to no cluster any more
            logger.debug("kill: %s", error)

    # ---------------------------------------------------------------- the end of requests, planners and the pool

    def _lose(self, batches: Collection[int], counter: str) -> None:
        lost = [request for batch in batches for request in self._batches.pop(batch, [])]
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
            if isinstance(news, _Submitted):
                self._mailbox.put(Arrivals(lost=list(news.requests)))

    def _stop_planners(self) -> None:
        """Kills every planner; returns when Ray and, on this node, the kernel say that they are gone."""
        if not self._actors or not ray.is_initialized():
            return
        here = ray.get_runtime_context().get_node_id()
        pids = [actor.info.pid for actor in self._actors.values() if actor.info and actor.info.node_id == here]
        for actor in self._actors.values():
            self._kill(actor.handle)
        until = time.monotonic() + KILL_TIMEOUT
        left = {(planner, self._state.slots[planner].incarnation) for planner in self._actors}
        while left and (remaining := until - time.monotonic()) > 0:
            try:
                news = self._inbox.get(timeout=remaining)
            except queue.Empty:
                break
            if isinstance(news, _Gone):
                left.discard((news.planner, news.incarnation))
            elif isinstance(news, _Submitted):
                self._mailbox.put(Arrivals(lost=list(news.requests)))
        while any(map(_is_running, pids)) and time.monotonic() < until:
            time.sleep(0.005)
        self._actors.clear()

    def _publish(self) -> None:
        phases = Counter(slot.phase.value for slot in self._state.slots)
        if self._finished:
            phases = Counter({Phase.RETIRED.value: len(self._state.slots)})
        ready = [actor for _, actor in sorted(self._actors.items()) if actor.info is not None]
        in_flight = sum(len(slot.in_flight) for slot in self._state.slots)
        self._stats = PoolStats(
            planners=dict(phases),
            pids=tuple(actor.info.pid for actor in ready if actor.info is not None),
            versions=tuple(actor.version for actor in ready),
            in_flight=in_flight if not self._finished else 0,
            waiting=len(self._state.waiting) if not self._finished else 0,
            last_error=self._last_error,
            **self._counts,
        )


def classify(error: BaseException) -> Failure:
    """What an error of an actor call says about the planner: an error of the deliberation, of the actor, or of Ray."""
    if isinstance(error, ActorUnavailableError):
        return Failure.UNREACHABLE
    if isinstance(error, RayActorError):
        return Failure.ACTOR_DIED
    return Failure.PLANNER_ERROR if isinstance(error, RayTaskError) else Failure.RESULT_LOST


def _describe(error: BaseException) -> str:
    """One line of an error, without the remote traceback."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    shown = cause or error
    return f"{type(shown).__name__}: {(str(shown).splitlines() or [''])[0]}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
