"""A backend that says what it is told, and ways to ask an application: in this process, or through a socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from actors.serving.app import build_app
from actors.serving.backend import Item, PlannerCount, ServedModel
from actors.serving.served_model import served_model
from actors.serving.settings import ServeSettings
from actors.state_store import StateHandle, StateStore
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.saved_generation import SavedGeneration
from crsm.types import Token
from tests.fixtures import PROMPT, tiny_checkpoint, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LABELS = [TOKENIZER.encode(str(label))[0] for label in range(8)]
"""Tokens of the words 0 … 7."""
YES = TOKENIZER.verdict_id(True)


@functools.cache
def a_saved_one() -> SavedGeneration:
    """A real state of the tiny model."""
    engine = Engine(tiny_checkpoint())
    engine.submit(GenerationRequest(PROMPT, generation_id="g"))
    engine.step()
    return engine.snapshot("g")


class FakeBackend:
    """Counts: the token at position ``p`` is the word ``(p + seed) % 8``, the seed 0 at temperature 0."""

    def __init__(
        self,
        *,
        bundle: int = 1,
        seconds: float = 0.0,
        ends_after: int | None = None,
        hangs_after: int | None = None,
        fails_after: int | None = None,
        error: Exception | None = None,
        events: Callable[[GenerationRequest, int], Sequence[Item]] | None = None,
        answer: Callable[[GenerationRequest], Sequence[int]] | None = None,
        max_planners: int = 4,
        **model: Any,
    ) -> None:
        """
        Args:
            bundle: tokens that come together.
            seconds: before each bundle.
            ends_after: tokens after which it says ``yes``.
            hangs_after: tokens after which nothing more comes.
            fails_after: tokens after which ``error`` is raised.
            error: what is raised.
            events: what comes before the token at a position, if the generation is watched.
            answer: tokens to say instead.
            max_planners: as many as can be set; 0: their number is fixed.
            model: changes of the served model.
        """
        self.bundle, self.seconds, self.error, self.events, self.answer = bundle, seconds, error, events, answer
        self.ends_after, self.hangs_after, self.fails_after = ends_after, hangs_after, fails_after
        self.count, self.ready = PlannerCount(1, max_planners), True
        self.requests: list[GenerationRequest] = []
        self.closed: list[str] = []
        """Generations that are over, in the order in which they ended."""
        self.finished: list[str] = []
        """Those of them that said their last token."""
        self.most_at_once = 0
        self.states = StateStore(10**7)
        self._model = dataclasses.replace(served_model(tiny_checkpoint(), "tiny"), **model)
        self._speaking: dict[str, SavedGeneration] = {}

    @property
    def model(self) -> ServedModel:
        return self._model

    @property
    def open(self) -> set[str]:
        return {request.generation_id for request in self.requests} - set(self.closed)

    async def is_ready(self) -> bool:
        return self.ready

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Item], None]:
        self.requests.append(request)
        self.most_at_once = max(self.most_at_once, len(self.open))
        try:
            async for items in self._say(request):
                yield items
                await asyncio.sleep(0)
        finally:
            self._speaking.pop(request.generation_id, None)
            self.closed.append(request.generation_id)

    async def _say(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Item], None]:
        name, saved = request.generation_id, request.start
        position = len(request.prompt) + (saved.position + 1 if saved else 0)
        if request.read_only:
            yield [self._saved(request, position, 0, False), Token(name, position, -1, 0.0, True, "read")]
            return
        before = saved.generated if saved and not request.prompt else 0
        limit = request.sampling.max_tokens - before
        tokens = self._tokens(request, position, limit)
        items: list[Item] = []
        for place, token in enumerate(tokens):
            if self.hangs_after == place:
                await asyncio.Event().wait()
            if self.fails_after == place:
                assert self.error is not None
                raise self.error
            reason = "stop" if token in TOKENIZER.terminal_ids else "length" if place + 1 == limit else None
            if request.watch and self.events:
                items += self.events(request, position + place)
            state = self._saved(request, position + place + 1, before + place + 1, reason == "stop")
            self._speaking[name] = state
            if reason and request.keep:
                items.append(state)
            items.append(Token(name, position + place, token, -0.25, reason is not None, reason))
            if reason or (place + 1) % self.bundle == 0:
                await asyncio.sleep(self.seconds)
                if reason:
                    self.finished.append(name)
                yield items
                items = []
            if reason:
                return

    def _tokens(self, request: GenerationRequest, position: int, limit: int) -> Sequence[int]:
        if self.answer is not None:
            return self.answer(request)
        seed = request.sampling.seed if request.sampling.temperature else 0
        tokens = [LABELS[(position + place + seed) % 8] for place in range(limit)]
        return tokens if self.ends_after is None else [*tokens[: self.ends_after], YES][:limit]

    def _saved(self, request: GenerationRequest, length: int, generated: int, finished: bool) -> SavedGeneration:
        return dataclasses.replace(
            a_saved_one(),
            generation_id=request.generation_id,
            position=length - 1,
            generated=generated,
            finished=finished,
            sampling=request.sampling,
            deliberation=request.deliberation,
            simulations=request.simulations,
            pace=request.pace,
        )

    async def snapshot(self, generation_id: str) -> SavedGeneration:
        if generation_id not in self._speaking:
            raise ValueError(f"generation_id = {generation_id!r} is not known")
        return self._speaking[generation_id]

    async def put_state(self, saved: SavedGeneration, seconds: float, owner: str) -> StateHandle:
        return self.states.put(saved, seconds, owner)

    async def get_state(self, handle: str, owner: str) -> tuple[SavedGeneration, StateHandle]:
        return self.states.get(handle, owner), self.states.describe(handle, owner)

    async def drop_state(self, handle: str, owner: str) -> bool:
        return self.states.drop(handle, owner)

    async def planners(self) -> PlannerCount:
        return self.count

    async def set_planners(self, count: int) -> PlannerCount:
        if count > self.count.maximum:
            raise ValueError(f"planners = {count}; allowed: 0 to {self.count.maximum}")
        self.count = dataclasses.replace(self.count, count=count)
        return self.count

    async def metrics(self) -> dict[str, Any]:
        return {}


class Counts:
    """Telemetry that remembers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.first_tokens: list[float] = []
        self.said: list[int] = []
        self.intervals: list[float | None] = []
        self.gauges: list[tuple[int, int]] = []

    def request(self, path: str, status: int, seconds: float) -> None:
        self.requests.append((path, status))

    def first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def tokens(self, count: int, seconds: float | None) -> None:
        self.said.append(count)
        self.intervals.append(seconds)

    def generations(self, running: int, waiting: int) -> None:
        self.gauges.append((running, waiting))


