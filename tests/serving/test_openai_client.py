"""The official client, unmodified, over the shipped model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from actors.serving.app import build_app
from actors.serving.settings import ServeSettings
from crsm.engine import Engine, QueueFull
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.tasks import build_task
from tests.serving.fakes import FakeBackend, an_app, serving

openai = pytest.importorskip("openai")


@pytest.fixture
def client(nano_address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nano_address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def problem(nano: Checkpoint) -> tuple[str, str]:
    """A prompt, and the right answer."""
    found = build_task(nano.config.tasks[0]).generate(nano.config.seed, "test", 3)
    return found.prompt, found.solution


def text_of(nano: Checkpoint, prompt: str, **sampling: object) -> str:
    """What the engine itself says, its last token left out."""
    engine = Engine(nano, InlinePlanners(Deliberator.from_checkpoint(nano)), nano.config.engine)
    settings = nano.config.sampling.model_copy(update=sampling)
    tokens = tuple(nano.tokenizer.encode(prompt))
    (said,) = engine.generate_all(
        [GenerationRequest(tokens, settings, nano.config.deliberation, nano.config.search.simulations)]
    )
    return nano.tokenizer.decode(said[:-1] if said[-1] in nano.tokenizer.terminal_ids else said)


def test_a_completion_is_what_the_engine_says(
    client: openai.OpenAI, nano: Checkpoint, problem: tuple[str, str]
) -> None:
    prompt, solution = problem
    answer = client.completions.create(model="nano", prompt=prompt, max_tokens=16)
    (choice,) = answer.choices
    assert choice.text == text_of(nano, prompt, max_tokens=16) == solution
    assert choice.finish_reason == "stop" and answer.usage is not None
    assert answer.usage.prompt_tokens == len(nano.tokenizer.encode(prompt))
    assert answer.usage.completion_tokens == len(nano.tokenizer.encode(solution)) + 1
    assert answer.crsm["choices"][0]["verdict"] == "yes" and answer.crsm["choices"][0]["injections"]  # type: ignore[attr-defined]


def test_a_stream_says_the_same_and_a_client_that_knows_no_events_ignores_them(
    client: openai.OpenAI, problem: tuple[str, str]
) -> None:
    prompt, solution = problem
    for extra in ({}, {"crsm": {"events": True, "trees": True, "log": True}}):
        stream = client.completions.create(
            model="nano",
            prompt=prompt,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == solution
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 7
    events = [event for chunk in chunks[:-1] for event in chunk.crsm["events"]]  # type: ignore[attr-defined]
    kinds = {event["type"] for event in events}
    assert kinds >= {"crsm.request", "crsm.plan", "crsm.inject"}
    asked = [event["request"] for event in events if event["type"] == "crsm.request"]
    ended = [event["request"] for event in events if event["type"] in ("crsm.inject", "crsm.reject")]
    assert set(ended) <= set(asked) and len(set(ended)) == len(ended)
    assert all(event["tree"]["children"] for event in events if event["type"] == "crsm.plan")


def test_a_chat_answers_and_streams(client: openai.OpenAI, problem: tuple[str, str]) -> None:
    prompt, solution = problem
    edges, question = prompt.rsplit(" / ", 1)
    messages = [{"role": "system", "content": edges}, {"role": "user", "content": f"/ {question}"}]
    answer = client.chat.completions.create(model="nano", messages=messages, max_completion_tokens=16, logprobs=True)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", solution, "stop")
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == solution
    chunks = list(client.chat.completions.create(model="nano", messages=messages, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == solution
    # What the client got can be given back as it is.
    again = [*messages, choice.message, {"role": "user", "content": f"/ {question}"}]
    assert client.chat.completions.create(model="nano", messages=again, max_tokens=3).choices[0].message.content


def test_choices_differ_by_seed_and_come_again_with_it(client: openai.OpenAI, problem: tuple[str, str]) -> None:
    settings = {"model": "nano", "prompt": problem[0], "max_tokens": 16, "temperature": 1.5, "n": 4}
    one, same, other = (client.completions.create(**settings, seed=seed) for seed in (1, 1, 100))
    texts = [[choice.text for choice in answer.choices] for answer in (one, same, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1
    # A choice is a generation of its own: it can be had by itself.
    third = client.completions.create(**{**settings, "n": 1}, seed=3)
    assert third.choices[0].text == texts[0][2]


def test_several_prompts_and_token_ids_are_read(
    client: openai.OpenAI, nano: Checkpoint, problem: tuple[str, str]
) -> None:
    prompt, solution = problem
    ids = nano.tokenizer.encode(prompt)
    for prompts in ([prompt, prompt], [ids, ids]):
        answer = client.completions.create(model="nano", prompt=prompts)
        assert [choice.text for choice in answer.choices] == [solution, solution]
    assert client.completions.create(model="nano", prompt=ids).choices[0].text == solution


def test_stop_strings_and_echo(client: openai.OpenAI, problem: tuple[str, str]) -> None:
    prompt, solution = problem
    second = solution.split()[3]
    answer = client.completions.create(model="nano", prompt=prompt, stop=[f" {second}", "never"], echo=True)
    assert answer.choices[0].text == f"{prompt} {solution[: solution.index(f' {second}')]}"
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_known(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "nano" and client.models.retrieve("nano") == model


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, nano_address: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="0")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="nano", prompt="0", extra_body={"crsm": {"lag": 100}})
    assert bad.value.param == "crsm.lag" and "0 to 64 (max_lag)" in bad.value.message
    with pytest.raises(openai.BadRequestError, match="unknown word 'hello'"):
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("backend", "settings", "error"),
    [
        (FakeBackend(), {"api_keys": ("key",)}, "AuthenticationError"),
        (FakeBackend(fails_after=0, error=QueueFull("full")), {}, "RateLimitError"),
        (FakeBackend(fails_after=0, error=RuntimeError("oh")), {}, "InternalServerError"),
        (FakeBackend(hangs_after=0), {"max_deadline": 0.05}, "APIStatusError"),
        (FakeBackend(), {"max_body_bytes": 10}, "APIStatusError"),
    ],
)
def test_other_errors_are_too(backend: FakeBackend, settings: dict[str, object], error: str) -> None:
    with serving(an_app(backend, **settings)) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0, timeout=60) as client:
            for stream in (False, True):
                with pytest.raises(getattr(openai, error)) as caught:
                    client.completions.create(model="tiny", prompt="0", stream=stream)
                assert caught.value.response.headers["x-request-id"] == caught.value.request_id


def test_an_error_in_the_middle_of_a_stream_is_raised() -> None:
    backend = FakeBackend(fails_after=2, error=RuntimeError("oh"), seconds=0.01)
    with serving(an_app(backend, stream_interval=0)) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = client.completions.create(model="tiny", prompt="0", stream=True)
            said = []
            with pytest.raises(openai.APIError, match="the server failed"):
                for chunk in stream:
                    said.append(chunk.choices[0].text)
            assert "".join(said) == "1 2"


def test_a_client_that_may_try_again_does_so_when_there_is_room() -> None:
    class Full(FakeBackend):
        def _tokens(self, request, position, limit):  # type: ignore[no-untyped-def]
            if len(self.requests) == 1:
                raise QueueFull("full")
            return super()._tokens(request, position, limit)

    with serving(an_app(Full())) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=1, timeout=60) as client:
            assert client.completions.create(model="tiny", prompt="0", max_tokens=2).choices[0].text == "1 2"


def test_the_asynchronous_client_runs_many_at_once(nano_address: str, problem: tuple[str, str]) -> None:
    prompt, solution = problem

    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(model="nano", prompt=prompt, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{nano_address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(16)))

    assert asyncio.run(all_of_them()) == [solution] * 16


def test_a_client_of_this_process_needs_no_socket() -> None:
    import httpx

    async def ask() -> str:
        transport = httpx.ASGITransport(build_app(FakeBackend(), ServeSettings()))
        async with openai.AsyncOpenAI(
            base_url="http://here/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport)
        ) as client:
            return (await client.completions.create(model="tiny", prompt="0", max_tokens=2)).choices[0].text

    assert asyncio.run(ask()) == "1 2"
