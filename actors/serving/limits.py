"""No body larger than allowed, whatever its header says."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.serving.errors import ApiError, invalid


class BodyLimit:
    """Counts the bytes of a body: those that it announces, and those that come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == b"content-length":
                if not value.isdigit() or len(value) > 20:
                    await invalid("content-length is not a number of bytes").response()(scope, receive, send)
                    return
                if int(value) > self._max:
                    await self._too_large().response()(scope, receive, send)
                    return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            if message["type"] == "http.request":
                came += len(message.get("body", b""))
                if came > self._max:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> ApiError:
        # What is still to come is not read: the connection cannot be used again.
        return ApiError(
            413, f"the body is too large; allowed: {self._max} bytes (max_body_bytes)", headers={"connection": "close"}
        )
