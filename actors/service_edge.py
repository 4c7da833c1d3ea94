"""What runs in front of Serve's proxy: answers in OpenAI's form where Serve itself would speak.

Invariants:

* a stream whose replica dies ends with an error event and ``[DONE]``, not with a torn connection;
* nobody waits for a replica that is not there: a request that has no answer yet is turned away with 503 when not even
  ``/healthz`` is answered;
* what the proxy says by itself (no route, no replica, no answer) is OpenAI's JSON, and no trace of code is in it;
* headers that steer Serve (timeouts, disconnects, multiplexing) are taken away: they are not the client's to set;
* more requests than all replicas together would let in are refused here, at a fraction of what a refusal by a replica
  costs: a flood leaves the processor to those that are served;
* everything else passes as it is, chunk by chunk.

Serve's proxies load it by ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=actors.service_edge.middlewares``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from actors.service_args import MOST_OPEN
from actors.serving.errors import ApiError
from actors.serving.sse import DONE, error_event

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

STEERING = frozenset((b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id"))
"""Headers that Serve obeys and a client must not set, in lower case with hyphens."""
DECODED = frozenset((b"x-request-id", b"x-session-id"))
"""Headers that Serve reads as text."""
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/states")
"""Paths whose requests a replica counts among its generations."""
SERVES_OWN = "/-/"
"""Serve's own paths: health and routes."""
GONE = ApiError(503, "the replica that answered is gone; the same request may be tried again", code="replica_gone")
FULL = ApiError(
    429, "too many requests are open; try again later", code="rate_limit_exceeded", headers={"Retry-After": "1"}
)
ABSENT = ApiError(503, "no replica is ready; try again later", code="no_replica", headers={"Retry-After": "1"})
_ANSWERS = {
    408: "the request took too long",
    429: "too many requests; try again later",
    503: "no replica is ready; try again later",
}
_HEADERS = [(b"content-type", b"application/json")]

DEFAULT_MOST_OPEN = 1024
"""Where the environment does not say how many."""
PATIENCE = 2.0
"""Seconds that a request waits for the beginning of its answer before it is asked whether anybody is there."""
PROBE_SECONDS = 2.0
"""Within which a replica that is there answers ``/healthz``."""


class Edge:
    """An ASGI middleware."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], most_open: int | None = None) -> None:
        """
        Args:
            app: the proxy.
            most_open: requests that generate and are passed on at a time; None: as the environment says.
        """
        self._app = app
        self._most_open = most_open or int(os.environ.get(MOST_OPEN, DEFAULT_MOST_OPEN))
        self._open = 0
        self._heard_at = -math.inf
        """When an answer of some replica's last began."""
        self._probe: asyncio.Task[bool] | None = None
        """One for all that wait."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(SERVES_OWN):
            await self._app(scope, receive, send)
            return
        response = _Response(send, self._hear)
        headers = _own_headers(scope["headers"])
        if headers is None:
            await response.fail(ApiError(400, "x-request-id or x-session-id holds bytes outside of ASCII"))
            return
        generates = scope.get("method") == "POST" and scope["path"].startswith(GENERATING)
        if generates and self._open >= self._most_open:
            await response.fail(FULL)
            return
        client = _Client(receive)
        self._open += generates
        watch = asyncio.get_running_loop().call_later(PATIENCE, self._look_after, scope, client, response)
        try:
            await self._app({**scope, "headers": headers}, client.receive, response.send)
        except asyncio.CancelledError:
            raise
        except Exception:  # the proxy's own fault; it must not show, and the client must not hang
            logger.exception("the proxy failed")
        finally:
            watch.cancel()
            client.served = True
            self._open -= generates
        await response.settle()

    def _hear(self) -> None:
        self._heard_at = asyncio.get_running_loop().time()

    def _look_after(self, scope: Message, client: _Client, response: _Response) -> None:
        """Ends a request that has waited for long if there is nobody to answer it; else looks again later."""
        if client.served or response.begun:
            return
        events = asyncio.get_running_loop()
        if events.time() - self._heard_at < PATIENCE:  # others are answered: it is only a long queue
            events.call_later(PATIENCE, self._look_after, scope, client, response)
            return
        if self._probe is None:
            self._probe = asyncio.ensure_future(self._is_anybody_there(scope))
            self._probe.add_done_callback(self._forget_probe)

        def told(probe: asyncio.Task[bool]) -> None:
            if not client.served and not response.begun:
                if probe.result():
                    events.call_later(PATIENCE, self._look_after, scope, client, response)
                else:
                    response.abandon()
                    client.sent_away.set()

        self._probe.add_done_callback(told)

    def _forget_probe(self, probe: asyncio.Task[bool]) -> None:
        self._probe = None

    async def _is_anybody_there(self, scope: Message) -> bool:
        """Whether a replica answers at all."""
        status = 0

        async def receive() -> Message:
            await asyncio.sleep(PROBE_SECONDS)
            return {"type": "http.disconnect"}  # which makes the proxy give up, in order

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        root = scope.get("root_path", "")
        asks = {**scope, "method": "GET", "path": f"{root}/healthz", "raw_path": b"/healthz", "query_string": b""}
        asks["headers"] = [(b"host", b"localhost"), (b"x-request-id", b"probe")]
        try:
            await asyncio.wait_for(self._app(asks, receive, send), 2 * PROBE_SECONDS)
        except TimeoutError:
            return False
        except Exception:
            logger.exception("the proxy failed")
        return status == 200


class _Client:
    """Who asks, as the proxy sees him."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.sent_away = asyncio.Event()
        """Nobody is there to answer: to the proxy it looks as if the client had gone, which it knows how to handle."""
        self.served = False

    async def receive(self) -> Message:
        said, sent_away = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self.sent_away.wait())
        try:
            await asyncio.wait((said, sent_away), return_when=asyncio.FIRST_COMPLETED)
            return said.result() if said.done() else {"type": "http.disconnect"}
        finally:
            said.cancel()
            sent_away.cancel()


