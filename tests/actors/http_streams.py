"""Streams over HTTP: what came, how it ended, and no wait without a bound."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

HANG = 5.0
"""Seconds without a byte after which a stream counts as hanging."""


@dataclass(slots=True)
class Heard:
    """One stream as its client heard it."""

    tokens: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    """``[DONE]`` came, and the connection ended in order."""
    status: int = 0
    crsm: dict[str, Any] = field(default_factory=dict)
    """Of the last chunk."""

    def check_whole(self, prompt: Sequence[int], tokens: int) -> None:
        """Every token came once, in order, and the text is theirs."""
        assert (self.status, self.error, self.done, self.finish) == (200, None, True, "length"), self
        self.check_order(prompt)
        assert len(self.tokens) == tokens

    def check_order(self, prompt: Sequence[int]) -> None:
        positions = [token["position"] for token in self.tokens]
        assert positions == list(range(len(prompt), len(prompt) + len(positions)))
        assert "".join(token["text"] for token in self.tokens) == self.text

    def check_ended(self, prompt: Sequence[int], tokens: int) -> None:
        """Complete, or with an error that says so; nothing garbled before it."""
        if self.error is None:
            self.check_whole(prompt, tokens)
            return
        assert self.done and set(self.error) == {"message", "type", "param", "code"}, self
        self.check_order(prompt)


def request(prompt: Sequence[int], tokens: int, **crsm: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": tokens,
        "stream": True,
        "crsm": {"events": True, **crsm},
    }


async def listen(
    url: str, body: dict[str, Any], begun: Callable[[], None] = lambda: None, headers: dict[str, str] | None = None
) -> Heard:
    """Reads one stream to its end. ``begun``: called at the first token."""
    heard = Heard()
    async with (
        httpx.AsyncClient(timeout=httpx.Timeout(HANG, pool=None)) as client,
        client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response,
    ):
        heard.status = response.status_code
        if heard.status != 200:
            heard.error = json.loads(await response.aread())["error"]
            heard.done = True
            return heard
        async for line in response.aiter_lines():
            if not line:
                continue
            assert not heard.done and line.startswith("data: "), line
            if line == "data: [DONE]":
                heard.done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                heard.error = chunk["error"]
                continue
            (choice,) = chunk["choices"]
            if not heard.tokens and chunk["crsm"]["tokens"]:
                begun()
            heard.text += choice["text"]
            heard.finish = choice["finish_reason"] or heard.finish
            heard.crsm = chunk["crsm"]
            heard.tokens += chunk["crsm"]["tokens"]
    return heard


def together(streams: Sequence[Coroutine[Any, Any, Heard]]) -> list[Heard]:
    """All at once."""

    async def run() -> list[Heard]:
        return list(await asyncio.gather(*streams))

    return asyncio.run(run())


def disturbed(
    url: str,
    bodies: Sequence[dict[str, Any]],
    disturb: Callable[[], Any],
    headers: Sequence[dict[str, str] | None] | None = None,
) -> list[Heard]:
    """Streams, with something that happens once all of them have begun."""

    async def run() -> list[Heard]:
        left, all_begun = len(bodies), asyncio.Event()

        def begun() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                all_begun.set()

        sent = headers or [None] * len(bodies)
        streams = [asyncio.create_task(listen(url, body, begun, mine)) for body, mine in zip(bodies, sent, strict=True)]
        await asyncio.wait_for(all_begun.wait(), 30)
        await asyncio.to_thread(disturb)
        return list(await asyncio.gather(*streams))

    return asyncio.run(run())
