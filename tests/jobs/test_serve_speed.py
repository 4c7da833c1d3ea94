"""The benchmark of HTTP: what its client takes for lost or garbled, and that it runs."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from jobs import benchmark_speed
from jobs.command import invoke
from jobs.speed.http_load import Answer, Asked, Client, read

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(text: str, positions: tuple[int, ...] = (), finish: str | None = None) -> bytes:
    tokens = [{"position": position, "text": text if place == 0 else ""} for place, position in enumerate(positions)]
    value: dict[str, Any] = {
        "choices": [{"index": 0, "text": text, "finish_reason": finish}],
        "crsm": {"tokens": tokens},
    }
    return b"data: " + json.dumps(value).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
FIRST, LAST = chunk("a", (5, 6)), chunk(" b", (7,), "length")


def answered(*events: bytes, status: int = 200, piece: int = 7) -> Answer:
    """An answer whose HTTP chunks have nothing to do with its events, read in pieces."""
    body = b"".join(events)
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in _cut(body, 11)) + b"0\r\n\r\n"
    return Answer(0.0, status, raw=_cut(HEAD + chunked, piece))


def _cut(text: bytes, size: int) -> list[bytes]:
    return [text[place : place + size] for place in range(0, len(text), size)]


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_a_whole_stream_is_read_however_it_was_cut(piece: int) -> None:
    said = read(answered(FIRST, LAST, USAGE, DONE, piece=piece))
    assert (said.text, said.tokens, said.whole) == ("a b", 3, True)


@pytest.mark.parametrize(
    "events",
    [
        (FIRST, LAST, USAGE),
        (FIRST, USAGE, DONE),
        (FIRST, chunk(" b", (8,), "length"), USAGE, DONE),
        (LAST, FIRST, USAGE, DONE),
        (FIRST, b'data: {"error": {"message": "gone"}}\n\n', LAST, USAGE, DONE),
        (FIRST, LAST, b'data: {"choices":[],"usage":{"completion_tokens":4}}\n\n', DONE),
        (),
    ],
    ids=["no end", "no finish", "a gap", "order", "an error", "a token too few", "nothing"],
)
def test_a_stream_that_is_not_whole_is_seen(events: tuple[bytes, ...]) -> None:
    assert not read(answered(*events)).whole


def test_an_answer_that_was_refused_says_when_to_come_again() -> None:
    assert Answer(0.0, 429, headers=b"HTTP/1.1 429 \r\nRetry-After: 7\r\nserver: x").retry_after == 7.0
    assert not read(Answer(0.0, 429, raw=[HEAD])).whole


def test_a_server_that_is_not_there_gives_no_answer_and_arrivals_follow_their_rate() -> None:
    client = Client(1, "nano")
    asked = Asked((1, 2), 3)
    (answer,) = asyncio.run(client.together([asked]))
    assert answer.status == 0 and math.isfinite(answer.ended)
    answers = asyncio.run(client.arriving([asked], rate=200.0, seconds=0.5, seed=1))
    assert 60 < len(answers) < 140, "100 on average, ±10 in two of three cases"


@pytest.mark.ray
def test_the_benchmark_runs_on_tiny_loads_and_loses_nothing(tmp_path: Any) -> None:
    target = tmp_path / "serve.json"
    assert invoke(benchmark_speed.app, ["serve", "--quick", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["results"]["rows"]
    assert len(rows) == 13
    checked = [row for row in rows if "garbled_streams" in row]
    assert len(checked) == 11
    assert all(row["garbled_streams"] == row["lost_tokens"] == row["answers_5xx"] == 0 for row in checked), checked
    assert next(row for row in rows if "8 streams" in row["name"])["turned_away"] > 0
