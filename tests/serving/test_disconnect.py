"""Through a socket: whoever goes away ends what was said for them, and slow readers hold nobody up."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.fakes import FakeBackend, an_app, payloads, serving, streamed, wait_until, words

BODY = {"model": "tiny", "prompt": "0 1 2", "max_tokens": 1000}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(seconds=0.005)


@pytest.fixture
def address(backend: FakeBackend) -> Iterator[str]:
    with serving(an_app(backend)) as address:
        yield address


def raw_request(address: str, body: dict[str, Any]) -> socket.socket:
    """A connection that has asked and not read."""
    connection = socket.create_connection((urlsplit(address).hostname or "", urlsplit(address).port or 0), timeout=20)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    return connection


def test_a_client_that_leaves_a_stream_ends_all_its_generations(backend: FakeBackend, address: str) -> None:
    with httpx.stream("POST", f"{address}/v1/completions", json={**BODY, "stream": True, "n": 3}) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        assert len(backend.open) == 3
    wait_until(lambda: not backend.open)
    assert len(backend.closed) == 3 and not backend.finished


def test_a_client_that_does_not_wait_for_its_answer_ends_the_generation(backend: FakeBackend, address: str) -> None:
    with raw_request(address, BODY):
        wait_until(lambda: bool(backend.open))
    wait_until(lambda: not backend.open)
    assert not backend.finished


def test_a_connection_that_is_reset_ends_the_generation(backend: FakeBackend, address: str) -> None:
    connection = raw_request(address, {**BODY, "stream": True})
    assert connection.recv(100)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    wait_until(lambda: not backend.open)
    assert not backend.finished


def test_a_generation_that_has_not_said_anything_is_ended_too(backend: FakeBackend, address: str) -> None:
    backend.hangs_after = 0
    for stream in (True, False):
        with raw_request(address, {**BODY, "stream": stream}):
            wait_until(lambda: bool(backend.open))
        wait_until(lambda: not backend.open)


def test_a_reader_that_does_not_read_takes_no_place_once_its_text_is_said(backend: FakeBackend, address: str) -> None:
    backend.seconds = 0
    body = {**BODY, "max_tokens": 4000, "stream": True, "logprobs": 1, "crsm": {"events": True, "log": True}}
    slow = [raw_request(address, body) for _ in range(5)]
    wait_until(lambda: len(backend.finished) == 5)
    answer = httpx.post(f"{address}/v1/completions", json={**BODY, "max_tokens": 5, "stream": True}, timeout=20)
    assert streamed(payloads(answer.text)) == words(3, 5)
    for connection in slow:
        connection.close()


def test_half_open_connections_hold_nobody_up(address: str) -> None:
    place = (urlsplit(address).hostname, urlsplit(address).port)
    half_open = [socket.create_connection(place, timeout=20) for _ in range(200)]
    for connection in half_open[::2]:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n")
    began = time.monotonic()
    assert httpx.get(f"{address}/healthz", timeout=20).status_code == 200
    assert time.monotonic() - began < 10
    for connection in half_open:
        connection.close()


def test_what_is_no_http_is_refused_and_the_server_goes_on(address: str) -> None:
    place = (urlsplit(address).hostname, urlsplit(address).port)
    for garbage in (
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n: x\r\n\r\n",
    ):
        with socket.create_connection(place, timeout=20) as connection:
            connection.sendall(garbage)
            assert b" 500 " not in connection.recv(1000)
    assert httpx.get(f"{address}/healthz", timeout=20).status_code == 200
