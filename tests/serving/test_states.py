"""States: the same tokens as going on, for as long as was asked, and for their owner alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from actors.state_store import StateStore
from crsm.model import Checkpoint
from crsm.tasks import build_task
from tests.fixtures import FakeClock
from tests.serving.fakes import LABELS, FakeBackend, an_app, ask, client, complete, error_of, payloads, words

# ---------------------------------------------------------------------------------------- over a backend that counts


def state_of(answer: httpx.Response) -> str:
    (note,) = answer.json()["crsm"]["choices"]
    return str(note["state"])


def test_an_answer_that_was_cut_short_goes_on_from_its_state() -> None:
    app = an_app()
    first = complete(app, max_tokens=3, crsm={"save_state": True})
    state = state_of(first)
    assert state.startswith("state-")
    more = complete(app, prompt="", max_tokens=4, crsm={"state": state}).json()
    text = first.json()["choices"][0]["text"] + more["choices"][0]["text"]
    assert text == words(3, 7), "with the space between"
    assert more["usage"] == {"prompt_tokens": 0, "completion_tokens": 4, "total_tokens": 4}
    for prompt in ([], " "):
        assert complete(app, prompt=prompt, max_tokens=4, crsm={"state": state}).json()["choices"] == more["choices"]


def test_a_next_turn_reads_only_what_is_new() -> None:
    backend = FakeBackend(ends_after=2)
    app = an_app(backend)
    state = state_of(complete(app, crsm={"save_state": True}))
    over = complete(app, prompt="", crsm={"state": state})
    assert over.status_code == 400 and error_of(over)["param"] == "prompt"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "4"}], "crsm": {"state": state}}
    answer = ask(app, "POST", "/v1/chat/completions", json=body).json()
    assert backend.requests[-1].prompt == (LABELS[4],) and answer["usage"]["prompt_tokens"] == 1
    # 3 tokens of prompt, 3 said, 1 new.
    assert answer["choices"][0]["message"]["content"] == words(7, 2)
    empty = ask(app, "POST", "/v1/chat/completions", json={**body, "messages": []})
    assert empty.status_code == 400


def test_a_stream_tells_its_state_at_its_end() -> None:
    app = an_app()
    events = payloads(complete(app, n=2, max_tokens=3, stream=True, crsm={"save_state": 60}).text)
    states = [event["crsm"]["state"] for event in events if "crsm" in event]
    assert len(set(states)) == 2
    for state in states:
        assert complete(app, prompt="", max_tokens=1, crsm={"state": state}).json()["choices"][0]["text"] == " 6"


def test_an_answer_that_a_stop_string_or_a_deadline_ended_goes_on_right_after_its_last_token() -> None:
    backend = FakeBackend(bundle=100)
    app = an_app(backend)
    answer = complete(app, max_tokens=50, stop="5 6", crsm={"save_state": True})
    assert answer.json()["choices"][0]["text"] == "3 4 "
    more = complete(app, prompt="", max_tokens=2, crsm={"state": state_of(answer)}).json()
    assert more["choices"][0]["text"] == " 7 0", "the token that completed the stop string was said"
    backend.bundle, backend.hangs_after = 1, 2
    answer = complete(app, max_tokens=50, crsm={"save_state": True, "deadline": 0.1})
    backend.hangs_after = None
    assert answer.json()["choices"][0]["text"] == "3 4"
    more = complete(app, prompt="", max_tokens=2, crsm={"state": state_of(answer)}).json()
    assert more["choices"][0]["text"] == " 5 6"
    assert backend.open == set()


@pytest.mark.parametrize(
    "what", [{"prompt": "0 1 2"}, {"prompt": LABELS[:3]}, {"messages": [{"role": "user", "content": "0 1 2"}]}]
)
def test_a_prompt_can_be_read_beforehand(what: dict[str, Any]) -> None:
    app = an_app()
    answer = ask(app, "POST", "/v1/states", json={"model": "tiny", "ttl": 60, **what})
    state = answer.json()
    assert answer.status_code == 201 and state["object"] == "crsm.state" and state["model"] == "tiny"
    assert state["position"] == 2 and state["bytes"] > 0
    assert state["expires_at"] - state["created"] in (59, 60)
    said = complete(app, prompt="", max_tokens=4, crsm={"state": state["id"]}).json()
    assert said["choices"][0]["text"].split() == words(3, 4).split()


def test_a_speaking_generation_can_be_kept_while_it_goes_on() -> None:
    backend = FakeBackend(hangs_after=4)
    app = an_app(backend)

    async def play() -> tuple[httpx.Response, httpx.Response]:
        async with client(app) as there:
            body = {"model": "tiny", "prompt": "0 1 2", "max_tokens": 9, "crsm": {"deadline": 5}}
            running = asyncio.create_task(there.post("/v1/completions", json=body))
            while not backend._speaking or backend._speaking.get(backend.requests[0].generation_id) is None:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            name = backend.requests[0].generation_id
            kept = await there.post("/v1/states", json={"model": "tiny", "generation": name})
            unknown = await there.post("/v1/states", json={"model": "tiny", "generation": "cmpl-x-0"})
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return kept, unknown

    kept, unknown = asyncio.run(play())
    assert kept.status_code == 201 and unknown.status_code == 404
    assert error_of(unknown)["code"] == "generation_not_found"
    backend.hangs_after = None
    more = complete(app, prompt="", max_tokens=2, crsm={"state": kept.json()["id"]}).json()
    assert more["choices"][0]["text"] == f" {words(kept.json()['position'] + 1, 2)}"


def test_a_fork_lives_on_when_the_first_is_gone() -> None:
    app = an_app()
    first = state_of(complete(app, max_tokens=3, crsm={"save_state": True}))
    for body in ({}, {"json": {}}, {"json": {"ttl": 60}}):
        fork = ask(app, "POST", f"/v1/states/{first}/fork", **body)
        assert fork.status_code == 201 and fork.json()["id"] != first
    gone = ask(app, "DELETE", f"/v1/states/{first}")
    assert gone.json() == {"id": first, "object": "crsm.state", "deleted": True}
    for answer in (
        ask(app, "DELETE", f"/v1/states/{first}"),
        ask(app, "GET", f"/v1/states/{first}"),
        ask(app, "POST", f"/v1/states/{first}/fork"),
        complete(app, prompt="", crsm={"state": first}),
    ):
        assert answer.status_code == 404 and error_of(answer)["code"] == "state_not_found"
    assert complete(app, prompt="", crsm={"state": fork.json()["id"]}).status_code == 200
    described = ask(app, "GET", f"/v1/states/{fork.json()['id']}").json()
    assert described["position"] == fork.json()["position"] and described["created"] is None


def test_a_state_is_gone_when_its_time_is_over() -> None:
    backend, clock = FakeBackend(), FakeClock()
    backend.states = StateStore(10**7, clock)
    app = an_app(backend)
    state = state_of(complete(app, max_tokens=3, crsm={"save_state": 10}))
    clock.now += 9.0
    assert ask(app, "GET", f"/v1/states/{state}").status_code == 200
    clock.now += 2.0
    answer = complete(app, prompt="", crsm={"state": state})
    assert answer.status_code == 404 and error_of(answer)["param"] == "crsm.state"


def test_a_state_is_only_its_owners() -> None:
    app = an_app(api_keys=("mine", "yours"))

    def as_one(key: str, method: str, path: str, **what: Any) -> httpx.Response:
        return ask(app, method, path, headers={"authorization": f"Bearer {key}"}, **what)

    body = {"model": "tiny", "prompt": "0", "max_tokens": 2, "crsm": {"save_state": True}}
    state = state_of(as_one("mine", "POST", "/v1/completions", json=body))
    for answer in (
        as_one("yours", "GET", f"/v1/states/{state}"),
        as_one("yours", "DELETE", f"/v1/states/{state}"),
        as_one("yours", "POST", f"/v1/states/{state}/fork"),
        as_one("yours", "POST", "/v1/completions", json={**body, "prompt": "", "crsm": {"state": state}}),
    ):
        assert answer.status_code == 404 and error_of(answer)["code"] == "state_not_found"
    assert as_one("mine", "DELETE", f"/v1/states/{state}").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "0", "generation": "x"}, "generation"),
        ({"prompt": ["0", "1"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": "0", "ttl": 0}, "ttl"),
        ({"prompt": "0", "ttl": 1e9}, "ttl"),
        ({"prompt": "0", "ttl": float("inf")}, "ttl"),
    ],
)
def test_a_state_that_cannot_be_made_is_refused(body: dict[str, Any], param: str) -> None:
    import json

    content = json.dumps({"model": "tiny", **body})
    answer = ask(an_app(), "POST", "/v1/states", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_a_state_larger_than_the_store_is_refused() -> None:
    backend = FakeBackend()
    backend.states = StateStore(10)
    for answer in (
        ask(an_app(backend), "POST", "/v1/states", json={"model": "tiny", "prompt": "0"}),
        complete(an_app(backend), crsm={"save_state": True}),
    ):
        assert answer.status_code == 400 and "allowed: at most 10" in error_of(answer)["message"]


# --------------------------------------------------------------------------------------------- over the shipped model


@pytest.fixture
def there(nano_address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=nano_address, timeout=60) as client:
        yield client


def say(there: httpx.Client, **body: Any) -> tuple[str, Any]:
    answer = there.post("/v1/completions", json={"model": "nano", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.json()["crsm"]["choices"][0]["state"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 11}])
def test_a_restored_answer_says_the_same_tokens_as_one_that_went_on(
    there: httpx.Client, nano: Checkpoint, sampling: dict[str, Any]
) -> None:
    prompt = build_task(nano.config.tasks[0]).generate(nano.config.seed, "test", 5).prompt
    system_1 = {"channel": "off"}
    whole, _ = say(there, prompt=prompt, max_tokens=7, crsm=system_1, **sampling)
    for cut in (1, 3, 5):
        first, state = say(there, prompt=prompt, max_tokens=cut, crsm={**system_1, "save_state": True}, **sampling)
        # Twice: a state is a value.
        for _ in range(2):
            rest, _ = say(there, prompt="", max_tokens=7 - cut, crsm={"state": state})
            assert first + rest == whole


def test_a_prompt_that_was_read_beforehand_is_answered_as_if_it_came_at_once(
    there: httpx.Client, nano: Checkpoint
) -> None:
    problem = build_task(nano.config.tasks[0]).generate(nano.config.seed, "test", 6)
    whole, _ = say(there, prompt=problem.prompt)
    state = there.post("/v1/states", json={"model": "nano", "prompt": problem.prompt}).json()
    assert state["position"] == len(nano.tokenizer.encode(problem.prompt)) - 1
    said, _ = say(there, prompt="", crsm={"state": state["id"]})
    assert said.split() == whole.split()


def test_a_conversation_goes_on_from_its_state_at_a_size_that_does_not_grow(
    there: httpx.Client, nano: Checkpoint
) -> None:
    task = build_task(nano.config.tasks[0])
    state, sizes = None, []
    for index in range(3):
        problem = task.generate(nano.config.seed, "test", index)
        options = {"save_state": True} if state is None else {"save_state": True, "state": state}
        body = {"model": "nano", "messages": [{"role": "user", "content": problem.prompt}], "crsm": options}
        answer = there.post("/v1/chat/completions", json=body).json()
        assert answer["usage"]["prompt_tokens"] == len(nano.tokenizer.encode(problem.prompt))
        state = answer["crsm"]["choices"][0]["state"]
        described = there.get(f"/v1/states/{state}").json()
        sizes.append(described["bytes"])
    assert described["position"] > 3 * 31 and max(sizes) < 2 * min(sizes)
