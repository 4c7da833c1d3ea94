"""A backend in this process: an engine in a thread, planners in threads. For tests, and where Ray is too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.decode_loop import DecodeLoop
from actors.serving.backend import Item, PlannerCount, ServedModel
from actors.serving.receiving import receive
from actors.serving.served_model import served_model
from actors.state_store import StateHandle, StateStore
from actors.streams import Stream, Streams
from crsm.config import EngineConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.planners import Planners, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.saved_generation import SavedGeneration


class LocalBackend:
    """Implements :class:`~actors.serving.backend.Backend`. Use it from one event loop; close it at the end."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str = "local",
        planners: int = 1,
        engine: EngineConfig | None = None,
        *,
        chat_template: str | None = None,
    ) -> None:
        """
        Args:
            checkpoint: the model.
            name: as which it is served.
            planners: threads that plan; 0: System 1 alone.
            engine: clock, pace, sizes; None: the wall clock and otherwise the checkpoint's.
            chat_template: of conversations.
        """
        config = checkpoint.config
        settings = engine or config.engine.model_copy(update={"clock": "wall"})
        model = served_model(checkpoint, name, chat_template)
        self._model = replace(model, config=config.model_copy(update={"engine": settings}))
        self._planners: Planners | None = None
        if planners:
            # The virtual clock waits for every plan; only by the wall clock is there anything to shed.
            in_flight = config.planners.max_in_flight if settings.clock == "wall" else None
            deliberator = Deliberator.from_checkpoint(checkpoint)
            self._planners = ThreadPlanners(deliberator, planners, config.planners.max_batch, in_flight)
        self._count = planners
        self._streams = Streams(settings.stream_interval)
        self._states = StateStore(settings.max_state_bytes)
        self._decode = DecodeLoop(Engine(checkpoint, self._planners, settings), self._streams.deliver)
        self._decode.start()

    @property
    def model(self) -> ServedModel:
        return self._model

    async def is_ready(self) -> bool:
        return self._streams.closed is None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Item], None]:
        name = request.generation_id
        if not name or name in self._streams:
            raise ValueError(f"generation_id = {name!r} is missing or in use; allowed: a fresh one")
        stream = Stream()
        self._streams.open([name], stream)
        try:
            self._decode.join(request)
            async for items in receive(name, stream, self._decode.cancel):
                yield items
        finally:
            self._streams.close([name])

    async def snapshot(self, generation_id: str) -> SavedGeneration:
        saved: SavedGeneration = await self._ask(lambda engine: engine.snapshot(generation_id))
        return saved

    async def put_state(self, saved: SavedGeneration, seconds: float, owner: str) -> StateHandle:
        return self._states.put(saved, seconds, owner)

    async def get_state(self, handle: str, owner: str) -> tuple[SavedGeneration, StateHandle]:
        return self._states.get(handle, owner), self._states.describe(handle, owner)

    async def drop_state(self, handle: str, owner: str) -> bool:
        return self._states.drop(handle, owner)

    async def planners(self) -> PlannerCount:
        return PlannerCount(self._count, 0)

    async def set_planners(self, count: int) -> PlannerCount:
        raise ValueError(f"planners = {count}: their number is fixed here; allowed: {self._count}")

    async def metrics(self) -> dict[str, Any]:
        return dict(await self._reply(self._decode.metrics))

    async def _ask(self, question: Callable[[Engine], Any]) -> Any:
        found = await self._reply(lambda reply: self._decode.ask(question, reply))
        if isinstance(found, ValueError):
            raise found
        return found

    async def _reply(self, ask: Callable[[Callable[[Any], None]], None]) -> Any:
        """What the decode thread answers."""
        events = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = events.create_future()

        def reply(found: Any) -> None:
            events.call_soon_threadsafe(answer.set_result, found)

        ask(reply)
        return await answer

    def close(self) -> None:
        """Ends every generation, the decode thread and the planners."""
        self._decode.stop()
        if self._planners is not None:
            self._planners.close()
        self._decode.wait()
