"""Whatever comes as a body, the answer is no fault of the server's, and the next request is answered."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.serving.schema import (
    ChatRequest,
    CheckRequest,
    CompletionRequest,
    ForkRequest,
    PlannersRequest,
    StateRequest,
)
from tests.serving.fakes import FakeBackend, an_app, client, complete, words

SOME = 1_000
MANY = 10_000
PATHS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/states": StateRequest,
    "/v1/states/state-abc/fork": ForkRequest,
    "/v1/crsm/check": CheckRequest,
    "/v1/crsm/planners": PlannersRequest,
}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny",
        "prompt": "0 1",
        "max_tokens": 3,
        "n": 2,
        "stream": False,
        "stop": ["7"],
        "crsm": {"lag": 1, "events": True, "deadline": 5},
    },
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "0"}], "max_tokens": 2},
    "/v1/states": {"model": "tiny", "prompt": [3, 4], "ttl": 3},
    "/v1/states/state-abc/fork": {"ttl": 3},
    "/v1/crsm/check": {"task": "path_star", "index": 0, "text": "0"},
    "/v1/crsm/planners": {"count": 1},
}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0, -1])
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=12)
    | st.sampled_from(["tiny", "state", "off", "user", "0 1", "\x00", "\ud800", "text"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def nearly_valid(draw: st.DrawFn) -> tuple[str, bytes]:
    """A request with some fields replaced, added or left out."""
    path = draw(st.sampled_from(sorted(PATHS)))
    body = dict(VALID[path])
    if isinstance(body.get("crsm"), dict):
        body["crsm"] = dict(body["crsm"])
    for _ in range(draw(st.integers(1, 3))):
        where = body["crsm"] if isinstance(body.get("crsm"), dict) and draw(st.booleans()) else body
        names = sorted({*where, *PATHS[path].model_fields, "lag", "pace", "save_state", "state", "else"})
        name = draw(st.sampled_from(names))
        if draw(st.integers(0, 4)) == 0:
            where.pop(name, None)
        else:
            where[name] = draw(VALUES)
    return path, json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, bytes]:
    """A request's bytes, cut, doubled, overwritten, or nothing like one."""
    path = draw(st.sampled_from(sorted(PATHS)))
    content = bytearray(json.dumps(VALID[path]).encode())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["cut", "insert", "replace", "nest"]))
        if kind == "cut":
            del content[place : place + draw(st.integers(1, 20))]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        elif kind == "replace":
            content[place : place + 1] = draw(st.sampled_from([b"NaN", b"1e999", b"\\u0000", b"\xff", b"{", b'"']))
        else:
            content[place:place] = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([1, 50, 2000]))
    return path, bytes(content)


ANYTHING = st.tuples(st.sampled_from(sorted(PATHS)), st.binary(max_size=200))


def check_that_nothing_breaks(count: int) -> None:
    app = an_app(FakeBackend(), max_tokens=50, max_deadline=5, max_body_bytes=100_000)
    statuses: dict[int, int] = {}

    async def send(path: str, content: bytes) -> httpx.Response:
        async with client(app) as there:
            method = "PUT" if path.endswith("planners") else "POST"
            headers = {"content-type": "application/json"}
            return await asyncio.wait_for(there.request(method, path, content=content, headers=headers), 20)

    with asyncio.Runner() as runner:

        @settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)
        @given(nearly_valid() | broken() | ANYTHING)
        def check(request: tuple[str, bytes]) -> None:
            answer = runner.run(send(*request))
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"]

        check()
    assert statuses.get(400, 0) > count // 4, statuses
    assert statuses.get(200, 0) > 0, statuses
    answer = complete(app, max_tokens=3)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == words(3, 3)
    assert len(app.state.front.admission) == 0


def test_no_body_breaks_the_server() -> None:
    check_that_nothing_breaks(SOME)


@pytest.mark.slow
def test_no_body_of_very_many_breaks_the_server() -> None:
    check_that_nothing_breaks(MANY)