def words(start: int, count: int) -> str:
    """What the fake says from a position on."""
    return " ".join(str((start + place) % 8) for place in range(count))


def an_app(backend: FakeBackend | None = None, **settings: Any) -> FastAPI:
    return build_app(backend or FakeBackend(), ServeSettings(**settings))


def client(app: FastAPI, **changes: Any) -> httpx.AsyncClient:
    """A client in this process; an exception inside the application fails the test."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", **changes)


def ask(app: FastAPI, method: str, path: str, **what: Any) -> httpx.Response:
    """One request."""

    async def send() -> httpx.Response:
        async with client(app) as there:
            return await there.request(method, path, **what)

    return asyncio.run(send())


def complete(app: FastAPI, **body: Any) -> httpx.Response:
    """POST /v1/completions."""
    return ask(app, "POST", "/v1/completions", json={"model": "tiny", "prompt": "0 1 2", **body})


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, whose form is checked."""
    assert response.headers["content-type"] == "application/json"
    (name, error), *others = response.json().items()
    assert name == "error" and not others and set(error) == {"message", "type", "param", "code"}
    return dict(error)


def payloads(text: str) -> list[Any]:
    """The JSON of an event stream's events; the stream must be whole."""
    *events, done, rest = text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def streamed(events: Sequence[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"]["content"] for choice in choices)


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The application behind a socket of this machine; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for something that must become true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)
