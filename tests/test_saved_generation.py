"""Generations that are put aside, forked, moved, parked between turns: what follows is what would have followed."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import Channel, DeliberationConfig, EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.event_log import EventLog, read_log
from crsm.generation import GenerationRequest
from crsm.injection import withdraw
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.saved_generation import SavedGeneration
from crsm.types import Plan, PlanRequest, Reason, Token
from tests.fixtures import PROMPT, FakeClock, FakePlanners, make_plan, tiny_checkpoint

CHECKPOINT = tiny_checkpoint()


def ask(
    name: str = "g", prompt: tuple[int, ...] = PROMPT, tokens: int = 16, temperature: float = 0.0, **fields: Any
) -> GenerationRequest:
    deliberation = DeliberationConfig(**({"lag": 0, "injection_rate": 0.9} | fields.pop("deliberation", {})))
    sampling = SamplingConfig(max_tokens=tokens, temperature=temperature, seed=3)
    return GenerationRequest(prompt, sampling, deliberation, 8, name, **fields)


def system_2() -> InlinePlanners:
    return InlinePlanners(Deliberator.from_checkpoint(CHECKPOINT))


def heard(said: list[Token]) -> list[tuple[int, int, float]]:
    return [(token.position, token.token, token.logprob) for token in said]


def finish(engine: Engine) -> list[Token]:
    said = []
    while engine.busy:
        said += engine.step()
    return said


def after(engine: Engine, steps: int) -> list[Token]:
    return [token for _ in range(steps) for token in engine.step()]


# Saving and going on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("lag", "withdraw"), [(0, True), (2, True), (1, False)])
def test_a_saved_generation_says_the_same_tokens_on_another_engine(
    temperature: float, lag: int, withdraw: bool
) -> None:
    """With System 2 and the virtual clock, to the last bit of the log-probabilities, after a journey as bytes."""
    request = ask(temperature=temperature, deliberation={"lag": lag, "withdraw": withdraw})
    undisturbed = heard(list(Engine(CHECKPOINT, system_2()).generate([request])))
    for steps in (1, 2, 7, 15):
        first = Engine(CHECKPOINT, system_2())
        first.submit(request)
        before = after(first, steps)
        saved = pickle.loads(pickle.dumps(first.snapshot("g")))
        assert heard(before + finish(first)) == undisturbed, "a snapshot disturbs nothing"
        second = Engine(CHECKPOINT, system_2())
        second.submit(ask("other", PROMPT[:4], deliberation={"max_plans": 1}))  # in company
        second.step()
        second.submit(dataclasses.replace(request, prompt=(), start=saved, generation_id="moved"))
        rest = [token for token in finish(second) if token.generation_id == "moved"]
        assert heard(before + rest) == undisturbed
        assert sum(second.metrics.outcomes.values()) == second.metrics.requests


def test_a_state_can_be_forked_any_number_of_times_and_each_goes_its_way() -> None:
    engine = Engine(CHECKPOINT)
    engine.submit(ask(tokens=6))
    after(engine, 3)
    saved = engine.snapshot("g")
    forks = [
        dataclasses.replace(ask(f"fork-{i}", (), tokens=20, temperature=1.5), start=saved, forced=(i,))
        for i in range(3)
    ]
    said: dict[str, list[int]] = {fork.generation_id: [] for fork in forks}
    for fork in forks:
        engine.submit(fork)
    for token in finish(engine):
        if token.generation_id in said:
            said[token.generation_id].append(token.token)
    assert [tokens[0] for tokens in said.values()] == [0, 1, 2]
    assert len({tuple(tokens[1:]) for tokens in said.values()}) == 3


@given(steps=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_the_size_of_a_saved_generation_does_not_grow_with_what_was_read(steps: int) -> None:
    engine = Engine(CHECKPOINT)
    engine.submit(ask(prompt=PROMPT * steps, tokens=3))
    after(engine, 1)
    sizes = CHECKPOINT.config.model.backbone
    floats = sizes.n_layer * (sizes.d_model + sizes.conv_channels * (sizes.d_conv - 1) + sizes.d_inner * sizes.d_state)
    assert engine.snapshot("g").num_bytes == 4 * floats


def test_what_is_said_after_a_saved_prompt_is_what_is_said_after_the_whole() -> None:
    """A turn that goes on from a finished one: the same text as a prompt that holds both."""
    engine = Engine(CHECKPOINT)
    engine.submit(ask(tokens=5, park=True))
    first = [token.token for token in finish(engine)]
    turn = (4, 9, 22)
    engine.submit(ask(prompt=turn, tokens=7))
    second = finish(engine)
    whole = Engine(CHECKPOINT).generate_all([ask(prompt=(*PROMPT, *first, *turn), tokens=7)])
    assert [token.token for token in second] == whole[0]
    assert [token.position for token in second] == list(range(len(PROMPT) + 5 + 3, len(PROMPT) + 5 + 3 + 7))


def test_a_plan_in_force_is_withdrawn_before_the_next_turn() -> None:
    """The write of the last plan does not outlive its turn: with it withdrawn the state is nearer to the plain one."""
    request = ask(tokens=4, deliberation={"lag": 0})
    steered = Engine(CHECKPOINT, system_2())
    steered.submit(dataclasses.replace(request, park=True))
    finish(steered)
    saved = steered.snapshot("g")
    assert steered.metrics.injections > 0 and saved.delta_LHPN is not None
    turn = dataclasses.replace(request, prompt=(4, 9), start=saved, generation_id="next")
    engine = Engine(CHECKPOINT)
    engine.submit(turn)
    (token,) = after(engine, 1)
    clean = withdraw(torch.tensor(saved.ssm_LHPN), torch.tensor(saved.delta_LHPN))  # layers in the place of a batch
    other = Engine(CHECKPOINT)
    other.submit(dataclasses.replace(turn, start=dataclasses.replace(saved, ssm_LHPN=clean.numpy(), delta_LHPN=None)))
    assert heard(after(other, 1)) == heard([token])


def test_forced_tokens_are_said_first_and_the_rest_follows_from_them() -> None:
    free = Engine(CHECKPOINT).generate_all([ask(tokens=8)])[0]
    assert Engine(CHECKPOINT).generate_all([ask(tokens=8, forced=tuple(free[:5]))])[0] == free
    other = (free[0] + 1) % 31
    said = Engine(CHECKPOINT).generate_all([ask(tokens=8, forced=(other, 4))])[0]
    assert said[:2] == [other, 4]
    assert said[2:] == Engine(CHECKPOINT).generate_all([ask(prompt=(*PROMPT, other, 4), tokens=6)])[0]


# Parking --------------------------------------------------------------------------------------------------------------


def parked_engine(**config: Any) -> tuple[Engine, FakeClock]:
    clock = FakeClock()
    return Engine(CHECKPOINT, config=EngineConfig(**config), clock=clock), clock


def test_a_parked_generation_is_kept_for_its_time_and_then_forgotten() -> None:
    engine, clock = parked_engine(park_seconds=60.0)
    engine.submit(ask(tokens=3, park=True))
    finish(engine)
    assert engine.parked == ("g",) and not engine.busy
    clock.now += 59
    engine.step()
    assert engine.parked == ("g",)
    clock.now += 2
    engine.step()
    assert engine.parked == ()
    with pytest.raises(ValueError, match="'g' is not known"):
        engine.snapshot("g")


def test_of_too_many_parked_the_one_that_rested_longest_goes() -> None:
    engine, _ = parked_engine(max_parked=2)
    for name in "abc":
        engine.submit(ask(name, tokens=2, park=True))
        finish(engine)
    assert engine.parked == ("b", "c")
    engine.cancel("b")
    assert engine.parked == ("c",) and engine.forget("c") and not engine.forget("c")


def test_a_parked_id_is_in_use_for_its_next_turn_only_and_a_speaking_one_for_nothing() -> None:
    engine, _ = parked_engine()
    engine.submit(ask(tokens=2, park=True))
    finish(engine)
    saved = engine.snapshot("g")
    with pytest.raises(ValueError, match="generation_id = 'g' is parked and start is set"):
        engine.submit(ask(prompt=(4,), start=saved))
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.submit(ask(prompt=()))
    engine.submit(ask(prompt=(4,)))
    with pytest.raises(ValueError, match="'g' is in use"):
        engine.submit(ask(prompt=(4,)))


# Thinking between turns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_plan_that_was_made_between_two_turns_is_there_for_the_first_token_of_the_next(clock: Any) -> None:
    turn = (4, 9, 22)
    asked: list[PlanRequest] = []

    def answer(request: PlanRequest) -> list[Plan]:
        asked.append(request)
        futures = [(1,) * (request.target - request.position), turn[: request.target - request.position]]
        return [make_plan(request, CHECKPOINT, assumed=future, line=(5,)) for future in futures]

    engine = Engine(CHECKPOINT, FakePlanners(answer), EngineConfig(clock=clock))
    settings_ = {"park_tokens": 5, "park_simulations": 8 * 2 * 4, "hypotheses": 2, "max_plans": 1, "lag": 0}
    engine.submit(ask(tokens=3, park=True, deliberation=settings_))
    finish(engine)
    position = len(PROMPT) + 2
    asked.clear()
    for _ in range(4):
        engine.step()
    # The budget of 64 simulations pays for four searches of 8 in 2 futures; five lengths were allowed.
    assert [(request.position, request.target) for request in asked] == [(position, position + i) for i in (1, 2, 3, 4)]
    assert not engine.thinking
    before = engine.metrics.injections
    engine.submit(ask(prompt=turn, tokens=4, deliberation={"max_plans": 1, "plan_every": 100}))
    first, *_ = finish(engine)
    assert engine.metrics.injections > before and first.injection is not None
    assert first.injection.plan.assumed == turn and first.position == position + 4
    assert first.injection.position == position + 3, "right before the last token of the turn is consumed"
    # The other lengths' plans did not fit; nothing is left open.
    assert sum(engine.metrics.outcomes.values()) == engine.metrics.requests


def test_a_turn_that_nobody_foresaw_is_answered_as_without_planners() -> None:
    def answer(request: PlanRequest) -> list[Plan]:
        return [make_plan(request, CHECKPOINT, assumed=(1,) * (request.target - request.position))]

    engine = Engine(CHECKPOINT, FakePlanners(answer))
    settings_ = {"park_tokens": 4, "channel": Channel.STATE, "lag": 0, "max_plans": 1, "plan_every": 100}
    engine.submit(ask(tokens=3, park=True, deliberation={**settings_, "injection_rate": 0.0}))
    first = [token.token for token in finish(engine)]
    after(engine, 3)
    engine.submit(ask(prompt=(4, 9), tokens=6, deliberation={"lag": 10}))
    said = [token.token for token in finish(engine)]
    assert said == Engine(CHECKPOINT).generate_all([ask(prompt=(*PROMPT, *first, 4, 9), tokens=6)])[0]
    assert engine.metrics.outcomes[Reason.MISMATCH] >= 1


def test_thinking_between_turns_makes_real_plans_within_its_budget() -> None:
    engine = Engine(CHECKPOINT, system_2())
    settings_ = {"park_tokens": 3, "park_simulations": 8 * 3 * 2, "hypotheses": 3, "lag": 0, "max_plans": 1}
    engine.submit(ask(tokens=3, park=True, deliberation=settings_))
    finish(engine)
    spent = engine.metrics.requests
    after(engine, 5)
    assert engine.metrics.requests - spent == 2
    engine.forget("g")
    assert sum(engine.metrics.outcomes.values()) == engine.metrics.requests


# Refusals -------------------------------------------------------------------------------------------------------------


def a_saved_one() -> SavedGeneration:
    engine = Engine(CHECKPOINT)
    engine.submit(ask())
    after(engine, 2)
    return engine.snapshot("g")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_hash": "another"}, "start was saved with model version 3, weights another; allowed: 3, 0123456789"),
        ({"model_version": 2}, "model version 2"),
        (
            {"ssm_LHPN": np.zeros((1, 2), np.float32)},
            r"start.ssm_LHPN is float32\[1, 2\]; allowed: float32\[2, 4, 8, 8\]",
        ),
        ({"hidden_LD": np.full((2, 16), np.nan, np.float32)}, "start.hidden_LD holds NaN"),
        ({"delta_LHPN": np.zeros(3)}, "start.delta_LHPN is float64"),
        ({"finished": True}, "prompt is empty"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    engine = Engine(CHECKPOINT)
    with pytest.raises(ValueError, match=message):
        engine.submit(ask("new", (), start=dataclasses.replace(a_saved_one(), **changes)))
    assert not engine.busy


def test_only_a_generation_that_speaks_or_rests_can_be_saved() -> None:
    engine = Engine(CHECKPOINT)
    with pytest.raises(ValueError, match="'g' is not known"):
        engine.snapshot("g")
    engine.submit(ask(tokens=2))
    with pytest.raises(ValueError, match="'g' has not said its first token"):
        engine.snapshot("g")
    finish(engine)
    with pytest.raises(ValueError, match="it has ended"):
        engine.snapshot("g")


def test_a_log_does_not_pretend_to_hold_a_state(tmp_path: Path) -> None:
    file = io.StringIO()
    engine = Engine(CHECKPOINT, event_log=EventLog(file))
    engine.submit(ask("new", (), start=a_saved_one()))
    finish(engine)
    path = tmp_path / "log.jsonl"
    path.write_text(file.getvalue())
    with pytest.raises(ValueError, match=r"line 1: .*goes on from a saved state"):
        read_log(path)
