"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return to_json({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


class ClientGone(Exception):
    """Nobody is there any more to be answered."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be carried out, whenever it is tried."""
    return ApiError(400, message, param=param, code=code)


def to_json(value: Any) -> bytes:
    """ASCII: half of a surrogate pair, which a client may send and an error may quote, has no UTF-8."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def json_response(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
