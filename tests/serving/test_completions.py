"""Completions over a backend that counts: what is said, what is told beside it, and how requests end."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from actors.serving.backend import GenerationFailed
from actors.serving.sse import DONE
from crsm.engine import QueueFull
from crsm.plan_events import PlanEvent
from crsm.types import Reason
from tests.serving.fakes import (
    LABELS,
    FakeBackend,
    an_app,
    ask,
    client,
    complete,
    error_of,
    payloads,
    streamed,
    words,
)


def chat(app: Any, **body: Any) -> Any:
    messages = [{"role": "user", "content": "0 1"}, {"role": "assistant", "content": "2"}]
    return ask(app, "POST", "/v1/chat/completions", json={"model": "tiny", "messages": messages, **body})


# ---------------------------------------------------------------------------------------------------------- the answer


def test_a_completion_says_the_text_and_what_it_cost() -> None:
    answer = complete(an_app(), max_tokens=4).json()
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": words(3, 4), "logprobs": None, "finish_reason": "length"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert (answer["object"], answer["model"], answer["system_fingerprint"]) == (
        "text_completion",
        "tiny",
        "0123456789abcdef",
    )
    assert answer["crsm"]["choices"] == [
        {
            "index": 0,
            "generation": f"{answer['id']}-0",
            "finish": "length",
            "verdict": None,
            "injections": [],
            "state": None,
        }
    ]


def test_an_answer_that_ends_by_itself_says_its_verdict_apart_from_its_text() -> None:
    answer = complete(an_app(FakeBackend(ends_after=2)), max_tokens=9).json()
    assert answer["choices"][0]["text"] == words(3, 2) and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3
    note = answer["crsm"]["choices"][0]
    assert (note["verdict"], note["finish"]) == ("yes", "stop")


def test_a_chat_reads_all_messages_in_turn() -> None:
    backend = FakeBackend()
    answer = chat(an_app(backend), max_completion_tokens=2, logprobs=True).json()
    assert backend.requests[0].prompt == tuple(LABELS[:3])
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": words(3, 2), "refusal": None}
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["3", " 4"]
    assert choice["logprobs"]["content"][1]["bytes"] == [32, 52]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")


def test_a_message_may_come_in_parts_and_as_a_client_gives_it_back() -> None:
    backend = FakeBackend()
    parts = [{"type": "text", "text": "0 "}, {"type": "text", "text": "1"}]
    given_back = {"role": "assistant", "content": "2", "refusal": None, "tool_calls": None, "annotations": []}
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts, "name": "Ann"}, given_back]}
    assert ask(an_app(backend), "POST", "/v1/chat/completions", json=body).status_code == 200
    assert backend.requests[0].prompt == tuple(LABELS[:3])


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "wizard", "content": "0"}], "messages[0].role"),
        ([{"role": "user", "content": "hello"}], "messages"),
        ([{"role": "user", "content": "0", "color": 1}], "messages[0].color"),
        ([{"role": "assistant", "content": "0", "tool_calls": [1]}], "messages[0].tool_calls"),
    ],
)
def test_messages_that_cannot_be_read_are_refused(messages: Any, param: str) -> None:
    answer = chat(an_app(), messages=messages)
    assert answer.status_code == 400 and error_of(answer)["param"].startswith(param)


def test_a_template_that_refuses_the_messages_is_the_clients_error() -> None:
    backend = FakeBackend(chat_template="{{ raise_exception('roles must alternate') }}")
    answer = chat(an_app(backend))
    assert answer.status_code == 400 and "roles must alternate" in error_of(answer)["message"]


def test_log_probabilities_stand_beside_the_tokens_and_their_places() -> None:
    (choice,) = complete(an_app(), max_tokens=2, logprobs=0).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["3", " 4"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": None,
        "text_offset": [0, 1],
    }


def test_the_echo_is_the_prompt_and_the_answer_goes_on_from_it() -> None:
    for prompt in ("0 1 2", LABELS[:3]):
        (choice,) = complete(an_app(), prompt=prompt, echo=True, max_tokens=2).json()["choices"]
        assert choice["text"] == f"0 1 2 {words(3, 2)}"


def test_choices_of_several_prompts_are_made_side_by_side_and_numbered_in_order() -> None:
    backend = FakeBackend(seconds=0.001)
    answer = complete(
        an_app(backend), prompt=["0", "0 1 2"], n=3, seed=5, temperature=1, max_tokens=3, stream=False
    ).json()
    starts = [1, 1, 1, 3, 3, 3]
    assert [choice["text"] for choice in answer["choices"]] == [
        words(start + 5 + index, 3) for index, start in enumerate(starts)
    ]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert backend.most_at_once == 6
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 18, "total_tokens": 22}


# ---------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("bundle", [1, 3, 100])
def test_a_stream_says_the_same_text_as_an_answer(bundle: int) -> None:
    app = an_app(FakeBackend(bundle=bundle, ends_after=20), stream_interval=0)
    whole = complete(app, max_tokens=30).json()
    events = payloads(complete(app, max_tokens=30, stream=True).text)
    assert streamed(events) == whole["choices"][0]["text"] == words(3, 20)
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["crsm"] == {"finish": "stop", "verdict": "yes", "state": None}
    assert len({event["id"] for event in events}) == 1 and not any("crsm" in event for event in events[:-1])


def test_tokens_share_events_when_they_come_faster_than_events_may() -> None:
    app = an_app(FakeBackend(), stream_interval=10)
    events = payloads(complete(app, max_tokens=200, stream=True).text)
    assert streamed(events) == words(3, 200)
    assert len(events) == 2, "the first token at once, the others at the end"
    assert events[0]["choices"][0]["text"] == "3"


def test_a_chat_stream_names_the_role_once() -> None:
    events = payloads(chat(an_app(stream_interval=0), max_tokens=5, stream=True).text)
    roles = [event["choices"][0]["delta"].get("role") for event in events]
    assert roles == ["assistant", *[None] * (len(events) - 1)] and streamed(events) == words(3, 5)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_several_choices_share_a_stream_one_to_an_event() -> None:
    app = an_app(FakeBackend(seconds=0.001), stream_interval=0)
    events = payloads(complete(app, n=3, seed=1, temperature=1, max_tokens=6, stream=True).text)
    assert all(len(event["choices"]) == 1 for event in events)
    for index in range(3):
        assert streamed(events, index) == words(3 + 1 + index, 6)
        reasons = [event["choices"][0]["finish_reason"] for event in events if event["choices"][0]["index"] == index]
        assert reasons[-1] == "length" and set(reasons[:-1]) <= {None}


def test_the_usage_comes_last_if_it_is_asked_for() -> None:
    *events, last = payloads(
        complete(an_app(), max_tokens=5, n=2, stream=True, stream_options={"include_usage": True}).text
    )
    assert last["choices"] == [] and last["usage"] == {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
    assert all(event["usage"] is None for event in events)


def test_streamed_log_probabilities_are_those_of_the_answer() -> None:
    app = an_app(FakeBackend(bundle=2), stream_interval=0)
    whole = complete(app, max_tokens=7, logprobs=1).json()["choices"][0]["logprobs"]
    parts = [
        event["choices"][0]["logprobs"] for event in payloads(complete(app, max_tokens=7, logprobs=1, stream=True).text)
    ]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for part in parts if part for each in part[name]] == whole[name]


def an_event(request: Any, position: int) -> list[Any]:
    event = PlanEvent(request.generation_id, "request", 0.5, position, position, position + 2, 2)
    return [event, dataclasses.replace(event, kind="reject", reason=Reason.STALE)]


def test_events_come_in_order_with_the_tokens_they_belong_to() -> None:
    app = an_app(FakeBackend(events=an_event), stream_interval=0)
    events = payloads(complete(app, max_tokens=4, stream=True, crsm={"events": True}).text)
    told = [told for event in events for told in event["crsm"]["events"]]
    assert [(each["type"], each["position"]) for each in told] == [
        (kind, position) for position in range(3, 7) for kind in ("crsm.request", "crsm.reject")
    ]
    tokens = [token for event in events for token in event["crsm"]["tokens"]]
    assert [(token["position"], token["text"], token["injected"]) for token in tokens] == [
        (3, "3", False),
        (4, " 4", False),
        (5, " 5", False),
        (6, " 6", False),
    ]
    assert all(event["crsm"]["t"] >= 0 for event in events)
    assert events[-1]["crsm"]["finish"] == "length"
    (note,) = complete(app, max_tokens=4, crsm={"events": True}).json()["crsm"]["choices"]
    assert note["events"] == told


def test_clients_that_do_not_ask_for_events_get_none() -> None:
    backend = FakeBackend(events=an_event)
    answer = complete(an_app(backend), max_tokens=4, stream=True)
    assert "crsm.request" not in answer.text and not backend.requests[0].watch


def test_the_lines_of_an_event_log_come_with_the_stream() -> None:
    app = an_app(FakeBackend(events=an_event), stream_interval=0)
    events = payloads(complete(app, max_tokens=3, stream=True, crsm={"log": True}).text)
    lines = [line for event in events for line in event["crsm"]["log"]]
    (note,) = complete(app, max_tokens=3, crsm={"log": True}).json()["crsm"]["choices"]
    for log in (lines, note["log"]):
        kinds = [line.split('"')[3] for line in log]
        assert kinds == ["start", *["request", "reject", "token"] * 3]


# -------------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it_and_the_generation_with_it(stream: bool) -> None:
    backend = FakeBackend(hangs_after=8)
    answer = complete(an_app(backend, stream_interval=0), max_tokens=50, stop=["6 7", "never"], stream=stream)
    if stream:
        events = payloads(answer.text)
        text, last = streamed(events), events[-1]["choices"][0]
        note = events[-1]["crsm"]
    else:
        (last,) = answer.json()["choices"]
        text, note = last["text"], answer.json()["crsm"]["choices"][0]
        assert answer.json()["usage"]["completion_tokens"] == 5
    assert text == "3 4 5 " and last["finish_reason"] == "stop"
    assert note["finish"] == "stop" and note["verdict"] is None
    assert backend.open == set() and backend.finished == [], "the generation was ended, not waited for"


def test_a_stop_string_holds_back_log_probabilities_and_tokens_too() -> None:
    app = an_app(stream_interval=0)
    answer = complete(app, max_tokens=50, stop="6 7", stream=True, logprobs=1, crsm={"events": True})
    events = payloads(answer.text)
    assert "".join(token["text"] for event in events for token in event["crsm"]["tokens"]) == streamed(events)
    parts = [event["choices"][0]["logprobs"] for event in events]
    assert "".join(token for part in parts if part for token in part["tokens"]) == "3 4 5 "


# ------------------------------------------------------------------------------------------------------------ its end


def test_at_its_deadline_an_answer_is_what_was_said() -> None:
    backend = FakeBackend(hangs_after=3)
    answer = complete(an_app(backend), max_tokens=50, crsm={"deadline": 0.1}).json()
    assert answer["choices"][0]["text"] == words(3, 3) and answer["choices"][0]["finish_reason"] == "length"
    assert answer["crsm"]["choices"][0]["finish"] == "deadline"
    events = payloads(complete(an_app(backend), max_tokens=50, stream=True, crsm={"deadline": 0.1}).text)
    assert streamed(events) == words(3, 3) and events[-1]["crsm"]["finish"] == "deadline"
    assert backend.open == set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_the_first_token_is_an_error(stream: bool) -> None:
    backend = FakeBackend(hangs_after=0)
    app = an_app(backend)
    answer = complete(app, stream=stream, n=2, crsm={"deadline": 0.05})
    assert answer.status_code == 408 and "0.05 s" in error_of(answer)["message"]
    assert backend.open == set() and len(app.state.front.admission) == 0


def test_every_request_has_a_deadline() -> None:
    answer = complete(an_app(FakeBackend(hangs_after=0), max_deadline=0.05))
    assert answer.status_code == 408


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ValueError("pace = 7: not so; allowed: less"), 400, "invalid_request_error"),
        (QueueFull("9 generations wait"), 429, "rate_limit_error"),
        (GenerationFailed("the generator died"), 503, "server_error"),
        (RuntimeError("something secret"), 500, "server_error"),
    ],
)
def test_an_error_before_the_first_token_is_an_answer_of_its_own(
    error: Exception, status: int, kind: str, stream: bool
) -> None:
    backend = FakeBackend(fails_after=0, error=error)
    app = an_app(backend)
    answer = complete(app, stream=stream, n=2)
    told = error_of(answer)
    assert (answer.status_code, told["type"]) == (status, kind)
    assert (status == 500) == (str(error) not in told["message"]) and "secret" not in answer.text
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert backend.open == set() and len(app.state.front.admission) == 0


def test_an_error_in_the_middle_of_a_stream_ends_it_in_words() -> None:
    backend = FakeBackend(fails_after=3, error=GenerationFailed("the generator died"))
    answer = complete(an_app(backend, stream_interval=0), max_tokens=9, stream=True)
    assert answer.status_code == 200
    *events, last = payloads(answer.text)
    assert streamed(events) == words(3, 3), "what was said before is not lost"
    assert last["error"]["type"] == "server_error" and "the generator died" in last["error"]["message"]
    assert backend.open == set()


def test_an_error_after_some_tokens_of_an_answer_that_is_not_streamed_is_an_error() -> None:
    backend = FakeBackend(fails_after=3, error=GenerationFailed("the generator died"))
    answer = complete(an_app(backend), max_tokens=9)
    assert answer.status_code == 503 and error_of(answer)["code"] == "generation_failed"


def test_beyond_the_limit_generations_are_refused_with_a_time_to_come_again() -> None:
    backend = FakeBackend(hangs_after=2)
    app = an_app(backend, max_concurrent=3, max_n=3)

    async def play() -> Any:
        async with client(app) as there:
            body = {"model": "tiny", "prompt": "0", "max_tokens": 9, "crsm": {"deadline": 5}}
            running = asyncio.create_task(there.post("/v1/completions", json={**body, "n": 2}))
            while backend.most_at_once < 2:
                await asyncio.sleep(0.001)
            refused = await there.post("/v1/completions", json={**body, "n": 2})
            states = [await there.post("/v1/states", json={"model": "tiny", "prompt": "0"}) for _ in range(2)]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            backend.hangs_after = None
            return refused, states, await there.post("/v1/completions", json=body)

    refused, states, after = asyncio.run(play())
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 30
    error = error_of(refused)
    assert error["type"] == "rate_limit_error" and "max_concurrent" in error["message"]
    assert [state.status_code for state in states] == [201, 201], "there was room for one more"
    assert after.status_code == 200, "those that were cancelled left their places"


def test_a_stream_ends_with_its_mark() -> None:
    assert complete(an_app(), stream=True, max_tokens=3).content.endswith(DONE)
    headers = complete(an_app(), stream=True, max_tokens=3).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8" and headers["cache-control"] == "no-cache"


def test_answers_name_the_weights_that_made_them() -> None:
    backend = FakeBackend()
    app = an_app(backend)
    before = complete(app, max_tokens=1).json()["system_fingerprint"]
    backend._model = dataclasses.replace(backend.model, weights_hash="other", model_version=4)
    after = complete(app, max_tokens=1, crsm={"log": True}).json()
    assert (before, after["system_fingerprint"]) == ("0123456789abcdef", "other")
    assert '"model_version": 4' in after["crsm"]["choices"][0]["log"][0]
