"""Chunks put together by hand are JSON, whatever they say, and come apart again at the right places."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from actors.serving.errors import ApiError
from actors.serving.sse import DONE, Chunks, error_event
from tests.serving.fakes import payloads

TEXTS = st.text(max_size=40)
NOTES = st.none() | st.dictionaries(TEXTS, st.none() | st.integers() | TEXTS | st.lists(TEXTS, max_size=3), max_size=3)


@given(
    said=st.lists(st.tuples(st.integers(0, 99), TEXTS, st.none() | st.just("stop"), NOTES, st.booleans()), max_size=6),
    name=TEXTS,
)
def test_a_stream_comes_apart_into_what_was_put_in(
    said: list[tuple[int, str, str | None, object, bool]], name: str
) -> None:
    for kind in ("text", "chat"):
        chunks = Chunks(kind, "id", 7, name, "hash", usage=True)  # type: ignore[arg-type]
        data = b"".join(
            chunks.chunk(index, text, finish, None, notes, first)  # type: ignore[arg-type]
            for index, text, finish, notes, first in said
        )
        whole = (data + chunks.usage({"total_tokens": 3}) + DONE).decode()
        *events, last = payloads(whole)
        assert last["choices"] == [] and last["usage"] == {"total_tokens": 3}
        for event, (index, text, finish, notes, first) in zip(events, said, strict=True):
            content = {"text": text} if kind == "text" else {"delta": {"content": text}}
            if kind == "chat" and first:
                content["delta"] = {"role": "assistant", "content": text}  # type: ignore[dict-item]
            assert event.pop("choices") == [{"index": index, **content, "logprobs": None, "finish_reason": finish}]
            assert event.pop("crsm", None) == notes
            assert event == {
                "id": "id",
                "object": "text_completion" if kind == "text" else "chat.completion.chunk",
                "created": 7,
                "model": name,
                "system_fingerprint": "hash",
                "usage": None,
            }


@given(TEXTS)
def test_an_error_is_one_event(message: str) -> None:
    (event,) = payloads((error_event(ApiError(503, message, code="x")) + DONE).decode())
    assert event == {"error": {"message": message, "type": "server_error", "param": None, "code": "x"}}


def test_an_error_that_quotes_half_a_character_can_be_sent() -> None:
    assert json.loads(ApiError(400, "unknown field '\ud800'").body())["error"]["message"] == "unknown field '\ud800'"
