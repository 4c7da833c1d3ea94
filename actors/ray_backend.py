"""A backend whose generator is an actor: one stream for all of its generations, a task that sorts what comes.

Invariants:

* a message of the generator costs one Ray message, however many generations it speaks of;
* a generator that dies ends every open generation with :class:`~actors.serving.backend.GenerationFailed` at once; it is
  attached to again when Ray has restarted it, and until then the backend is not ready;
* whoever leaves before the last token has the generation cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from actors.decode_loop import Closed, Message, Refused
from actors.serving.backend import GenerationFailed, Item, PlannerCount, ServedModel
from actors.serving.receiving import receive
from actors.state_store import StateHandle
from actors.streams import Stream, Tokens
from crsm.generation import GenerationRequest
from crsm.saved_generation import SavedGeneration

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2
"""Between two attempts to reach a generator that is being restarted."""
T = TypeVar("T")


class RayBackend:
    """Implements :class:`~actors.serving.backend.Backend`. Belongs to one event loop: ``start`` it there."""

    def __init__(self, generator: Any, vault: Any, model: ServedModel) -> None:
        """
        Args:
            generator: a :class:`~actors.generator.GeneratorActor`.
            vault: the actor that keeps states (:mod:`actors.state_vault`).
            model: what it says.
        """
        self._generator, self._vault, self._model = generator, vault, model
        self._front = ""
        """The name under which this is attached; empty: it is not."""
        self._streams: dict[str, Stream] = {}
        self._task: asyncio.Task[None] | None = None
        self._over = ""
        """Why there will be no generator any more."""

    def start(self) -> None:
        """Begins to listen to the generator."""
        self._task = asyncio.get_running_loop().create_task(self._listen(), name="generator-stream")

    async def close(self) -> None:
        """Stops listening; open generations fail."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def model(self) -> ServedModel:
        return self._model

    @property
    def open_generations(self) -> int:
        """Generations that somebody reads."""
        return len(self._streams)

    @property
    def failed(self) -> str:
        """Why the generator will not come back; empty: it is there or is being restarted."""
        return self._over

    async def is_ready(self) -> bool:
        return bool(self._front) and not self._over

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Item], None]:
        name = request.generation_id
        if not name or name in self._streams:
            raise ValueError(f"generation_id = {name!r} is missing or in use; allowed: a fresh one")
        if not await self.is_ready():
            raise GenerationFailed(self._over or "the generator is being restarted")
        stream = self._streams[name] = Stream()
        try:
            # Not waited for: what it may answer comes in the stream as well, or the generator is dead.
            sent = self._generator.submit.remote(self._front, [request])
            watch = asyncio.ensure_future(self._report_refusal(sent, name))
            async for items in receive(name, stream, self._cancel):
                yield items
        finally:
            self._streams.pop(name, None)
            watch.cancel()

    async def snapshot(self, generation_id: str) -> SavedGeneration:
        saved: SavedGeneration = await _answer(self._generator.save.remote(generation_id))
        return saved

    async def put_state(self, saved: SavedGeneration, seconds: float, owner: str) -> StateHandle:
        handle: StateHandle = await _answer(self._vault.put.remote(saved, seconds, owner))
        return handle

    async def get_state(self, handle: str, owner: str) -> tuple[SavedGeneration, StateHandle]:
        found: tuple[SavedGeneration, StateHandle] = await _answer(self._vault.get.remote(handle, owner))
        return found

    async def drop_state(self, handle: str, owner: str) -> bool:
        dropped: bool = await _answer(self._vault.drop.remote(handle, owner))
        return dropped

    async def planners(self) -> PlannerCount:
        return PlannerCount(*await _answer(self._generator.planners.remote()))

    async def set_planners(self, count: int) -> PlannerCount:
        await _answer(self._generator.resize_planners.remote(count))
        return await self.planners()

    async def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = await _answer(self._generator.metrics.remote())
        return metrics

    # ---------------------------------------------------------------- the generator's stream

    async def _listen(self) -> None:
        while not self._over:
            front, detail = uuid.uuid4().hex, ""
            try:
                async for reference in self._generator.attach.remote(front):
                    items = await reference
                    self._front = front
                    for item in items:
                        self._sort(item)
                reason = "its stream has ended"
            except ActorDiedError as error:
                # Ray will not start it again.
                self._over = reason = "the generator is dead"
                detail = _first_line(error)
            except RayError as error:
                reason, detail = "the generator is gone; it is being started again", _first_line(error)
            finally:
                self._front = ""
            # Names of actors and nodes are for the log, not for those who wait.
            logger.warning("%s (%s); %d generations are lost", reason, detail, len(self._streams))
            for stream in self._streams.values():
                stream.put(Closed(reason))
            await asyncio.sleep(RETRY_SECONDS)

    def _sort(self, item: Any) -> None:
        if isinstance(item, Tokens):
            streams = self._streams
            for token in item:
                if (stream := streams.get(token.generation_id)) is not None:
                    stream.put(token)
        elif isinstance(item, Closed):
            for stream in self._streams.values():
                stream.put(item)
        else:
            self._put(item.generation_id, item)

    def _put(self, name: str, message: Message) -> None:
        if (stream := self._streams.get(name)) is not None:
            stream.put(message)

    async def _report_refusal(self, sent: Any, name: str) -> None:
        """Tells a generation's reader that it could not even be submitted."""
        try:
            await _answer(sent)
        except ValueError as error:
            self._put(name, Refused(name, str(error)))
        except GenerationFailed as error:
            self._put(name, Closed(str(error)))

    def _cancel(self, name: str) -> None:
        self._generator.cancel.remote(name)


async def _answer(reference: Any) -> Any:
    """The answer of an actor; its ``ValueError`` as it was raised.

    Raises:
        GenerationFailed: the actor is gone.
    """
    try:
        return await reference
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from None
        raise
    except RayActorError as error:
        logger.warning("an actor does not answer: %s", _first_line(error))
        raise GenerationFailed("the generator, or the vault of states, is gone") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
