"""The planner pool in a process of its own, beside a generator whose process makes no Ray call for it.

Invariants:

* the engine's side of a :class:`RemotePool` is its mailbox: shared memory and a socket (:mod:`actors.mailbox`);
* a pool whose process dies is replaced, with the newest weights, after a pause that doubles with every death in a row;
  what it had is lost, counted, and generation goes on meanwhile. Its planners die with it: it owns them;
* the pool's process ends with the generator's: the bridge sees the socket close, and Ray ends what a dead owner owned;
* the supervisor thread sleeps but for the birth and the death of a pool.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.bridge import Bridge
from actors.link import Geometry, Link, Listener, connect
from actors.mailbox import MailboxPlanners
from actors.planner import AS_TRAINED, PlannerActor, PlannerSettings
from actors.pool import KILL_TIMEOUT, PlannerPool, PoolStats
from actors.records import Malformed
from actors.scheduling import DEFAULT_RESTART, RestartPolicy
from actors.weights import share
from crsm.config import Config, PlannersConfig
from crsm.model import Checkpoint
from crsm.planners import Arrivals
from crsm.search.sketch import SKETCH_BYTES
from crsm.types import PlanRequest
from crsm.wire import plan_shapes, request_shapes

logger = logging.getLogger(__name__)

START_TIMEOUT = 120.0
"""Seconds that a pool has to come to the meeting."""
CALL_TIMEOUT = 10.0
SEGMENT_BYTES = 2**31
"""A segment is not made larger than this, unless one search batch needs it. Pages never written take no memory."""
HYPOTHESES = 8
"""Plans of one request that a slot holds at least."""
STEADY = 30.0
"""Seconds after which a pool counts as having worked: its death is the first in a row."""


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """What a pool's process says of itself."""

    pid: int
    node_id: str


class PoolActor:
    """Owns a planner pool and the pool's side of a mailbox. A plain class: :class:`RemotePool` makes an actor of it."""

    def __init__(
        self,
        invitation: tuple[str, bytes],
        shared: Sequence[Any],
        config: PlannersConfig,
        settings: PlannerSettings,
        pool_options: dict[str, Any],
    ) -> None:
        """
        Args:
            invitation: where the generator waits.
            shared: the checkpoint as the one element of a list, inside of which a reference stays one.
            config: how many planners, and their size.
            settings: how they deliberate.
            pool_options: of :class:`~actors.pool.PlannerPool`.
        """
        self._pool = PlannerPool(shared[0], config, settings, **pool_options)
        self._closing, self._ended = threading.Event(), threading.Event()
        self._bridge: Bridge | None = None
        threading.Thread(target=self._serve, args=(invitation,), name="bridge", daemon=True).start()

    def _serve(self, invitation: tuple[str, bytes]) -> None:
        try:
            self._bridge = Bridge(connect(invitation), self._pool)
            self._bridge.run()
        except (OSError, Malformed) as error:
            logger.warning("no mailbox: %s", error)
        finally:
            self._pool.close()
            self._ended.set()
            if not self._closing.is_set():
                os._exit(1)  # the generator is gone, and with it the reason to be

    @ray.method(concurrency_group="control")
    def ping(self) -> PoolInfo:
        return PoolInfo(os.getpid(), ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group="control")
    def stats(self) -> PoolStats:
        return self._pool.stats()

    @ray.method(concurrency_group="control")
    def bridge_stats(self) -> dict[str, int]:
        return self._bridge.stats() if self._bridge else {}

    @ray.method(concurrency_group="control")
    def update_weights(self, shared: Sequence[Any]) -> None:
        """Sends new weights, the one element of a list, to every planner."""
        self._pool.update_weights(shared[0])

    @ray.method(concurrency_group="control")
    def resize(self, count: int) -> None:
        self._pool.resize(count)

    @ray.method(concurrency_group="control")
    def wait_until_ready(self, timeout: float) -> int:
        return self._pool.wait_until_ready(timeout)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Ends the bridge and the planners; returns when their processes are gone."""
        self._closing.set()
        if self._bridge:
            self._bridge.stop()
        self._pool.close()
        self._ended.wait(KILL_TIMEOUT)

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Returns when the bridge has ended; fails when the process does."""
        self._ended.wait()


