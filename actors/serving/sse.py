"""Server-sent events of a stream, put together by hand: a chunk costs two small ``json.dumps``."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Literal

from actors.serving.errors import ApiError, to_json

Kind = Literal["text", "chat"]

DONE = b"data: [DONE]\n\n"
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Chunks:
    """Writes the chunks of one completion."""

    def __init__(
        self, kind: Kind, completion_id: str, created: int, model: str, fingerprint: str, usage: bool = False
    ) -> None:
        """
        Args:
            kind: of completions, or of chat completions.
            completion_id: the same in every chunk.
            created: seconds since the epoch.
            model: the served name.
            fingerprint: of the weights.
            usage: the last chunk will hold the usage, so that the others say ``null``.
        """
        head = {
            "id": completion_id,
            "object": "text_completion" if kind == "text" else "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._kind = kind
        self._head = f'data: {_dumps(head)[:-1]},"choices":['
        self._usage = ',"usage":null' if usage else ""

    def chunk(
        self,
        index: int,
        text: str,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
        crsm: dict[str, Any] | None = None,
        first: bool = False,
    ) -> bytes:
        """One event. ``first``: of its choice (a chat then names the role)."""
        if self._kind == "text":
            said = f'"text":{quoted(text)}'
        elif first:
            said = f'"delta":{{"role":"assistant","content":{quoted(text)}}}'
        else:
            said = f'"delta":{{"content":{quoted(text)}}}'
        notes = "" if crsm is None else f',"crsm":{_dumps(crsm)}'
        return (
            f'{self._head}{{"index":{index},{said},"logprobs":{_dumps(logprobs) if logprobs else "null"},'
            f'"finish_reason":{quoted(finish) if finish else "null"}}}]{self._usage}{notes}}}\n\n'
        ).encode("ascii")

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk without a choice that ends a stream whose usage was asked for."""
        return f'{self._head}],"usage":{_dumps(usage)}}}\n\n'.encode("ascii")


def error_event(error: ApiError) -> bytes:
    """An error in the middle of a stream."""
    return b"data: " + error.body() + b"\n\n"


def payload(value: Any) -> bytes:
    """Any value as one event."""
    return b"data: " + to_json(value) + b"\n\n"