class _Response:
    """One answer on its way out."""

    def __init__(self, send: Send, hear: Callable[[], None]) -> None:
        """
        Args:
            send: to the client.
            hear: called when a replica's answer begins.
        """
        self._send, self._hear = send, hear
        self._started = self._complete = self._streams = self._abandoned = False
        self._replaced: int | None = None
        """Status of an answer of the proxy's own, which is said in other words."""

    @property
    def begun(self) -> bool:
        return self._started or self._replaced is not None

    def abandon(self) -> None:
        """Nobody is there: an answer that comes after all comes too late."""
        self._abandoned = True

    async def send(self, message: Message) -> None:
        if self._abandoned:
            return
        if message["type"] == "http.response.body":
            if self._replaced is not None:
                return
            self._complete = not message.get("more_body", False)
        elif message["type"] == "http.response.start":
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                self._replaced = message["status"]
                return
            self._hear()
            self._started, self._streams = True, kind.startswith(b"text/event-stream")
            message["headers"] = _without_repeats(message["headers"])
        await self._send(message)

    async def settle(self) -> None:
        """Ends what the proxy has left unfinished."""
        if self._replaced is not None:
            # 404: no application is routed to, since it has not begun or is about to end.
            status = {404: 503}.get(self._replaced, self._replaced)
            status = status if status in _ANSWERS else 500
            headers = {"Retry-After": "1"} if status in (429, 503) else None
            await self.fail(ApiError(status, _ANSWERS.get(status, "the server failed"), headers=headers))
        elif not self._started:
            await self.fail(ABSENT if self._abandoned else GONE)
        elif not self._complete and self._streams:
            await self._body(error_event(GONE) + DONE)

    async def fail(self, error: ApiError) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": _HEADERS + headers})
        await self._body(error.body())

    async def _body(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _own_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]] | None:
    """The headers that are the client's to set; None: there is one that Serve cannot read."""
    own = [(name.lower().replace(b"_", b"-"), (name, value)) for name, value in headers]
    if not all(value.isascii() for name, (_, value) in own if name in DECODED):
        return None
    return [header for name, header in own if name not in STEERING]


def _without_repeats(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The request's id once: the front and the proxy both name it."""
    ids = [place for place, (name, _) in enumerate(headers) if name.lower() == b"x-request-id"]
    return [header for place, header in enumerate(headers) if place not in ids[1:]]


def middlewares() -> list[Middleware]:
    """For Serve's HTTP proxies."""
    return [Middleware(Edge)]
