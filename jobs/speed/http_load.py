"""A client that costs little: raw sockets in one event loop, and everything that is to be parsed is parsed afterwards.

Loopback only. Every request has a bound in time.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
TIMEOUT = 60.0
"""Seconds without a byte after which a request is lost."""


@dataclass(slots=True)
class Answer:
    """One request and what came of it."""

    sent: float
    status: int = 0
    """0: no answer."""
    first: float = 0.0
    """When the first event came; 0: none did."""
    ended: float = 0.0
    raw: list[bytes] = field(default_factory=list, repr=False)
    headers: bytes = b""

    @property
    def first_token(self) -> float:
        """Seconds to the first event."""
        return self.first - self.sent

    @property
    def retry_after(self) -> float:
        found = re.search(rb"\r\nretry-after: *(\d+)", self.headers.lower())
        return float(found[1]) if found else 1.0

    @property
    def body(self) -> bytes:
        """Without the chunks of HTTP."""
        head, _, rest = b"".join(self.raw).partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            return rest
        parts = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            if length == 0:
                break
            parts.append(rest[:length])
            rest = rest[length + 2 :]
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Spoken:
    """A stream, read."""

    text: str
    tokens: int
    """As its usage says."""
    whole: bool
    """It ended with a finish reason and ``[DONE]``, and without an error; its positions, where told, are in order, and
    their text is the text."""


def read(answer: Answer) -> Spoken:
    """Parses a stream."""
    *events, rest = answer.body.split(b"\n\n")
    if answer.status != 200 or rest or not events or events[-1] != b"data: [DONE]":
        return Spoken("", 0, False)
    text, told, positions, finish, tokens, error = "", "", [], None, 0, False
    for event in events[:-1]:
        chunk: dict[str, Any] = json.loads(event.removeprefix(b"data: "))
        error |= "error" in chunk
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk.get("choices", ()):
            text += choice["text"]
            finish = choice["finish_reason"] or finish
        for token in chunk.get("crsm", {}).get("tokens", ()):
            positions.append(token["position"])
            told += token["text"]
    in_order = not positions or positions == list(range(positions[0], positions[0] + len(positions)))
    agrees = not positions or (told == text and len(positions) == tokens)
    return Spoken(text, tokens, not error and finish is not None and in_order and agrees)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a stream."""

    prompt: tuple[int, ...]
    tokens: int
    pace: float | None = None
    events: bool = False

    def encode(self, model: str) -> bytes:
        crsm: dict[str, Any] = {"channel": "off", "events": self.events}
        if self.pace is not None:
            crsm["pace"] = self.pace
        body = json.dumps(
            {
                "model": model,
                "prompt": list(self.prompt),
                "max_tokens": self.tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                "crsm": crsm,
            }
        ).encode()
        return (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )


class Client:
    """Asks a server."""

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model

    async def ask(self, asked: Asked) -> Answer:
        """One stream to its end."""
        answer = Answer(time.perf_counter())
        writer = None
        try:
            reader, writer = await asyncio.open_connection(HOST, self._port, limit=2**20)
            writer.write(asked.encode(self._model))
            while data := await asyncio.wait_for(reader.read(2**18), TIMEOUT):
                if not answer.raw:
                    answer.status = int(data[9:12])
                    answer.headers = data.partition(b"\r\n\r\n")[0]
                if not answer.first and b"data: " in data:
                    answer.first = time.perf_counter()
                answer.raw.append(data)
        except (OSError, TimeoutError):
            answer.status = 0
        finally:
            answer.ended = time.perf_counter()
            if writer is not None:
                writer.close()
        return answer

    async def ask_until_served(self, asked: Asked, seconds: float) -> tuple[Answer, int]:
        """One stream, asked for again when it is turned away; and how often it was."""
        until, turned_away = time.perf_counter() + seconds, 0
        while True:
            answer = await self.ask(asked)
            if answer.status != 429 or time.perf_counter() > until:
                return answer, turned_away
            turned_away += 1
            await asyncio.sleep(answer.retry_after * random.uniform(0.5, 1.0))

    async def together(self, asked: Sequence[Asked]) -> list[Answer]:
        """All at once."""
        return list(await asyncio.gather(*map(self.ask, asked)))

    async def by_turns(self, asked: Sequence[Asked], rounds: int, spread: float = 0.0) -> list[Answer]:
        """Each again and again, one after the other: as many at a time as there are. They begin at times of their own,
        within ``spread`` seconds."""

        async def one(mine: Asked) -> list[Answer]:
            await asyncio.sleep(random.uniform(0.0, spread))
            return [await self.ask(mine) for _ in range(rounds)]

        return [answer for answers in await asyncio.gather(*map(one, asked)) for answer in answers]

    async def arriving(self, asked: Sequence[Asked], rate: float, seconds: float, seed: int) -> list[Answer]:
        """Requests that come by themselves, ``rate`` a second on average, whether others have been answered or not."""
        draw = random.Random(seed)
        tasks: list[asyncio.Task[Answer]] = []
        begin = time.perf_counter()
        at = draw.expovariate(rate)
        while at < seconds:
            await asyncio.sleep(begin + at - time.perf_counter())
            tasks.append(asyncio.create_task(self.ask(asked[len(tasks) % len(asked)])))
            at += draw.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    async def half_open(self, count: int, text: bytes) -> list[asyncio.StreamWriter]:
        """Connections on which this was said and then nothing."""
        writers = []
        for _ in range(count):
            _, writer = await asyncio.open_connection(HOST, self._port)
            writer.write(text)
            writers.append(writer)
        return writers


async def read_slowly(port: int, request: bytes, stop: asyncio.Event) -> None:
    """A client that reads a byte a second."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1)
    writer.write(request)
    while not stop.is_set():
        await reader.read(1)
        try:
            await asyncio.wait_for(stop.wait(), 1.0)
        except TimeoutError:
            continue
    writer.close()
