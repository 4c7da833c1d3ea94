"""The application around completions: errors in OpenAI's form, keys, CORS, limits, probes, problems, planners, page."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.serving import app as app_module
from actors.serving.app import build_app
from actors.serving.settings import ServeSettings
from tests.serving.fakes import Counts, FakeBackend, an_app, ask, client, complete, error_of

BODY = {"model": "tiny", "prompt": "0"}


def post(app: Any, content: bytes, **headers: str) -> httpx.Response:
    return ask(app, "POST", "/v1/completions", content=content, headers={"content-type": "application/json", **headers})


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"temperature": "warm"}, "temperature", "temperature = 'warm'; allowed: a valid number"),
        ({"temperature": 3}, "temperature", "temperature = 3; allowed: less than or equal to 2"),
        ({"temperature": True}, "temperature", "temperature = true; allowed: a valid number"),
        ({"top_p": 0}, "top_p", "top_p = 0; allowed: greater than 0"),
        ({"n": 0}, "n", "n = 0; allowed: greater than or equal to 1"),
        ({"max_tokens": 2**70}, "max_tokens", "max_tokens = 1180591620717411303424; allowed: less than 2147483648"),
        ({"seed": 2**63}, "seed", "allowed: less than"),
        ({"stream": "yes"}, "stream", "stream = 'yes'; allowed: a valid boolean"),
        ({"stop": [1]}, "stop", "stop = a list of 1; allowed: a string or a list of strings"),
        ({"stop": ""}, "stop", "allowed: strings that are not empty"),
        ({"logprobs": 5}, "logprobs", "logprobs = 5; allowed: less than or equal to 1"),
        ({"prompt": {"a": 1}}, "prompt", "prompt = an object; allowed: a string, token ids, or a list of either"),
        ({"prompt": [1, "a"]}, "prompt", "item 1 is 'a'; allowed: token ids"),
        ({"prompt": [True]}, "prompt", "item 0 is 'True'"),
        ({"prompt": [-1]}, "prompt", "item 0 is '-1'"),
        ({"prompt": [[1], "a"]}, "prompt", "item 0"),
        ({"prompt": [0, 999]}, "prompt[1]", "prompt[1] = 999; allowed: 0 to "),
        ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        ({"prompt": ""}, "prompt", "the text is empty"),
        ({"prompt": ["0", ""]}, "prompt[1]", "the text is empty"),
        ({"suffix": "x"}, "suffix", "suffix = 'x'; allowed: null or ''"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty = 0.5; allowed: null or 0"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "logit_bias = an object; allowed: null or {}"),
        ({"unheard_of": 1}, "unheard_of", "unheard_of is not a field of this request; allowed: model, "),
        ({"crsm": {"unheard_of": 1}}, "crsm.unheard_of", "crsm.unheard_of is not a field"),
        ({"crsm": {"lag": -1}}, "crsm.lag", "crsm.lag = -1; allowed: greater than or equal to 0"),
        ({"crsm": {"lag": 65}}, "crsm.lag", "crsm.lag = 65; allowed: 0 to 64 (max_lag)"),
        ({"crsm": {"channel": "loud"}}, "crsm.channel", "allowed: 'state', 'policy', 'both' or 'off'"),
        ({"crsm": {"save_state": 0}}, "crsm.save_state", "allowed: true, or seconds above 0"),
        ({"crsm": 3}, "crsm", "crsm = 3; allowed: "),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    changes: dict[str, Any], param: str, message: str
) -> None:
    body = json.dumps({**BODY, **changes}).encode()
    answer = post(an_app(), body)
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "seed", "crsm.pace", "crsm.deadline", "crsm.injection_rate"])
def test_numbers_that_are_none_are_refused_with_their_field(field: str, value: str) -> None:
    name = field.removeprefix("crsm.")
    setting = f'"crsm": {{"{name}": {value}}}' if "." in field else f'"{name}": {value}'
    answer = post(an_app(), f'{{"model": "tiny", "prompt": "0", {setting}}}'.encode())
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        '{"model": "tiny"}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "0", "max_tokens": ' + b"9" * 4000 + b"}",
        b'{"model": "tiny", "prompt": "0", "temperature": ' + b"9" * 4000 + b"}",
        b'{"model": "tiny", "prompt": [' + b"9" * 4000 + b"]}",
        b'{"\\ud800": 1}',
        b'{"model": "\\udfff", "prompt": "0"}',
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_body_that_is_no_request_is_refused(content: bytes) -> None:
    answer = post(an_app(), content)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=latin-1", "json", "é"]
)
def test_another_content_type_is_refused(kind: str) -> None:
    answer = ask(an_app(), "POST", "/v1/completions", content=b"{}", headers={"content-type": kind.encode("utf-8")})
    assert answer.status_code == 415 and "application/json" in error_of(answer)["message"]


def test_json_in_utf_8_may_say_so() -> None:
    answer = post(an_app(), json.dumps(BODY).encode(), **{"content-type": 'Application/JSON; charset="UTF-8"'})
    assert answer.status_code == 200


def test_another_model_is_not_found() -> None:
    for answer in (
        complete(an_app(), model="gpt-4"),
        ask(an_app(), "GET", "/v1/models/gpt-4"),
        ask(an_app(), "POST", "/v1/states", json={"model": "gpt-4", "prompt": "0"}),
    ):
        error = error_of(answer)
        assert (answer.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


def test_unknown_paths_and_methods_are_refused_in_the_same_form() -> None:
    app = an_app()
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/states/a/b/c", 404),
        ("GET", "/v1/models/tiny/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
    ]:
        answer = ask(app, method, path)
        assert (answer.status_code, error_of(answer)["type"]) == (status, "invalid_request_error")
    assert answer.headers["allow"] == "GET"


def test_a_body_larger_than_allowed_is_refused_whatever_its_header_says() -> None:
    app = an_app(max_body_bytes=100)

    async def chunks() -> Any:
        for _ in range(50):
            yield b" " * 10

    announced = post(app, b" " * 101)
    counted = ask(app, "POST", "/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    for answer in (announced, counted):
        assert answer.status_code == 413 and answer.headers["connection"] == "close"
        assert "100 bytes (max_body_bytes)" in error_of(answer)["message"]
    assert post(app, json.dumps(BODY).encode().ljust(100)).status_code == 200


@pytest.mark.parametrize("length", [b"-1", b"ten", b"9" * 30, b"\xff"])
def test_a_content_length_that_is_none_is_refused(length: bytes) -> None:
    async def send() -> list[Any]:
        sent: list[Any] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-length", length), (b"content-type", b"application/json")],
        }

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def note(message: Any) -> None:
            sent.append(message)

        await an_app()(scope, receive, note)
        return sent

    start, *_ = asyncio.run(send())
    assert start["status"] in (400, 413)


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def never() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    answer = ask(
        an_app(body_seconds=0.05),
        "POST",
        "/v1/completions",
        content=never(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 408 and "0.05 s" in error_of(answer)["message"]


def test_a_fault_of_the_server_is_told_without_its_trace_and_logged_with_it(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeBackend):
        async def is_ready(self) -> bool:
            raise RuntimeError("the secret inside")

    answer = ask(an_app(Broken()), "GET", "/readyz", headers={"x-request-id": "mine-7"})
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in answer.text and "Traceback" not in answer.text and "mine-7" in error["message"]
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "mine-7" in record.getMessage() and "the secret inside" in str(record.exc_info[1])


# --------------------------------------------------------------------------------------------------- ids, logs, counts


@pytest.mark.parametrize(
    ("given", "echoed"),
    [("abc-1.2_3:/+=", True), ("x" * 129, False), ("", False), ("two words", False), ("line\tbreak", False)],
)
def test_a_request_id_is_echoed_if_it_can_be(given: str, echoed: bool) -> None:
    answer = ask(an_app(), "GET", "/healthz", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is echoed and answer.headers["x-request-id"]


def test_the_log_has_a_line_for_every_request_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "actors.serving")
    app = an_app()
    complete(app, prompt="7 6 5", max_tokens=3, crsm={"log": True})
    ask(app, "GET", "/nowhere%0aelse")
    lines = [record.getMessage() for record in caplog.records]
    first, second = (line.split() for line in lines)
    assert first[:3] == ["POST", "/v1/completions", "200"] and first[-3:-1] == ["3", "tokens"]
    assert second[:3] == ["GET", "/nowhere?else", "404"]
    assert "7 6 5" not in "".join(lines)


def test_prompts_are_logged_if_that_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "actors.serving")
    complete(an_app(log_prompts=True), prompt="7 6 5")
    assert "7 6 5" in caplog.text


def test_requests_and_tokens_are_counted_by_route() -> None:
    counts = Counts()
    app = build_app(FakeBackend(bundle=4), ServeSettings(), counts)
    complete(app, max_tokens=10)
    complete(app, model="other")
    ask(app, "GET", "/v1/states/abc")
    ask(app, "GET", "/a/path/of/the/clients/own")
    assert counts.requests == [
        ("/v1/completions", 200),
        ("/v1/completions", 404),
        ("/v1/states/{state_id}", 404),
        ("unknown", 404),
    ]
    assert counts.said == [4, 4, 2] and counts.intervals[0] is None and None not in counts.intervals[1:]
    assert len(counts.first_tokens) == 1 and counts.gauges == [(0, 1), (1, 0), (0, 0)]


# ---------------------------------------------------------------------------------------------------- keys and origins


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic right-1"},
        {"authorization": "right-1"},
        {"authorization": "Bearer right-1 right-2"},
        {"x-api-key": "right-1"},
    ],
)
def test_without_a_known_key_nothing_below_v1_is_answered(headers: dict[str, str]) -> None:
    app = an_app(api_keys=("right-1", "right-2"))
    for method, path in [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/nowhere"), ("PUT", "/v1")]:
        answer = ask(app, method, path, headers=headers)
        error = error_of(answer)
        assert (answer.status_code, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer" and "wrong" not in answer.text
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert ask(app, "GET", path, headers=headers).status_code == 200


def test_every_key_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRSM_API_KEYS", "right-3")
    app = an_app(api_keys=("right-1", "right-2"))
    for key in ("right-1", "right-2", "right-3"):
        answer = ask(app, "GET", "/v1/crsm/info", headers={"authorization": f"bearer {key}"})
        assert answer.status_code == 200 and answer.json()["auth"] is True


def test_two_authorizations_are_none() -> None:
    headers = [("authorization", "Bearer wrong"), ("authorization", "Bearer right")]
    assert ask(an_app(api_keys=("right",)), "GET", "/v1/models", headers=headers).status_code == 401


def test_pages_of_other_origins_may_call_only_if_they_are_named() -> None:
    ask_from = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed, opened = an_app(), an_app(cors_origins=("https://a.example",), api_keys=("key",))
    assert ask(closed, "OPTIONS", "/v1/completions", headers=ask_from).status_code == 405
    answer = ask(closed, "GET", "/healthz", headers=ask_from)
    assert "access-control-allow-origin" not in answer.headers
    answer = ask(opened, "OPTIONS", "/v1/completions", headers=ask_from)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
    # An error must reach the page as well.
    answer = ask(opened, "GET", "/v1/models", headers=ask_from)
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://a.example"
    answer = ask(opened, "GET", "/healthz", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in answer.headers


# ------------------------------------------------------------------------------------------------------ probes, drain


def test_a_server_that_drains_turns_new_generations_away_and_lets_running_ones_end() -> None:
    backend = FakeBackend(seconds=0.01)
    app = an_app(backend)

    async def play() -> tuple[httpx.Response, list[httpx.Response]]:
        async with client(app) as there:
            running = asyncio.create_task(there.post("/v1/completions", json={**BODY, "max_tokens": 20}))
            while not app.state.front.admission:
                await asyncio.sleep(0.001)
            app.state.draining = True
            paths = ("/v1/completions", "/v1/states")
            refused = [await there.post(path, json=BODY) for path in paths]
            return await running, [*refused, await there.get("/readyz"), await there.get("/healthz")]

    whole, (completion, state, ready, alive) = asyncio.run(play())
    assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 20
    for answer in (completion, state):
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert error_of(answer)["type"] == "server_error"
    assert (ready.status_code, alive.status_code) == (503, 200)


def test_a_server_is_ready_when_its_generator_is() -> None:
    backend = FakeBackend()
    app = an_app(backend)
    assert ask(app, "GET", "/readyz").json() == {"status": "ready"}
    backend.ready = False
    assert ask(app, "GET", "/readyz").status_code == 503 and ask(app, "GET", "/healthz").status_code == 200


# ----------------------------------------------------------------------------------------------- problems and planners


def test_a_problem_comes_with_its_graph_and_its_answer_is_checked() -> None:
    app = an_app()
    problem = ask(app, "GET", "/v1/crsm/problems/path_star?index=3").json()
    assert problem["solution"] == f"{problem['preamble']} {' '.join(map(str, problem['data']['path']))}"
    assert problem == ask(app, "GET", "/v1/crsm/problems/path_star?index=3").json()
    for text, correct in ((problem["solution"], True), (f"{problem['solution']} yes", True), ("0 1", False)):
        body = {"task": "path_star", "index": 3, "text": text}
        answer = ask(app, "POST", "/v1/crsm/check", json=body)
        assert answer.json() == {"correct": correct, "solution": problem["solution"]}


def test_problems_that_do_not_exist_are_refused() -> None:
    app = an_app()
    answer = ask(app, "GET", "/v1/crsm/problems/chess")
    assert answer.status_code == 404 and "allowed: path_star" in error_of(answer)["message"]
    for index in ("-1", "x", "1e3", str(2**31), "NaN"):
        answer = ask(app, "GET", f"/v1/crsm/problems/path_star?index={index}")
        assert (answer.status_code, error_of(answer)["param"]) == (400, "index")


def test_planners_can_be_counted_and_set_within_their_bounds() -> None:
    app = an_app()
    assert ask(app, "GET", "/v1/crsm/planners").json() == {"count": 1, "maximum": 4}
    assert ask(app, "PUT", "/v1/crsm/planners", json={"count": 3}).json() == {"count": 3, "maximum": 4}
    for count in (5, -1, 1.5, None, "2"):
        answer = ask(app, "PUT", "/v1/crsm/planners", json={"count": count})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "count")
    assert ask(app, "GET", "/v1/crsm/planners").json()["count"] == 3


def test_the_page_is_told_what_it_may_ask_for() -> None:
    info = ask(an_app(max_lag=9), "GET", "/v1/crsm/info").json()
    assert (info["model"], info["tasks"], info["layers"], info["auth"]) == ("tiny", ["path_star"], 2, False)
    assert info["defaults"]["lag"] == 1 and info["limits"]["max_lag"] == 9
    assert info["planners"] == {"count": 1, "maximum": 4}
    assert not {name for name in info["limits"] if not name.startswith("max_")}


def test_models_are_listed() -> None:
    app = an_app()
    (model,) = ask(app, "GET", "/v1/models").json()["data"]
    assert model["id"] == "tiny" and model == ask(app, "GET", "/v1/models/tiny").json()


def test_a_model_may_have_a_slash_in_its_name() -> None:
    app = an_app(FakeBackend(name="org/tiny"))
    assert ask(app, "GET", "/v1/models/org/tiny").json()["id"] == "org/tiny"


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_served_with_a_policy_that_lets_nothing_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>x</title>")
    (tmp_path / "main.js").write_text("1")
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    app = an_app(api_keys=("key",))
    answer = ask(app, "GET", "/")
    assert answer.status_code == 200 and "<title>x" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/", "/page/index.html"):
        assert ask(app, "GET", path).headers["location"] == "../"
    script = ask(app, "GET", "/page/main.js")
    assert script.headers["cache-control"] == "no-cache"
    assert script.status_code == 200 and "javascript" in script.headers["content-type"]
    assert script.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py"):
        assert error_of(ask(app, "GET", path)) and ask(app, "GET", path).status_code == 404


def test_without_a_page_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    assert ask(an_app(), "GET", "/").status_code == 404
