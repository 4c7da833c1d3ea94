"""The actor that decodes: many generations in one batch, with a pool of planners beside it.

Invariants:

* the decode loop runs in its own thread and makes no Ray call (:mod:`actors.decode_loop`); the actor's methods only put
  commands into its mailbox;
* what was said crosses to the event loop without a wait and reaches every stream in as few messages as it reads
  (:mod:`actors.streams`);
* every stream ends: with a finished token, or with an error that names the generation;
* a stream that is cancelled or dropped by Ray cancels its generation;
* the planners and their pool, in a process of its own, belong to this actor: they end with it, by ``close`` or by its
  death.

An async actor, not a threaded one: a stream that waits for its next token costs a coroutine instead of a thread, so
that hundreds are cheap and none waits for a free thread; and cancelling a call reaches a coroutine where it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.decode_loop import Closed, DecodeLoop, Refused
from actors.devices import generator_device
from actors.long_lived import freeze_memory
from actors.metrics import PATIENCE, Counts, GeneratorCounts, exported
from actors.planner import AS_TRAINED, PlannerActor, PlannerSettings
from actors.pool import PoolStats
from actors.pool_actor import start_pool
from actors.state_store import StateHandle, StateStore
from actors.streams import Stream, StreamItem, Streams, bundled, ended
from actors.weights import Weights, open_source, share
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.engine import Engine, QueueFull
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.saved_generation import SavedGeneration, check_saved
from crsm.threads import use_threads


class GenerationFailed(RuntimeError):
    """A generation ended without its last token."""


class GeneratorActor:
    """Decodes. A plain class: :func:`start_generator` makes an actor of it."""

    def __init__(
        self,
        source: str | Weights,
        shared: Sequence[Any],
        planners: PlannersConfig = PlannersConfig(),
        engine: EngineConfig = EngineConfig(),
        settings: PlannerSettings = AS_TRAINED,
        threads: int = 1,
        planner_cpus: float = 1.0,
        planner_class: type = PlannerActor,
        application: str | None = "generator",
    ) -> None:
        """
        Args:
            source: a checkpoint's folder, or its weights (Ray hands over the value of a reference).
            shared: the same as the one element of a list, inside of which a reference stays one; for the planners.
            planners: how many planners, and their size.
            engine: clock, pace, batch size.
            settings: how the planners deliberate.
            threads: of torch, in this process.
            planner_cpus: CPUs that Ray reserves for each planner.
            planner_class: what each planner is.
            application: under which its counters are exported (:mod:`actors.metrics`); None: not by itself.
        """
        use_threads(threads)
        self._checkpoint = open_source(source)
        self._pool = (
            start_pool(
                self._checkpoint,
                planners,
                settings,
                shared=shared[0],
                shed=engine.clock == "wall",
                num_cpus=planner_cpus,
                planner_class=planner_class,
            )
            if planners.count
            else None
        )
        self._engine = Engine(
            self._checkpoint,
            self._pool,
            engine,
            world_model=settings.planning_model(self._checkpoint),
        )
        self._streams = Streams(engine.stream_interval)
        self._fronts: dict[str, Stream] = {}
        self._states = StateStore(engine.max_state_bytes)
        self._park_seconds = engine.park_seconds
        self._max_planners = (planners.max_count or 0) if engine.clock == "wall" else 0
        self._decode = DecodeLoop(self._engine, self._streams.deliver)
        freeze_memory()
        self._decode.start()
        self._exports = contextlib.ExitStack()
        if application is not None:
            counts = GeneratorCounts(Counts(application))
            self._exports.enter_context(exported(lambda: counts.look(self._counters())))

    async def generate(
        self,
        prompt: Sequence[int] = (),
        sampling: SamplingConfig | None = None,
        deliberation: DeliberationConfig | None = None,
        simulations: int | None = None,
        generation_id: str = "",
        *,
        pace: float | None = None,
        park: bool = False,
        start: str | SavedGeneration | None = None,
        forced: Sequence[int] = (),
        snapshot_every: int = 0,
    ) -> AsyncIterator[StreamItem]:
        """Streams one generation (``num_returns="streaming"``, which Ray sees by itself).

        Args:
            prompt: tokens to say on from; of a parked generation, its next turn.
            sampling: None: that of ``start``, or the checkpoint's.
            deliberation: None: likewise.
            simulations: budget of a search; None: likewise.
            generation_id: for :meth:`cancel`; empty: a fresh one, which every token names.
            pace: tokens per second at most; None: the engine's.
            park: keep the generation when its turn is over: it thinks on, and a later call with its id goes on.
            start: a saved state, or the handle of one, to go on from under a new id.
            forced: the first tokens to say, whatever the model would.
            snapshot_every: put a :class:`~crsm.saved_generation.SavedGeneration` into the stream every so many tokens.

        Yields:
            What was said since the last message, as tuples of tokens; and snapshots.

        Raises:
            ValueError: the request cannot be carried out; nothing was said.
            QueueFull: too many generations wait; to be tried again later.
            GenerationFailed: the generator was closed or its engine failed; the message names the generation.
        """
        saved = self._states.get(start) if isinstance(start, str) else start
        config = self._checkpoint.config
        request = GenerationRequest(
            tuple(prompt),
            sampling or (saved.sampling if saved else config.sampling),
            deliberation or (saved.deliberation if saved else config.deliberation),
            simulations or (saved.simulations if saved else config.search.simulations),
            generation_id or uuid.uuid4().hex,
            pace=pace,
            park=park,
            start=saved,
            forced=tuple(forced),
            snapshot_every=snapshot_every,
        )
        async for item in self._stream([request]):
            if isinstance(item, Refused):
                raise QueueFull(item.reason) if item.full else ValueError(item.reason)
            yield item

    async def generate_many(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[StreamItem | Refused]:
        """Streams many generations in one: what a front end with many users reads, at the cost of one stream.

        A request that is refused is named in a :class:`~actors.decode_loop.Refused`; the others go on.

        Raises:
            ValueError: an id is missing, or given twice.
            GenerationFailed: the generator was closed or its engine failed.
        """
        names = [request.generation_id for request in requests]
        if not all(names) or len(set(names)) < len(names):
            raise ValueError("generation_id is missing or given twice; allowed: one of its own for every request")
        async for item in self._stream(requests):
            yield item

    async def _stream(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[StreamItem | Refused]:
        names = {request.generation_id for request in requests}
        if taken := sorted(name for name in names if name in self._streams):
            raise ValueError(f"generation_id = {taken[0]!r} is in use; allowed: a fresh one")
        stream, left = Stream(), set(names)
        self._streams.open(list(names), stream)
        try:
            for request in requests:
                self._decode.join(request)
            while left:
                messages = await stream.take()
                left.difference_update(ended(messages))
                for item in bundled(messages):
                    if isinstance(item, Closed):
                        raise GenerationFailed(f"generation {', '.join(sorted(left))}: {item.reason}")
                    if isinstance(item, Refused) and self._streams.closed is not None:
                        raise GenerationFailed(f"generation {item.generation_id}: {item.reason}")
                    yield item
        finally:
            self._streams.close(list(names))
            for name in left:
                self._decode.cancel(name)

    async def attach(self, front: str) -> AsyncIterator[list[StreamItem | Refused | Closed]]:
        """Streams what all generations say that a front end submits, until the front end is gone: hundreds of users at
        the cost of one stream. Whatever was there at the same time comes in one message.

        Args:
            front: a name of the front end's choice.

        Raises:
            ValueError: the name is taken.
        """
        if front in self._fronts:
            raise ValueError(f"front = {front!r} is attached; allowed: a fresh name")
        stream = self._fronts[front] = Stream()
        yield []  # it may submit now
        try:
            while True:
                messages = await stream.take()
                self._streams.close(ended(messages))
                yield bundled(messages)
        finally:
            del self._fronts[front]
            for name in self._streams.close_all(stream):
                self._decode.cancel(name)

    async def submit(self, front: str, requests: Sequence[GenerationRequest]) -> None:
        """Begins generations whose tokens go into the front end's stream; a refusal goes there as well.

        Raises:
            ValueError: no such front end, or an id that is missing or in use.
        """
        stream = self._fronts.get(front)
        if stream is None:
            raise ValueError(f"front = {front!r} is not attached; allowed: {', '.join(self._fronts) or '(none)'}")
        names = [request.generation_id for request in requests]
        if wrong := [name for name in names if not name or name in self._streams or names.count(name) > 1]:
            raise ValueError(
                f"generation_id = {wrong[0]!r} is missing or in use; allowed: a fresh one for each request"
            )
        self._streams.open(names, stream)
        for request in requests:
            self._decode.join(request)

    async def snapshot(self, generation_id: str, seconds: float | None = None) -> StateHandle:
        """Keeps a generation's state as it stands between two tokens; the generation goes on.

        Args:
            generation_id: a speaking or a parked generation.
            seconds: to live; None: the settings' ``park_seconds``.

        Raises:
            ValueError: no such generation, or ``seconds`` is not above 0.
        """
        saved = await self.save(generation_id)
        return self._states.put(saved, self._park_seconds if seconds is None else seconds)

    async def save(self, generation_id: str) -> SavedGeneration:
        """A generation's state as it stands between two tokens, handed out at once; the generation goes on.

        Raises:
            ValueError: no such generation.
        """
        saved: SavedGeneration = await self._question(lambda engine: engine.snapshot(generation_id))
        return saved

    async def export_state(self, handle: str) -> SavedGeneration:
        """The state behind a handle, to be handed to another generator (``import_state``, or ``start=`` at once)."""
        return self._states.get(handle)

    async def import_state(self, saved: SavedGeneration, seconds: float | None = None) -> StateHandle:
        """Keeps a state that comes from another generator with the same weights.

        Raises:
            ValueError: it was made with other weights, or its arrays do not fit.
        """
        check_saved(saved, self._checkpoint)
        return self._states.put(saved, self._park_seconds if seconds is None else seconds)

    async def drop_state(self, handle: str) -> bool:
        """Forgets a state; whether there was one."""
        return self._states.drop(handle)

    async def cancel(self, generation_id: str) -> None:
        """Ends a generation at the next step: its stream ends with a token whose reason is ``cancelled``. A parked one
        is forgotten."""
        self._decode.cancel(generation_id)

    async def metrics(self) -> dict[str, Any]:
        """What became of the plans, how long tokens took, who is there, and the pool's counters."""
        events = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Any]] = events.create_future()
        self._decode.metrics(lambda summary: _call_soon(events, _resolve, answer, summary))
        pool = self._pool
        return {
            **await answer,
            "streams": len(self._streams),
            "states": {"count": len(self._states), "bytes": self._states.num_bytes},
            "pool": asdict(await asyncio.to_thread(pool.stats) if pool else PoolStats()),
            "mailbox": pool.mailbox_stats() if pool else {},
        }

    def _counters(self) -> dict[str, Any]:
        """What is exported; for a thread that may wait."""
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._decode.metrics(answers.put)
        pool = {"pool": asdict(self._pool.stats())} if self._pool else {}
        return answers.get(timeout=PATIENCE) | pool

    async def forget_times(self) -> None:
        """Begins to measure times anew (``times`` of :meth:`metrics`); counters go on."""
        await self._question(lambda engine: engine.metrics.forget_times())

    async def update_weights(self, source: str | Weights, shared: Sequence[Any]) -> int:
        """Goes on with other weights of the same shapes, and so do the planners: plans of the old ones are refused.

        Args:
            source: as for the generator itself (:func:`actors.weights.share`).
            shared: the same as the one element of a list.

        Returns:
            The version.

        Raises:
            ValueError: the model has other shapes or another vocabulary.
        """
        checkpoint = await asyncio.to_thread(open_source, source)
        await self._question(lambda engine: engine.update_weights(checkpoint))
        await self.update_planners(shared)
        return checkpoint.model_version

    async def update_planners(self, shared: Sequence[Any]) -> None:
        """Planners go on with these weights, the one element of a list, this generator with its own.

        Until both have the same version, every plan is refused and counted.
        """
        if self._pool is not None:
            await asyncio.to_thread(self._pool.update_weights, shared[0])

    async def planners(self) -> tuple[int, int]:
        """How many planners there should be, and how many there may be (0: the number is fixed)."""
        if self._pool is None:
            return 0, 0
        return self._pool.count, self._max_planners

    async def resize_planners(self, count: int) -> None:
        """So many planners from now on.

        Raises:
            ValueError: the number is fixed, or not to be this.
        """
        if self._pool is None:
            raise ValueError("there is no planner pool; allowed: planners.count ≥ 1 at the start")
        await asyncio.to_thread(self._pool.resize, count)

    async def ping(self) -> int:
        """The process id, once the actor is there."""
        return os.getpid()

    async def wait_until_ready(self, timeout: float = 60.0) -> int:
        """Waits until no planner is about to start; returns how many are ready."""
        return await asyncio.to_thread(self._pool.wait_until_ready, timeout) if self._pool else 0

    async def close(self) -> None:
        """Ends every stream, the decode thread and the planners; returns when they have ended."""
        await asyncio.to_thread(self._exports.close)
        self._decode.stop()
        # The pool first: under the virtual clock the decode thread may be waiting for it.
        if self._pool is not None:
            await asyncio.to_thread(self._pool.close)
        await asyncio.to_thread(self._decode.wait)

    async def _question(self, question: Callable[[Engine], Any]) -> Any:
        """Asks the engine something, between two of its steps."""
        events = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = events.create_future()
        self._decode.ask(question, lambda found: _call_soon(events, _resolve, answer, found))
        return await answer


