"""States that are handed out: at the end of a turn, and of a prompt of which nothing was said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import TOKENS_KEPT, GenerationRequest
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.saved_generation import SavedGeneration
from crsm.types import Token
from tests.fixtures import PROMPT, tiny_checkpoint

CHECKPOINT = tiny_checkpoint()


def ask(prompt: tuple[int, ...] = PROMPT, tokens: int = 8, name: str = "g", **fields: Any) -> GenerationRequest:
    sampling = SamplingConfig(max_tokens=tokens, **fields.pop("sampling", {}))
    return GenerationRequest(prompt, sampling, DeliberationConfig(lag=0, injection_rate=0.9), 8, name, **fields)


def run(request: GenerationRequest, **settings: Any) -> tuple[list[Token], list[SavedGeneration]]:
    engine = Engine(CHECKPOINT, InlinePlanners(Deliberator.from_checkpoint(CHECKPOINT)), EngineConfig(**settings))
    engine.submit(request)
    said: list[Token] = []
    kept: list[SavedGeneration] = []
    while engine.busy:
        tokens = engine.step()
        states = engine.take_kept()
        assert not states or (len(tokens) == 1 and tokens[0].finished), "a state comes with the last token"
        said, kept = said + tokens, kept + states
    assert engine.counts() == {"speaking": 0, "reading": 0, "waiting": 0, "parked": 0}
    return said, kept


def ids(said: list[Token]) -> list[int]:
    return [token.token for token in said]


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_state_at_the_end_of_a_turn_leads_to_the_next_one_as_a_parked_generation_does(tokens: int) -> None:
    said, (saved,) = run(ask(tokens=tokens, keep=True))
    assert saved.finished and saved.position == said[-1].position and saved.tokens[-1] == said[-1].token
    engine = Engine(CHECKPOINT, InlinePlanners(Deliberator.from_checkpoint(CHECKPOINT)))
    assert engine.generate_all([ask(tokens=tokens, park=True)]) == [ids(said)]
    (expected,) = engine.generate_all([ask((9, 22, 7))])
    assert ids(run(ask((9, 22, 7), name="h", start=saved))[0]) == expected


def test_keeping_the_state_changes_no_token() -> None:
    assert ids(run(ask(keep=True))[0]) == ids(run(ask())[0])


@given(st.lists(st.integers(5, 26), min_size=1, max_size=20), st.sampled_from([2, 5, 512]))
@settings(max_examples=25, deadline=None)
def test_what_follows_a_prompt_that_was_only_read_is_what_follows_the_prompt(prompt: list[int], chunk: int) -> None:
    (end,), (saved,) = run(ask(tuple(prompt), read_only=True), prefill_chunk=chunk)
    assert (end.token, end.finish_reason, end.position) == (-1, "read", len(prompt) - 1)
    assert (saved.position, saved.tokens, saved.generated, saved.finished) == (len(prompt) - 1, tuple(prompt), 0, False)
    expected, _ = run(ask(tuple(prompt)), prefill_chunk=chunk)
    said, _ = run(ask((), start=saved, name="h"))
    assert ids(said) == ids(expected)
    assert [token.position for token in said] == [token.position for token in expected]


def test_a_prompt_may_be_read_onto_a_state() -> None:
    _, (saved,) = run(ask(PROMPT[:3], read_only=True))
    (end,), (longer,) = run(ask(PROMPT[3:], read_only=True, start=saved, name="h"))
    assert end.position == len(PROMPT) - 1 and longer.tokens[-1] == PROMPT[-1]
    assert ids(run(ask((), start=longer, name="i"))[0]) == ids(run(ask())[0])


def test_of_a_long_prompt_only_the_last_tokens_are_kept_by_name() -> None:
    prompt = tuple(5 + i % 20 for i in range(TOKENS_KEPT + 50))
    _, (saved,) = run(ask(prompt, read_only=True))
    assert saved.tokens == prompt[-TOKENS_KEPT:] and saved.position == len(prompt) - 1
    short = run(ask((5,), read_only=True))[1][0]
    assert saved.num_bytes == short.num_bytes


def test_a_state_goes_on_with_its_own_random_numbers_or_with_those_of_a_seed() -> None:
    warm = {"temperature": 1.0, "seed": 5}
    _, (saved,) = run(ask(read_only=True, sampling=warm))
    same = ids(run(ask((), start=saved, sampling=warm))[0])
    assert same == ids(run(ask((), start=saved, sampling={**warm, "seed": 6}))[0])
    seeded = [ids(run(ask((), start=saved, reseed=True, sampling={**warm, "seed": seed}))[0]) for seed in (6, 6, 7)]
    assert seeded[0] == seeded[1] != seeded[2] and seeded[0] != same


def test_a_prompt_that_is_only_to_be_read_must_be_there() -> None:
    with pytest.raises(ValueError, match="prompt is empty; allowed: at least one token"):
        Engine(CHECKPOINT).submit(ask((), read_only=True))


def test_who_is_cancelled_while_it_reads_leaves_no_state() -> None:
    engine = Engine(CHECKPOINT, config=EngineConfig(prefill_chunk=2))
    engine.submit(ask(read_only=True))
    engine.submit(ask(name="other"))
    engine.step()
    engine.cancel("g")
    ends = [token.finish_reason for token in engine.step() if token.generation_id == "g"]
    assert ends == ["cancelled"] and not engine.take_kept()