class RemotePool:
    """A planner pool in another process of this node. For the engine, the mailbox; for the operator, the pool."""

    def __init__(
        self,
        checkpoint: Checkpoint | str | Path | ray.ObjectRef,
        geometry: Geometry,
        config: PlannersConfig = PlannersConfig(),
        settings: PlannerSettings = AS_TRAINED,
        *,
        shed: bool = True,
        restart: RestartPolicy = DEFAULT_RESTART,
        pool_restart: RestartPolicy = DEFAULT_RESTART,
        num_cpus: float = 1.0,
        pool_cpus: float = 0.0,
        planner_class: type = PlannerActor,
    ) -> None:
        """
        Args:
            checkpoint: the model, its folder, or what :func:`actors.weights.share` made of it.
            geometry: of the mailbox; see :func:`mailbox_geometry`.
            config: how many planners, and their size.
            settings: how they deliberate.
            shed: drop requests that find no place; False for the virtual clock, which waits.
            restart: when dead planners are started again.
            pool_restart: when a dead pool is.
            num_cpus: CPUs that Ray reserves for each planner.
            pool_cpus: and for the pool's process, which sleeps most of the time.
            planner_class: what each planner is.
        """
        self.mailbox = MailboxPlanners(config.max_batch, shed=shed)
        self._source, self._geometry, self._config, self._settings = share(checkpoint), geometry, config, settings
        self._options = {"shed": shed, "restart": restart, "num_cpus": num_cpus, "planner_class": planner_class}
        self._policy = pool_restart
        here = ray.get_runtime_context().get_node_id()
        self._actor_class = ray.remote(
            concurrency_groups={"control": 4, "watch": 1},
            num_cpus=pool_cpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )(PoolActor)
        self._count: int | None = None
        """Planners that were asked for by ``resize``."""
        self._actor: Any = None
        self._info: PoolInfo | None = None
        self._stats = PoolStats(planners={"starting": config.count} if config.count else {})
        self._last_error = ""
        self.deaths = 0
        """Pools whose process died or never came."""
        self._attached = threading.Event()
        self._closing = threading.Event()
        self._news: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
        """Incarnations of the pool that have ended, and how; -1: this is to end."""
        self._over: set[int] = set()
        """The same, as far as the supervisor has read it."""
        self._thread = threading.Thread(target=self._supervise, name="pool-supervisor", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the engine's side

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self.mailbox.submit(requests)

    def room(self) -> int | None:
        return self.mailbox.room()

    def soonest(self) -> float:
        return self.mailbox.soonest()

    def poll(self) -> Arrivals:
        return self.mailbox.poll()

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        return self.mailbox.wait(request_ids)

    def close(self) -> None:
        """Ends pool and planners; returns when their processes are gone."""
        if self._closing.is_set():
            self._thread.join()
            return
        self._closing.set()
        self._news.put((-1, None))
        self._thread.join()
        self.mailbox.close()

    # ---------------------------------------------------------------- the operator's side

    def stats(self) -> PoolStats:
        """The pool's counters and planners; the last ones known, while there is no pool. Asks the pool: takes a
        millisecond, and is nothing for the decode thread."""
        if (stats := self._ask("stats")) is not None:
            self._stats = stats
        elif not self._attached.is_set():
            ended = "retired" if self._closing.is_set() else "starting"
            planners = {ended: self._config.count} if self._config.count else {}
            gone = replace(self._stats, planners=planners, pids=(), versions=(), in_flight=0, waiting=0)
            self._stats = replace(gone, last_error=self._last_error or gone.last_error)
        return self._stats

    def mailbox_stats(self) -> dict[str, Any]:
        """Counters of the mailbox, and how often the pool was started again. Never blocks."""
        return {**self.mailbox.stats(), "pool_deaths": self.deaths}

    @property
    def pid(self) -> int | None:
        """The pool's process, if there is one."""
        return self._info.pid if self._info is not None and self._attached.is_set() else None

    def update_weights(self, checkpoint: Checkpoint | str | Path | ray.ObjectRef) -> None:
        """Sends new weights to every planner. A request submitted after this is planned with them."""
        self._source = share(checkpoint)
        self._ask("update_weights", [self._source])

    def resize(self, count: int) -> None:
        """So many planners from now on; also of a pool that is started again.

        Raises:
            ValueError: not between 0 and the settings' ``max_count``, or under the virtual clock.
        """
        most = self._config.max_count
        if most is None or not self._options["shed"]:
            raise ValueError("the number of planners is fixed; allowed: planners.max_count, and the wall clock")
        if not 0 <= count <= most:
            raise ValueError(f"planners = {count}; allowed: 0 to {most}")
        self._count = count
        self._ask("resize", count)

    @property
    def count(self) -> int:
        """Planners that there should be, unless the load says otherwise."""
        return self._config.count if self._count is None else self._count

    def wait_until_ready(self, timeout: float = 60.0) -> int:
        """Waits until the pool is there and no planner is about to start; returns how many are ready."""
        until = time.monotonic() + timeout
        if not self._attached.wait(timeout):
            return 0
        left = max(0.0, until - time.monotonic())
        return self._ask("wait_until_ready", left, timeout=left + CALL_TIMEOUT) or 0

    def _ask(self, method: str, *arguments: Any, timeout: float = CALL_TIMEOUT) -> Any:
        """Calls the pool; None: there is none, or it does not answer."""
        actor = self._actor
        if actor is None or not self._attached.is_set():
            return None
        try:
            return ray.get(getattr(actor, method).remote(*arguments), timeout=timeout)
        except RayError as error:
            logger.warning("the planner pool does not answer: %s", _first_line(error))
            return None

    # ---------------------------------------------------------------- the supervisor

    def _supervise(self) -> None:
        failures, incarnation = 0, 0
        try:
            while not self._closing.is_set():
                started = time.monotonic()
                incarnation += 1
                try:
                    self._live(incarnation)
                except Exception as error:  # whatever it is, it must not be the last pool
                    logger.exception("the planner pool could not be started")
                    self._last_error = _first_line(error)
                self._attached.clear()
                self._end_pool()
                if self._closing.is_set():
                    return
                self.deaths += 1
                self.mailbox.give_up()
                failures = 1 if time.monotonic() - started > STEADY else failures + 1
                bound = self._policy.max_restarts
                if bound is not None and self.deaths > bound:
                    return
                self._closing.wait(self._policy.delay(failures))
        finally:
            self.mailbox.give_up()

    def _live(self, incarnation: int) -> None:
        """Starts a pool and returns when it has ended, or this is to."""
        source = self._source
        with Listener() as listener:
            self._actor = self._actor_class.remote(
                listener.invitation, [source], self._config, self._settings, self._options
            )
            watch = self._actor.watch.remote()
            watch.future().add_done_callback(lambda result: self._news.put((incarnation, result.exception())))
            link = listener.accept(self._geometry, lambda: self._has_ended(incarnation), START_TIMEOUT)
        if link is not None:
            self._attach(link, source)
            self._has_ended(incarnation, block=True)
        elif not self._has_ended(incarnation):
            self._last_error = f"the planner pool did not come within {START_TIMEOUT:.0f} s"

    def _attach(self, link: Link, source: Any) -> None:
        self._info = ray.get(self._actor.ping.remote(), timeout=CALL_TIMEOUT)
        self._attached.set()
        if self._source is not source:  # new weights came while the pool was being started
            self._ask("update_weights", [self._source])
        if self._count is not None:
            self._ask("resize", self._count)
        self.mailbox.attach(link)

    def _has_ended(self, incarnation: int, block: bool = False) -> bool:
        """Whether this pool is over, or all is to end; with ``block``, waits until it is so."""
        try:
            while not self._over & {incarnation, -1}:
                ended, error = self._news.get(block)
                self._over.add(ended)
                self._last_error = _first_line(error) if error is not None else self._last_error
        except queue.Empty:
            pass
        return bool(self._over & {incarnation, -1})

    def _end_pool(self) -> None:
        """Ends what is left of the pool's process."""
        actor, info = self._actor, self._info
        self._actor, self._info = None, None
        if actor is None or not ray.is_initialized():
            return
        if self._closing.is_set():
            _try(lambda: ray.get(actor.close.remote(), timeout=KILL_TIMEOUT + CALL_TIMEOUT))
        _try(lambda: ray.kill(actor))
        until = time.monotonic() + KILL_TIMEOUT
        while info is not None and os.path.exists(f"/proc/{info.pid}") and time.monotonic() < until:
            time.sleep(0.005)


def _try(call: Callable[[], Any]) -> None:
    try:
        call()
    except (RayError, ValueError) as error:  # dead already, or it does not answer
        logger.debug("ending the planner pool: %s", error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def mailbox_geometry(config: Config, planners: PlannersConfig, settings: PlannerSettings = AS_TRAINED) -> Geometry:
    """Slots large enough for a request and for its plans, as many as the planners may have at a time."""
    model = config.model
    exact = (settings.world_model or model.world_model.kind) == "exact"
    layers = range(model.backbone.n_layer) if exact else None
    actions = (settings.search or config.search).num_actions
    request = sum(array.num_bytes("fp32") for array in request_shapes(model, layers, conv=exact).values())
    plan = sum(array.num_bytes("fp32") for array in plan_shapes(model, actions).values())
    # Headers, texts, tokens and alignment come to some hundred bytes a record.
    slot_bytes = max(request + 4096, HYPOTHESES * (plan + SKETCH_BYTES + 1024))
    wanted = max(1, planners.max_count or planners.count) * (planners.max_in_flight + 1) * planners.max_batch
    return Geometry(max(planners.max_batch, min(wanted, SEGMENT_BYTES // slot_bytes)), slot_bytes)


def start_pool(
    checkpoint: Checkpoint,
    planners: PlannersConfig = PlannersConfig(),
    settings: PlannerSettings = AS_TRAINED,
    *,
    shared: str | ray.ObjectRef | None = None,
    **options: Any,
) -> RemotePool:
    """Starts a pool beside this process; it ends with :meth:`RemotePool.close`, or with this process.

    Args:
        checkpoint: whose messages fit the mailbox.
        planners: how many planners, and their size.
        settings: how they deliberate.
        shared: what :func:`actors.weights.share` made of the checkpoint already.
        options: of :class:`RemotePool`.
    """
    geometry = mailbox_geometry(checkpoint.config, planners, settings)
    return RemotePool(checkpoint if shared is None else shared, geometry, planners, settings, **options)