def _call_soon(events: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    if not events.is_closed():
        events.call_soon_threadsafe(function, *arguments)


def _resolve(answer: asyncio.Future[Any], found: Any) -> None:
    if answer.done():
        return
    if isinstance(found, ValueError):
        answer.set_exception(found)
    else:
        answer.set_result(found)


def start_generator(
    checkpoint: Checkpoint | str | Path | ray.ObjectRef,
    planners: PlannersConfig = PlannersConfig(),
    engine: EngineConfig = EngineConfig(),
    settings: PlannerSettings = AS_TRAINED,
    *,
    threads: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    planner_cpus: float = 1.0,
    planner_class: type = PlannerActor,
    max_restarts: int = 0,
    application: str | None = "generator",
) -> Any:
    """Starts a generator and its planners; returns the actor's handle at once.

    With ``max_restarts`` (-1: any number) Ray starts it again when its process dies. What it was saying is lost with
    it: callers hear so, or resume (:func:`actors.client.stream_tokens`). What it counts is exported as that of
    ``application`` (:mod:`actors.metrics`); None: by whoever reads ``metrics()``.

    Stop it with :func:`stop_generator`; it also ends with the process that started it.

    Raises:
        ValueError: a GPU is asked for and none is reserved, or the cluster has fewer than are reserved.
    """
    engine = engine.model_copy(update={"device": generator_device(engine, num_gpus, planners)})
    source = share(checkpoint)
    actor_class = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=max_restarts)(GeneratorActor)
    actor = actor_class.remote(
        source, [source], planners, engine, settings, threads, planner_cpus, planner_class, application
    )
    if max_restarts:
        # A restarted actor reads its arguments again. Ray keeps those for it, but not what is inside of a list.
        _SOURCES[actor._actor_id.hex()] = source
    return actor


_SOURCES: dict[str, Any] = {}
"""The weights of generators that may be restarted, until they are stopped."""


def stop_generator(generator: Any, timeout: float = 30.0) -> None:
    """Closes a generator, in good order if it answers in time, and ends its process; the planners end with it."""
    try:
        ray.get(generator.close.remote(), timeout=timeout)
    except ray.exceptions.RayError:  # dead already, or it does not answer
        pass
    ray.kill(generator)
    _SOURCES.pop(generator._actor_id.hex(), None)
