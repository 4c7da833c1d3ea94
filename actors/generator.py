"""The actor that decodes: many generations in one batch, with a pool of planners beside it.

Invariants:

* the decode loop runs in its own thread and makes no Ray call (:mod:`actors.decode_loop`); the actor's methods only put
  commands into its mailbox;
* what was said crosses to the event loop once per step and is sorted there into one queue per stream;
* every stream ends: with a finished token, or with an error that names the generation;
* a stream that is cancelled or dropped by Ray cancels its generation;
* the planners belong to this actor: they end with it, by ``close`` or by its death.

An async actor, not a threaded one: a stream that waits for its next token costs a coroutine instead of a thread, so
that hundreds are cheap and none waits for a free thread; and cancelling a call reaches a coroutine where it waits.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.decode_loop import Closed, DecodeLoop, Message, Refused
from actors.planner import AS_TRAINED, PlannerActor, PlannerSettings
from actors.pool import PlannerPool
from actors.weights import Weights, open_source, share
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.engine import Engine, GenerationRequest
from crsm.model import Checkpoint
from crsm.threads import use_threads
from crsm.types import Token


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
        """
        use_threads(threads)
        self._checkpoint = open_source(source)
        self._pool = PlannerPool(
            shared[0],
            planners,
            settings,
            shed=engine.clock == "wall",
            num_cpus=planner_cpus,
            planner_class=planner_class,
        )
        self._engine = Engine(
            self._checkpoint,
            self._pool if planners.count else None,
            engine,
            world_model=settings.planning_model(self._checkpoint),
        )
        self._streams: dict[str, asyncio.Queue[Message]] = {}
        self._events: asyncio.AbstractEventLoop | None = None
        self._decode = DecodeLoop(self._engine, self._deliver)
        self._closed = False
        self._decode.start()

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingConfig | None = None,
        deliberation: DeliberationConfig | None = None,
        simulations: int | None = None,
        generation_id: str = "",
    ) -> AsyncIterator[Token]:
        """Streams the tokens of one generation (``num_returns="streaming"``, which Ray sees by itself).

        Args:
            prompt: tokens to say on from.
            sampling: None: the checkpoint's.
            deliberation: None: the checkpoint's.
            simulations: budget of a search; None: the checkpoint's.
            generation_id: for :meth:`cancel`; empty: a fresh one, which every token names.

        Raises:
            ValueError: the prompt is empty or outside the vocabulary, or the id is in use.
            GenerationFailed: the generator was closed or its engine failed; the message names the generation.
        """
        self._events = asyncio.get_running_loop()
        config = self._checkpoint.config
        request = GenerationRequest(
            tuple(prompt),
            sampling or config.sampling,
            deliberation or config.deliberation,
            config.search.simulations if simulations is None else simulations,
            generation_id or uuid.uuid4().hex,
        )
        name = request.generation_id
        if name in self._streams:
            raise ValueError(f"generation_id = {name!r} is in use; allowed: a fresh one")
        said = self._streams[name] = asyncio.Queue()
        ended = False
        try:
            self._decode.join(request)
            while not ended:
                match await said.get():
                    case Refused(reason=reason):
                        ended = True
                        if self._closed:
                            raise GenerationFailed(f"generation {name}: {reason}")
                        raise ValueError(reason)
                    case Closed(reason=reason):
                        ended = True
                        raise GenerationFailed(f"generation {name}: {reason}")
                    case Token() as token:
                        ended = token.finished
                        yield token
        finally:
            del self._streams[name]
            if not ended:
                self._decode.cancel(name)

    async def cancel(self, generation_id: str) -> None:
        """Ends a generation at the next step: its stream ends with a token whose reason is ``cancelled``."""
        self._decode.cancel(generation_id)

    async def metrics(self) -> dict[str, Any]:
        """What became of the plans, and the pool's counters."""
        events = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Any]] = events.create_future()
        self._decode.ask(lambda summary: _call_soon(events, _resolve, answer, summary))
        return {**await answer, "streams": len(self._streams), "pool": asdict(self._pool.stats())}

    async def update_weights(self, shared: Sequence[Any]) -> None:
        """The planners deliberate with these weights from now on.

        Args:
            shared: as for the constructor. Plans of another version than the generator's are refused and counted.
        """
        self._pool.update_weights(shared[0])

    async def ping(self) -> int:
        """The process id, once the actor is there."""
        return os.getpid()

    async def close(self) -> None:
        """Ends every stream, the decode thread and the planners; returns when they have ended."""
        self._closed = True
        self._decode.stop()
        # The pool first: under the virtual clock the decode thread may be waiting for it.
        await asyncio.to_thread(self._pool.close)
        await asyncio.to_thread(self._decode.wait)

    def _deliver(self, messages: Sequence[Message]) -> None:
        """From the decode thread to the event loop."""
        if self._events is not None:
            _call_soon(self._events, self._sort, messages)

    def _sort(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Closed):
                self._closed = True
                for stream in self._streams.values():
                    stream.put_nowait(message)
            elif message.generation_id in self._streams:
                self._streams[message.generation_id].put_nowait(message)


def _call_soon(events: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    if not events.is_closed():
        events.call_soon_threadsafe(function, *arguments)


def _resolve(answer: asyncio.Future[dict[str, Any]], summary: dict[str, Any]) -> None:
    if not answer.done():
        answer.set_result(summary)


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
) -> Any:
    """Starts a generator and its planners; returns the actor's handle at once.

    Stop it with :func:`stop_generator`; it also ends with the process that started it.
    """
    source = share(checkpoint)
    actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0)(GeneratorActor)
    return actor.remote(source, [source], planners, engine, settings, threads, planner_cpus, planner_class)


def stop_generator(generator: Any, timeout: float = 30.0) -> None:
    """Closes a generator, in good order if it answers in time, and ends its process; the planners end with it."""
    try:
        ray.get(generator.close.remote(), timeout=timeout)
    except ray.exceptions.RayError:  # dead already, or it does not answer
        pass
    ray.kill(generator)
