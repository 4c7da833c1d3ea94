"""What stands before Serve's proxy: nothing a client can see is Serve's own wording, and no stream just breaks off."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from actors.service_edge import Edge

SCOPE = {"type": "http", "path": "/v1/completions", "headers": [(b"x-session-id", b"s")]}
EVENTS = [(b"Content-Type", b"text/event-stream; charset=utf-8")]


def start(status: int = 200, headers: list[tuple[bytes, bytes]] = EVENTS) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


def through(*messages: dict[str, Any] | Exception, scope: dict[str, Any] = SCOPE) -> tuple[list[Any], dict[str, Any]]:
    """What comes out when the proxy says these; and the scope that the proxy sees."""
    seen: dict[str, Any] = {}
    sent: list[Any] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)
        for message in messages:
            if isinstance(message, Exception):
                raise message
            await send(message)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    asyncio.run(Edge(proxy)(scope, receive, send))
    return sent, seen


def error(sent: list[Any]) -> dict[str, Any]:
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (b"content-type", b"application/json") in sent[0]["headers"] and not sent[1]["more_body"]
    found: dict[str, Any] = json.loads(sent[1]["body"])["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_a_whole_answer_passes_as_it_is() -> None:
    messages = [start(), body(b"data: 1\n\n", more=True), body(b"data: [DONE]\n\n")]
    assert through(*messages)[0] == messages
    plain = [start(200, [(b"content-type", b"application/json")]), body(b"{}")]
    assert through(*plain)[0] == plain
    own = [start(404, [(b"content-type", b"application/json")]), body(b'{"error": {}}')]
    assert through(*own)[0] == own, "errors of the front are its own"


@pytest.mark.parametrize("ends", [(), (RuntimeError("the proxy failed"),)], ids=["silently", "with an exception"])
def test_a_stream_whose_replica_dies_ends_with_an_error_and_done(ends: tuple[Exception, ...]) -> None:
    begun = [start(), body(b"data: 1\n\n", more=True)]
    sent, _ = through(*begun, *ends)
    assert sent[:2] == begun and len(sent) == 3 and not sent[2]["more_body"]
    event, done, rest = sent[2]["body"].split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert done == b"data: [DONE]" and rest == b""


def test_an_answer_that_never_begins_is_503() -> None:
    sent, _ = through()
    assert sent[0]["status"] == 503 and error(sent)["code"] == "replica_gone"
    sent, _ = through(RuntimeError("boom"))
    assert sent[0]["status"] == 503 and "boom" not in error(sent)["message"]


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (404, 503, "server_error"),
        (408, 408, "timeout_error"),
        (429, 429, "rate_limit_error"),
        (500, 500, "server_error"),
    ],
)
def test_what_serve_says_by_itself_is_said_in_openais_form(status: int, said: int, kind: str) -> None:
    sent, _ = through(
        start(status, [(b"content-type", b"text/plain")]), body(b"Traceback: secret", more=True), body(b"")
    )
    assert sent[0]["status"] == said and error(sent)["type"] == kind and b"secret" not in sent[1]["body"]
    assert any(name == b"retry-after" for name, _ in sent[0]["headers"]) == (said in (429, 503))


def test_headers_that_steer_serve_are_not_the_clients_to_set() -> None:
    headers = [
        (b"X-Request-Timeout-Seconds", b"0.001"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"serve_multiplexed_model_id", b"m"),
        (b"x-session-id", b"s"),
        (b"authorization", b"Bearer \xff"),
    ]
    _, seen = through(start(), body(b""), scope={**SCOPE, "headers": headers})
    assert [name for name, _ in seen["headers"]] == [b"x-session-id", b"authorization"]


@pytest.mark.parametrize("name", [b"x-session-id", b"X-Session_Id", b"x-request-id"])
def test_a_header_that_serve_cannot_read_is_refused(name: bytes) -> None:
    sent, seen = through(scope={**SCOPE, "headers": [(name, b"\xff")]})
    assert sent[0]["status"] == 400 and "ASCII" in error(sent)["message"] and not seen


def test_a_requests_id_is_named_once() -> None:
    ids = [(b"x-request-id", b"a"), *EVENTS, (b"X-Request-ID", b"a")]
    sent, _ = through(start(200, ids), body(b""))
    assert sent[0]["headers"] == ids[:2]


@pytest.mark.parametrize("scope", [{"type": "lifespan"}, {**SCOPE, "path": "/-/healthz"}], ids=["lifespan", "healthz"])
def test_serves_own_affairs_are_left_alone(scope: dict[str, Any]) -> None:
    messages = [start(503, [(b"content-type", b"text/plain")]), body(b"no")]
    assert through(*messages, scope=scope)[0] == messages


def waiting(answers_health: bool, seconds: float = 0.3) -> tuple[list[Any], int]:
    """What a client hears whose request takes so long, and how often somebody asked whether anybody is there."""
    probes = 0
    sent: list[Any] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        nonlocal probes
        if scope["path"] == "/healthz":
            probes += 1
            assert scope["method"] == "GET" and b"authorization" not in dict(scope["headers"])
            if not answers_health:
                assert (await receive())["type"] == "http.disconnect"
                return
        else:
            gone = asyncio.create_task(receive())
            await asyncio.wait((gone,), timeout=seconds)
            if gone.done():  # as Serve's proxy does
                assert gone.result() == {"type": "http.disconnect"}
                return
            gone.cancel()
        await send(start(200, [(b"content-type", b"application/json")]))
        await send(body(b"{}"))

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(60)  # the client waits

    asyncio.run(Edge(proxy)(SCOPE, receive, send))
    return sent, probes


def test_nobody_waits_for_a_replica_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.service_edge.PATIENCE", 0.01)
    monkeypatch.setattr("actors.service_edge.PROBE_SECONDS", 0.05)
    sent, probes = waiting(answers_health=False, seconds=30)
    assert sent[0]["status"] == 503 and error(sent)["code"] == "no_replica" and probes == 1
    assert (b"retry-after", b"1") in sent[0]["headers"]


def test_who_waits_for_a_replica_that_is_busy_goes_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.service_edge.PATIENCE", 0.05)
    sent, probes = waiting(answers_health=True)
    assert sent[0]["status"] == 200 and probes >= 2


def test_while_others_are_answered_nobody_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.service_edge.PATIENCE", 0.05)

    async def main() -> None:
        probes = 0

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            nonlocal probes
            if scope["path"] == "/healthz":
                probes += 1
                return
            await asyncio.sleep(0.4 if scope["path"] == "/v1/completions" else 0.0)
            for message in (start(200, [(b"content-type", b"application/json")]), body(b"{}")):
                await send(message)

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def nowhere(message: Any) -> None:
            pass

        async def receive() -> Any:
            await asyncio.sleep(60)

        edge = Edge(proxy)
        slow = asyncio.ensure_future(edge(SCOPE, receive, send))
        while not slow.done():
            await edge({**SCOPE, "path": "/v1/models"}, receive, nowhere)
            await asyncio.sleep(0.01)
        assert probes == 0 and sent[0]["status"] == 200

    asyncio.run(main())


def test_more_requests_than_replicas_let_in_are_refused_at_the_door() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            for message in (start(), body(b"data: [DONE]\n\n")):
                await send(message)

        edge = Edge(proxy, most_open=2)

        async def ask(path: str = "/v1/completions", method: str = "POST") -> list[Any]:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            async def receive() -> Any:
                return await asyncio.Event().wait()

            await edge({"type": "http", "path": path, "method": method, "headers": []}, receive, send)
            return sent

        served = [asyncio.ensure_future(ask()) for _ in range(2)]
        others = [asyncio.ensure_future(ask("/v1/models", "GET")), asyncio.ensure_future(ask("/v1/crsm/check"))]
        await asyncio.sleep(0)
        refused = await ask("/v1/chat/completions")
        assert refused[0]["status"] == 429 and (b"retry-after", b"1") in refused[0]["headers"]
        assert error(refused)["code"] == "rate_limit_exceeded"
        go.set()
        assert all(sent[0]["status"] == 200 for sent in await asyncio.gather(*served, *others))
        assert (await ask())[0]["status"] == 200

    asyncio.run(main())
