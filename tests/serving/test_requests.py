"""From a body to generations: defaults, limits and their words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from actors.serving.bodies import check_body
from actors.serving.errors import ApiError
from actors.serving.requests import check_limits, encode_prompt, generation_requests, prompts_of
from actors.serving.schema import Asked, ChatRequest, CompletionRequest
from actors.serving.settings import ServeSettings
from crsm.config import SamplingConfig
from crsm.types import Channel
from tests.serving.fakes import TOKENIZER, FakeBackend, a_saved_one

SERVED = FakeBackend().model
SETTINGS = ServeSettings()


def body(**fields: Any) -> CompletionRequest:
    return check_body({"model": "tiny", "prompt": "0", **fields}, CompletionRequest)


def chat(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "0"}]
    return check_body({"model": "tiny", "messages": messages, **fields}, ChatRequest)


def requests_of(asked: Asked, prompts: tuple[tuple[int, ...], ...] = ((7,),), saved: Any = None) -> list[Any]:
    return generation_requests(asked, prompts, SERVED, SETTINGS, saved, "cmpl-x")


def test_what_a_request_does_not_say_is_as_the_model_has_it() -> None:
    (request,) = requests_of(body())
    config = SERVED.config
    assert (request.sampling, request.deliberation) == (config.sampling, config.deliberation)
    assert (request.simulations, request.pace, request.generation_id) == (config.search.simulations, None, "cmpl-x-0")
    assert not (request.watch or request.trees or request.keep or request.reseed or request.read_only)


def test_every_option_reaches_the_generation() -> None:
    options = {
        "lag": 5,
        "injection_rate": 0.5,
        "channel": "policy",
        "simulations": 9,
        "hypotheses": 2,
        "plan_every": 3,
        "pace": 7,
        "events": True,
        "trees": True,
        "save_state": True,
    }
    asked = body(temperature=0.5, top_p=0.25, top_k=4, seed=11, max_tokens=6, crsm=options)
    (request,) = requests_of(asked)
    assert request.sampling == SamplingConfig(temperature=0.5, top_p=0.25, top_k=4, seed=11, max_tokens=6)
    deliberation = request.deliberation
    assert (deliberation.lag, deliberation.injection_rate, deliberation.channel) == (5, 0.5, Channel.POLICY)
    assert (deliberation.hypotheses, deliberation.plan_every, deliberation.max_plans) == (2, 3, None)
    assert (request.simulations, request.pace) == (9, 7.0)
    assert request.watch and request.trees and request.keep


def test_choices_are_numbered_prompt_by_prompt_and_draw_with_seeds_of_their_own() -> None:
    requests = requests_of(body(n=2, seed=2**63 - 1), ((1,), (2,)))
    assert [request.prompt for request in requests] == [(1,), (1,), (2,), (2,)]
    assert [request.generation_id for request in requests] == [f"cmpl-x-{index}" for index in range(4)]
    assert [request.sampling.seed for request in requests] == [2**63 - 1, 0, 1, 2]


def test_a_negative_seed_is_a_seed() -> None:
    assert requests_of(body(seed=-1))[0].sampling.seed == 2**63 - 1


def test_system_1_is_asked_for_by_a_channel_that_is_off() -> None:
    (request,) = requests_of(body(crsm={"channel": "off", "injection_rate": 0}))
    assert (request.deliberation.channel, request.deliberation.max_plans) == (Channel.OFF, 0)
    # A state of such a turn can go on with plans.
    saved = dataclasses.replace(a_saved_one(), deliberation=request.deliberation)
    (request,) = requests_of(body(crsm={"channel": "state"}), saved=saved)
    assert request.deliberation.max_plans is None


def test_a_state_goes_on_as_it_was_and_counts_what_it_has_said() -> None:
    saved = dataclasses.replace(a_saved_one(), sampling=SamplingConfig(temperature=0.5, seed=3), generated=4, pace=9.0)
    asked = body(prompt="", max_tokens=5, crsm={"state": "s"})
    (request,) = requests_of(asked, ((),), saved)
    assert (request.start, request.pace, request.reseed) == (saved, 9.0, False)
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.max_tokens) == (0.5, 3, 9)
    (request,) = requests_of(asked, ((7,),), saved)
    assert request.sampling.max_tokens == 5, "a new turn counts anew"
    (request,) = requests_of(body(prompt="", seed=3, crsm={"state": "s"}), ((),), saved)
    assert request.reseed
    requests = requests_of(body(prompt="", n=2, crsm={"state": "s"}), ((),), saved)
    assert [request.reseed for request in requests] == [False, True], "the second choice is not the first again"


def test_a_turn_that_is_over_needs_a_prompt() -> None:
    saved = dataclasses.replace(a_saved_one(), finished=True)
    with pytest.raises(ApiError, match=r"the turn of crsm\.state is over; allowed: a prompt"):
        requests_of(body(prompt="", crsm={"state": "s"}), ((),), saved)


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        (body(crsm={"lag": 100}), "crsm.lag", "crsm.lag = 100; allowed: 0 to 64 (max_lag)"),
        (body(max_tokens=4097), "max_tokens", "max_tokens = 4097; allowed: at most 4096 (max_tokens)"),
        (body(n=17), "n", "n = 17; allowed: 1 to 16 (max_n)"),
        (body(prompt=["0"] * 4, n=5), "n", "prompts × n = 4 × 5; allowed: 1 to 16 (max_n)"),
        (body(crsm={"simulations": 5000}), "crsm.simulations", "crsm.simulations = 5000; allowed: at most 4096"),
        (body(crsm={"hypotheses": 17}), "crsm.hypotheses", "allowed: at most 16 (max_hypotheses)"),
        (body(crsm={"deadline": 601}), "crsm.deadline", "allowed: at most 600 (max_deadline)"),
        (body(crsm={"save_state": 1e9}), "crsm.save_state", "allowed: at most 86400 (max_state_seconds)"),
        (body(crsm={"trees": True}), "crsm.trees", 'with "events": true'),
        (body(stop=["a"] * 5), "stop", "stop = 5 strings; allowed: at most 4 (max_stop)"),
        (body(stop="a" * 300), "stop", "256 characters"),
        (body(stream_options={"include_usage": True}), "stream_options", 'with "stream": true'),
        (body(best_of=2), "best_of", "best_of = 2; allowed: n = 1"),
        (body(echo=True, logprobs=1), "logprobs", "echo with logprobs"),
        (chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "allowed: one of them"),
        (chat(max_completion_tokens=5000), "max_completion_tokens", "at most 4096 (max_tokens)"),
    ],
)
def test_what_is_beyond_a_limit_is_named_with_it(asked: Asked, field: str, message: str) -> None:
    prompts = len(prompts_of(asked.prompt)) if isinstance(asked, CompletionRequest) else 1
    with pytest.raises(ApiError) as refused:
        check_limits(asked, prompts, SETTINGS)
    assert (refused.value.status, refused.value.param) == (400, field)
    assert message in refused.value.message


def test_what_is_just_within_the_limits_is_allowed() -> None:
    options = {"lag": 64, "simulations": 4096, "hypotheses": 16, "deadline": 600, "save_state": 86400}
    check_limits(body(n=16, max_tokens=4096, stop=["a" * 256] * 4, crsm=options), 1, SETTINGS)
    check_limits(chat(max_tokens=3, max_completion_tokens=3), 1, SETTINGS)


@pytest.mark.parametrize(
    ("prompt", "field", "message"),
    [
        ("0 hello", "prompt", "prompt: unknown word 'hello'; allowed: "),
        ("", "prompt", "prompt: the text is empty"),
        ([], "prompt", "prompt is empty; allowed: at least one token"),
        ([0, 10**6], "prompt[1]", f"prompt[1] = 1000000; allowed: 0 to {TOKENIZER.vocab_size - 1}"),
        ("0 1 2 3", "prompt", "prompt has 4 tokens; allowed: at most 3 (max_prompt_tokens)"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_in_words(prompt: Any, field: str, message: str) -> None:
    settings = ServeSettings(max_prompt_tokens=3)
    with pytest.raises(ApiError) as refused:
        encode_prompt(prompt, TOKENIZER, settings, "prompt", may_be_empty=False)
    assert (refused.value.status, refused.value.param) == (400, field)
    assert refused.value.message.startswith(message)


def test_a_prompt_is_one_or_several_of_text_or_of_ids() -> None:
    assert prompts_of("0") == ["0"] and prompts_of(["0", "1"]) == ["0", "1"]
    assert prompts_of([1, 2]) == [[1, 2]] and prompts_of([[1], [2]]) == [[1], [2]]
    assert prompts_of([]) == [[]] and prompts_of("") == [""]
