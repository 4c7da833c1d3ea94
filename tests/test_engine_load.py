"""Continuous batching: prompts in chunks, paces, bounded queues, planners without room."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.delta_buffer import Fault
from crsm.engine import Engine, QueueFull
from crsm.generation import GenerationRequest
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.types import Plan, PlanRequest, Reason, Token
from tests.fixtures import PROMPT, FakeClock, FakePlanners, make_plan, tiny_checkpoint

CHECKPOINT = tiny_checkpoint()
WALL = EngineConfig(clock="wall")
LONG = PROMPT * 9
"""54 tokens."""


def ask(name: str, prompt: tuple[int, ...] = PROMPT, tokens: int = 10, **fields: Any) -> GenerationRequest:
    sampling = fields.pop("sampling", SamplingConfig(max_tokens=tokens))
    return GenerationRequest(prompt, sampling, DeliberationConfig(**fields.pop("deliberation", {})), 8, name, **fields)


def alone(request: GenerationRequest, config: EngineConfig = EngineConfig()) -> list[int]:
    return Engine(CHECKPOINT, config=config).generate_all([request])[0]


def words(said: list[Token], name: str) -> list[int]:
    return [token.token for token in said if token.generation_id == name]


# Prompts in chunks ----------------------------------------------------------------------------------------------------


def test_a_long_prompt_goes_in_by_chunks_while_the_others_say_a_token_in_every_step() -> None:
    config = EngineConfig(prefill_chunk=8)
    engine = Engine(CHECKPOINT, config=config)
    engine.submit(ask("short", tokens=30))
    said = engine.step()
    engine.submit(ask("long", LONG))
    steps = 0
    while not words(said, "long"):
        said += engine.step()
        steps += 1
    assert steps == 7, "54 tokens, 8 per step"
    assert len(words(said, "short")) == 1 + steps, "nobody waited"
    while engine.busy:
        said += engine.step()
    for request in (ask("short", tokens=30), ask("long", LONG)):
        assert words(said, request.generation_id) == alone(request, config)


@given(chunk=st.integers(1, 60), length=st.integers(1, 54))
@settings(max_examples=25, deadline=None)
def test_the_chunk_length_changes_no_token(chunk: int, length: int) -> None:
    request = ask("g", LONG[:length], tokens=6)
    assert alone(request, EngineConfig(prefill_chunk=chunk)) == alone(request)


def test_chunks_end_where_the_prompt_says_whoever_else_is_served() -> None:
    """The same bits, not only the same tokens: log-probabilities are equal with and without company."""
    config = EngineConfig(prefill_chunk=16)
    by_itself = list(Engine(CHECKPOINT, config=config).generate([ask("g", LONG)]))
    engine = Engine(CHECKPOINT, config=config)
    engine.submit(ask("other", PROMPT[:5], tokens=40))
    engine.step()
    engine.submit(ask("g", LONG))
    said = []
    while engine.busy:
        said += [token for token in engine.step() if token.generation_id == "g"]
    assert [(t.token, t.logprob) for t in said] == [(t.token, t.logprob) for t in by_itself]


def test_prompts_are_read_in_the_order_in_which_they_came() -> None:
    engine = Engine(CHECKPOINT, config=EngineConfig(prefill_chunk=8))
    engine.submit(ask("speaker", tokens=50))
    engine.step()
    for name in ("a", "b"):
        engine.submit(ask(name, LONG[:16]))
    first: dict[str, int] = {}
    for step in range(8):
        for token in engine.step():
            first.setdefault(token.generation_id, step)
    assert first == {"speaker": 0, "a": 1, "b": 3}


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_clearly_and_accepts_again_when_there_is_room() -> None:
    engine = Engine(CHECKPOINT, config=EngineConfig(max_batch=1, max_waiting=2))
    for name in ("a", "b"):
        engine.submit(ask(name))
    with pytest.raises(QueueFull, match=r"2 generations wait; allowed: engine.max_waiting = 2"):
        engine.submit(ask("c"))
    engine.step()
    engine.submit(ask("c"))
    said = []
    while engine.busy:
        said += engine.step()
    assert {token.generation_id for token in said if token.finished} == {"a", "b", "c"}


@pytest.mark.parametrize("joins", [1, 3])
def test_slots_are_reused_and_never_more_than_the_batch_allows(joins: int) -> None:
    engine = Engine(CHECKPOINT, config=EngineConfig(max_batch=11))
    requests = [ask(f"g{i}", (PROMPT * 2)[: 1 + i % 9], tokens=3 + i % 5) for i in range(40)]
    said: list[Token] = []
    todo = list(requests)
    while todo or engine.busy:
        for request in todo[:joins]:
            engine.submit(request)
        del todo[:joins]
        said += engine.step()
        assert engine.counts()["speaking"] <= 11
    for request in requests:
        assert words(said, request.generation_id) == alone(request)


def test_a_token_ends_a_text_or_does_not_as_the_request_says() -> None:
    """``ignore_eos`` says on over a terminal token."""
    request = ask("g", tokens=12)
    said = alone(request)
    (ends_at, end) = (4, said[4])
    assert end not in said[:4]
    checkpoint = dataclasses.replace(CHECKPOINT, tokenizer=_Ending(end))  # type: ignore[arg-type]
    assert Engine(checkpoint).generate_all([request]) == [said[: ends_at + 1]]
    endless = dataclasses.replace(request, sampling=SamplingConfig(max_tokens=12, ignore_eos=True))
    assert Engine(checkpoint).generate_all([endless]) == [said]


class _Ending:
    """A tokenizer of which only the terminal tokens are asked."""

    def __init__(self, end: int) -> None:
        self.terminal_ids = (end,)


# Paces ----------------------------------------------------------------------------------------------------------------


def paced(requests: list[GenerationRequest], step_seconds: float = 0.0, config: EngineConfig = WALL) -> dict[str, list]:
    """When each generation said its tokens, by a clock that moves only by sleeping and by ``step_seconds`` a step."""
    clock = FakeClock()
    engine = Engine(CHECKPOINT, config=config, clock=clock, sleep=clock.sleep)
    for request in requests:
        engine.submit(request)
    times: dict[str, list[float]] = {request.generation_id: [] for request in requests}
    while engine.busy:
        for token in engine.step():
            times[token.generation_id].append(clock.now - 100.0)
        clock.now += step_seconds
    return times


def test_every_generation_keeps_its_own_pace_and_equal_paces_share_their_steps() -> None:
    times = paced([ask("slow", pace=2.0, tokens=4), ask("fast", pace=8.0, tokens=6), ask("fast2", pace=8.0, tokens=6)])
    assert times["slow"] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert times["fast"] == times["fast2"] == pytest.approx([i / 8 for i in range(6)])


def test_a_generation_without_a_pace_takes_the_engines_or_goes_as_fast_as_it_can() -> None:
    config = EngineConfig(clock="wall", pace=4.0)
    times = paced([ask("engine's", tokens=3), ask("own", tokens=3, pace=2.0)], config=config)
    assert times["engine's"] == pytest.approx([0.0, 0.25, 0.5]) and times["own"] == pytest.approx([0.0, 0.5, 1.0])
    times = paced([ask("free", tokens=5), ask("held", tokens=2, pace=1.0)], step_seconds=0.01)
    assert times["free"] == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04]) and times["held"][1] >= 1.0


@given(pace=st.floats(0.5, 200.0), step=st.floats(0.0, 0.05))
@settings(max_examples=50, deadline=None)
def test_no_pace_is_ever_exceeded(pace: float, step: float) -> None:
    """Any window of a whole number of intervals holds at most so many tokens more than one."""
    times = paced([ask("g", tokens=12, pace=pace)], step_seconds=step)["g"]
    for i in range(len(times)):
        for j in range(i + 1, len(times)):
            assert j - i <= (times[j] - times[i]) * pace + 1 + 1e-4
    if step < 1 / pace:
        assert times[-1] - times[0] <= 12 / pace + 12 * step


@pytest.mark.parametrize("pace", [0.0, -1.0])
def test_a_pace_must_be_above_zero(pace: float) -> None:
    with pytest.raises(ValueError, match=f"pace = {pace}; allowed: above 0"):
        Engine(CHECKPOINT).submit(ask("g", pace=pace))


def test_deadlines_tell_planners_when_the_target_is_consumed_and_when_a_plan_is_worthless() -> None:
    clock, planners = FakeClock(), FakePlanners(lambda request: None)
    engine = Engine(CHECKPOINT, planners, WALL, clock=clock, sleep=clock.sleep)
    engine.submit(ask("g", pace=10.0, tokens=4, deliberation={"lag": 1, "max_lag": 3}))
    while engine.busy:
        engine.step()
    # Tokens come at 0.0, 0.1, …; the token said at 0.0 is consumed at 0.1, the one after it (the target) at 0.2.
    assert [request.deadline for request in planners.requests] == pytest.approx([100.2, 100.3])
    assert [request.expires for request in planners.requests] == pytest.approx([100.5, 100.6])


def test_without_a_pace_deadlines_follow_the_speed_that_was_seen() -> None:
    clock, planners = FakeClock(), FakePlanners(lambda request: None)
    engine = Engine(CHECKPOINT, planners, WALL, clock=clock, sleep=clock.sleep)
    engine.submit(ask("g", tokens=5, deliberation={"lag": 1, "max_lag": 2}))
    asked_at = []
    while engine.busy:
        before = len(planners.requests)
        engine.step()
        asked_at += [clock.now] * (len(planners.requests) - before)
        clock.now += 0.02
    assert [r.deadline for r in planners.requests[:1]] == [None], "no interval was seen yet"
    assert planners.requests[0].expires is not None, "a planner that hangs must not keep it for ever"
    for request, now in list(zip(planners.requests, asked_at, strict=True))[1:]:
        assert request.deadline == pytest.approx(now + 2 * 0.02) and request.expires == pytest.approx(now + 4 * 0.02)


# Planners without room ------------------------------------------------------------------------------------------------


class Narrow(FakePlanners):
    """Planners that have room for so many requests at a time."""

    def __init__(self, room: int) -> None:
        super().__init__(lambda request: None)
        self._room = room

    def room(self) -> int:
        return self._room


@pytest.mark.parametrize("room", [0, 1, 3, 9])
def test_more_than_there_is_room_for_is_not_asked_and_is_counted(room: int) -> None:
    planners = Narrow(room)
    engine = Engine(CHECKPOINT, planners, WALL)
    requests = [ask(f"g{i}", tokens=6, deliberation={"lag": 1}) for i in range(4)]
    said = engine.generate_all(requests)
    due = 4 * 4  # the last two tokens of six need no plan at lag 1
    assert said == [alone(request) for request in requests]
    assert len(planners.requests) == min(room, 4) * 4
    assert engine.metrics.requests == due
    assert engine.metrics.outcomes[Reason.DECLINED] == due - len(planners.requests)
    assert sum(engine.metrics.outcomes.values()) == due and engine.metrics.plan_hit_rate == 0.0


def test_the_room_goes_to_the_positions_where_a_plan_is_worth_most() -> None:
    """With room for one, each step asks for the generation with the largest value of all that are due."""
    names = [f"g{i}" for i in range(4)]
    prompts = {name: (PROMPT * 2)[i : i + 6] for i, name in enumerate(names)}

    def requests() -> list[GenerationRequest]:
        return [ask(name, prompts[name], tokens=6, deliberation={"lag": 0}) for name in names]

    wide = Narrow(4)
    Engine(CHECKPOINT, wide, WALL).generate_all(requests())
    values: dict[int, dict[str, float]] = {}
    for request in wide.requests:
        values.setdefault(request.position, {})[request.generation_id] = request.value
    narrow = Narrow(1)
    Engine(CHECKPOINT, narrow, WALL).generate_all(requests())
    assert len(narrow.requests) == len(values) > 3
    for request in narrow.requests:
        best = max(values[request.position], key=lambda name: values[request.position][name])
        assert request.generation_id == best and len(set(values[request.position].values())) == 4


# What comes back wrong ------------------------------------------------------------------------------------------------


def test_every_kind_of_bad_plan_has_its_counter_and_none_is_heard() -> None:
    bad: list[tuple[Fault, dict[str, Any]]] = [
        (Fault.NOT_FINITE, {"write_u_LRE": float("nan")}),
        (Fault.SHAPE, {"value_root_L": None}),
        (Fault.RANGE, {"confidence_L": 2.0}),
        (Fault.VOCABULARY, {"line": (10**6,)}),
        (Fault.GENERATION, {"generation_id": "another"}),
        (Fault.GENERATION, {"target": 10**6}),
        (Fault.VERSION, {"model_version": 99}),
        (Fault.UNKNOWN, {"request_id": -5}),
    ]

    def answer(request: PlanRequest) -> list[Plan]:
        plan = make_plan(request, CHECKPOINT)
        _, changes = bad[request.position % len(bad)]
        for name, value in changes.items():
            if isinstance(value, float):
                value = getattr(plan, name) * 0 + value
            plan = dataclasses.replace(plan, **{name: value})
        return [plan]

    engine = Engine(CHECKPOINT, FakePlanners(answer), WALL)
    request = ask("g", tokens=2 + 3 * len(bad), deliberation={"lag": 0})
    assert engine.generate_all([request]) == [alone(request)]
    faults = engine.metrics.faults
    assert set(faults) == {fault for fault, _ in bad} and faults[Fault.GENERATION] >= 6
    assert all(faults[fault] >= 3 for fault in faults) and engine.metrics.injections == 0


def test_a_plan_that_comes_twice_is_counted_as_a_duplicate() -> None:
    def delays(request: PlanRequest) -> tuple[int, ...]:
        return (0, 3)

    planners = FakePlanners(lambda request: [make_plan(request, CHECKPOINT)], delay=delays)
    engine = Engine(CHECKPOINT, planners, WALL)
    engine.generate_all([ask("g", tokens=200, deliberation={"lag": 0, "plan_every": 4})])
    assert engine.metrics.faults[Fault.DUPLICATE] >= 2 and engine.metrics.faults[Fault.UNKNOWN] == 0


def test_hits_are_counted_by_which_hypothesis_came_true() -> None:
    """The rank of the matching future: with a world model that foresees everything, the likeliest is the right one."""
    request = ask("g", tokens=10, deliberation={"lag": 1, "channel": "off", "hypotheses": 3})
    said = alone(request)

    def answer(asked: PlanRequest) -> list[Plan]:
        next_token = said[asked.position - len(PROMPT) + 1]
        wrong = (next_token + 1) % 31
        place = asked.position % 3
        futures = [(wrong,), (wrong,), (wrong,)]
        futures[place] = (next_token,)
        return [make_plan(asked, CHECKPOINT, assumed=assumed, line=()) for assumed in futures]

    engine = Engine(CHECKPOINT, FakePlanners(answer), WALL)
    assert engine.generate_all([request]) == [said]
    expected = [position % 3 for position in range(len(PROMPT), len(PROMPT) + 8)]
    assert engine.metrics.futures == {rank: expected.count(rank) for rank in range(3)}


# Time -----------------------------------------------------------------------------------------------------------------


def test_the_time_between_tokens_is_measured_per_generation() -> None:
    clock = FakeClock()
    engine = Engine(CHECKPOINT, config=WALL, clock=clock, sleep=clock.sleep)
    engine.submit(ask("slow", tokens=5, pace=2.0))
    engine.submit(ask("fast", tokens=5, pace=4.0))
    while engine.busy:
        engine.step()
    seconds = engine.metrics.token_seconds
    assert seconds.count == 8 and seconds.total == pytest.approx(4 * 0.5 + 4 * 0.25)
    assert seconds.percentile(0.5) == pytest.approx(0.25, rel=0.03) and seconds.longest == pytest.approx(0.5)


@torch.inference_mode()
def test_system_2_costs_no_bits_when_planners_answer_nothing() -> None:
    """Asked for at every position, answered never: bit-identical to no planners at all."""
    requests = [ask(f"g{i}", (PROMPT * 2)[i : i + 5]) for i in range(3)]
    silent = list(Engine(CHECKPOINT, FakePlanners(lambda request: []), WALL).generate(requests))
    plain = list(Engine(CHECKPOINT, None, WALL).generate(requests))
    assert silent == plain


def test_inline_planners_are_never_declined() -> None:
    engine = Engine(CHECKPOINT, InlinePlanners(Deliberator.from_checkpoint(CHECKPOINT)))
    engine.generate_all([ask(f"g{i}", deliberation={"lag": 0}) for i in range(5)])
    assert engine.metrics.outcomes[Reason.DECLINED] == 0 and engine.metrics.injections > 0
