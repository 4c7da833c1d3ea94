"""Around every request: its id, a line in the log, security headers, and an answer whatever goes wrong inside."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.serving.errors import ApiError, ClientGone
from actors.serving.front import RequestInfo
from actors.serving.telemetry import Telemetry

logger = logging.getLogger("actors.serving.access")

CLIENT_GONE = 499
"""Status in the log of a request whose client went before its answer."""
_GOOD_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_PAGE_POLICY = (
    b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'"
)


class Access:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        events = asyncio.get_running_loop()
        info = scope["crsm"] = RequestInfo(_request_id(scope), events.time())
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers(info, message.get("headers", ()))]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientGone:
            status = status if status >= 400 else CLIENT_GONE
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        except Exception:
            logger.exception("request %s failed", info.request_id)
            if status == 0:
                error = ApiError(500, f"the server failed; request {info.request_id}", code="internal_error")
                await error.response()(scope, receive, noted)
        finally:
            seconds = events.time() - info.came
            self._telemetry.request(_route(scope), status or CLIENT_GONE, seconds)
            logger.info(
                "%s %s %d %.4f s %d tokens %s",
                scope["method"],
                _printable(scope["path"]),
                status or CLIENT_GONE,
                seconds,
                info.tokens,
                info.request_id,
            )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GOOD_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex


def _headers(info: RequestInfo, present: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", info.request_id.encode("ascii")), (b"x-content-type-options", b"nosniff")]
    if any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in present):
        headers += [(b"content-security-policy", _PAGE_POLICY), (b"referrer-policy", b"no-referrer")]
    return headers


def _route(scope: Scope) -> str:
    """The route's pattern: a bounded number of names, whatever clients ask for."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or "unknown"


def _printable(path: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in path[:200])
