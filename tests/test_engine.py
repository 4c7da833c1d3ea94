"""The token loop: what planners do, fail to do or do wrongly must show in the tokens exactly where it may."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.decoding import select_decoder
from crsm.deliberation import as_injection
from crsm.engine import Engine, InjectionSource
from crsm.event_log import EventLog, LoggedGeneration, read_log
from crsm.generation import GenerationRequest
from crsm.injection import inject, outer_write, withdraw
from crsm.latent_dynamics import ExactDynamics
from crsm.model import Checkpoint
from crsm.planners import Arrivals, InlinePlanners, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.sampling import mix_policy
from crsm.types import Channel, ModelState, Plan, PlanRequest, Reason, Token
from tests.fixtures import PROMPT, FakeClock, FakePlanners, make_plan, tiny_checkpoint, tiny_config

OTHER_PROMPT = (10, 21, 4, 8, 23, 7)
FIRST = len(PROMPT)
"""Position of the first generated token."""
WALL = EngineConfig(clock="wall")

Clock = Literal["virtual", "wall"]
Write = Callable[[int, ModelState, Tensor], ModelState]


def run(engine: Engine, requests: Sequence[GenerationRequest]) -> list[list[Token]]:
    """The tokens of every generation, in the order of the requests."""
    said: dict[str, list[Token]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for token in engine.step():
            said[token.generation_id].append(token)
    return list(said.values())


def words(tokens: Sequence[Token]) -> list[int]:
    return [token.token for token in tokens]


def heard(tokens: Sequence[Token]) -> list[tuple[int, float]]:
    """Tokens with their log-probabilities, which are equal only if the logits were."""
    return [(token.token, token.logprob) for token in tokens]


def assert_alike(tokens: Sequence[Token], want: Sequence[tuple[int, float]]) -> None:
    """The same tokens; log-probabilities within what a write in another order of operations may change."""
    assert [token for token, _ in want] == words(tokens)
    assert [token.logprob for token in tokens] == pytest.approx([logprob for _, logprob in want], abs=1e-5)


def ask(
    prompt: tuple[int, ...] = PROMPT, tokens: int = 10, name: str = "", simulations: int = 8, **deliberation: Any
) -> GenerationRequest:
    return GenerationRequest(
        prompt, SamplingConfig(max_tokens=tokens), DeliberationConfig(**deliberation), simulations, name
    )


@torch.inference_mode()
def decode(
    checkpoint: Checkpoint,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    write: Write | None = None,
    mix: Callable[[int, Tensor], Tensor] | None = None,
) -> list[list[tuple[int, float]]]:
    """Greedy decoding written out with the backbone alone, its tokens consumed by the decoder that engines choose.

    Args:
        write: changes the state before the token at a position is consumed; gets the decays of all tokens so far too.
        mix: changes the log-probabilities that come of consuming the token at a position.
    """
    model, decoder = checkpoint.model, select_decoder(checkpoint.model)
    hidden_BTLD, state = model.backbone(torch.tensor(prompts))
    log_probs_BV = model.logits(hidden_BTLD[:, -1]).log_softmax(dim=-1)
    said: list[list[tuple[int, float]]] = [[] for _ in prompts]
    decays: list[tuple[Tensor, ...]] = []
    for position in range(len(prompts[0]), len(prompts[0]) + tokens):
        token_B = log_probs_BV.argmax(dim=-1)
        for row, token in enumerate(token_B.tolist()):
            said[row].append((token, float(log_probs_BV[row, token])))
        if write is not None:
            memory = torch.stack([torch.stack(layers) for layers in decays]) if decays else torch.zeros(0)
            state = write(position, state, memory)
        out = decoder.step(token_B, state)
        state = out.state
        decays.append(out.decay_LBH)
        log_probs_BV = decoder.logits(out.hidden_BLD).log_softmax(dim=-1)
        if mix is not None:
            log_probs_BV = mix(position, log_probs_BV)
    return said


def written(plan: Plan, state: ModelState, alpha: float, row: int = 0, carried_LH: Tensor | None = None) -> ModelState:
    """A plan's write injected into one row of a batch by hand."""
    layers = []
    for index, layer in enumerate(state.layers):
        write_BHPN = outer_write(
            torch.tensor(plan.write_u_LRE[index])[None],
            torch.tensor(plan.write_b_LRN[index])[None],
            layer.ssm_BHPN.shape[1],
        )
        if carried_LH is not None:
            write_BHPN = write_BHPN * carried_LH[index][None, :, None, None]
        ssm_BHPN = layer.ssm_BHPN.clone()
        ssm_BHPN[row : row + 1] = inject(ssm_BHPN[row : row + 1], write_BHPN, torch.tensor([alpha]))
        layers.append(ssm_BHPN)
    return state.with_ssm(tuple(layers))


def said_alone(checkpoint: Checkpoint, prompt: tuple[int, ...] = PROMPT, tokens: int = 10) -> list[int]:
    return [token for token, _ in decode(checkpoint, [prompt], tokens)[0]]


# Nothing to apply -----------------------------------------------------------------------------------------------------


def test_without_planners_the_logits_are_the_plain_backbones_bit_for_bit() -> None:
    checkpoint = tiny_checkpoint()
    tokens = run(Engine(checkpoint), [ask(), ask(OTHER_PROMPT), ask()])
    assert [heard(row) for row in tokens] == decode(checkpoint, [PROMPT, OTHER_PROMPT, PROMPT], 10)


@pytest.mark.parametrize("channel", list(Channel))
@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_with_gates_of_zero_the_logits_are_the_plain_backbones_bit_for_bit(channel: Channel, clock: Clock) -> None:
    """Guarantee 1: an uncalibrated planner plans, and nothing it plans is heard."""
    checkpoint = tiny_checkpoint(calibrated=False)
    engine = Engine(checkpoint, InlinePlanners(Deliberator.from_checkpoint(checkpoint)), EngineConfig(clock=clock))
    tokens = run(engine, [ask(lag=0, channel=channel), ask(OTHER_PROMPT, lag=0, channel=channel)])
    assert [heard(row) for row in tokens] == decode(checkpoint, [PROMPT, OTHER_PROMPT], 10)
    assert engine.metrics.outcomes == {Reason.SHUT: 18}
    # By the wall clock a search ends when its target is about to be consumed.
    spent = engine.metrics.simulations
    assert spent == 18 * 8 if clock == "virtual" else 0 < spent <= 18 * 8


@pytest.mark.parametrize("setting", [{"channel": Channel.OFF}, {"injection_rate": 0.0}])
def test_open_gates_change_nothing_when_the_channel_is_off_or_the_rate_is_zero(setting: dict[str, Any]) -> None:
    checkpoint = tiny_checkpoint()
    engine = Engine(checkpoint, FakePlanners(lambda request: [make_plan(request, checkpoint)]))
    (tokens,) = run(engine, [ask(lag=0, **setting)])
    assert heard(tokens) == decode(checkpoint, [PROMPT], 10)[0]
    assert engine.metrics.outcomes == {Reason.ON_TIME: 9}


def test_real_plans_change_what_is_said() -> None:
    """The counterpart of the tests above: with the same engine and open gates something is heard."""
    checkpoint = tiny_checkpoint(tiny_config(kind="exact"))
    engine = Engine(checkpoint, InlinePlanners(Deliberator.from_checkpoint(checkpoint)))
    (tokens,) = run(engine, [ask(tokens=16, lag=1, injection_rate=0.5)])
    assert engine.metrics.injections > 0
    assert words(tokens) != said_alone(checkpoint, tokens=16)


# Threads, determinism -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [Channel.STATE, Channel.BOTH])
@pytest.mark.parametrize("count", [1, 3])
def test_planners_in_threads_give_the_same_tokens_as_inline(count: int, channel: Channel) -> None:
    """Guarantee 5 in one process: the virtual clock makes the planners' speed invisible."""
    checkpoint = tiny_checkpoint(tiny_config(kind="exact"))
    deliberator = Deliberator.from_checkpoint(checkpoint)
    settings_: dict[str, Any] = {"injection_rate": 0.5, "channel": channel}
    requests = [ask(PROMPT, lag=2, **settings_), ask(OTHER_PROMPT[:4], lag=1, **settings_), ask((9, 8), **settings_)]
    inline = Engine(checkpoint, InlinePlanners(deliberator, max_batch=2))
    threads = ThreadPlanners(deliberator, count=count, max_batch=2)
    threaded = Engine(checkpoint, threads)
    want, got = run(inline, requests), run(threaded, requests)
    threads.close()
    assert [heard(row) for row in got] == [heard(row) for row in want]
    assert threaded.metrics.outcomes == inline.metrics.outcomes
    assert inline.metrics.injections > 0


def test_two_runs_with_sampling_give_the_same_tokens_and_other_seeds_others() -> None:
    checkpoint = tiny_checkpoint(tiny_config(kind="exact"))

    def once(seed: int) -> list[int]:
        engine = Engine(checkpoint, InlinePlanners(Deliberator.from_checkpoint(checkpoint)))
        request = GenerationRequest(
            PROMPT, SamplingConfig(temperature=1.0, max_tokens=12, seed=seed), DeliberationConfig(lag=1), 8
        )
        return engine.generate_all([request])[0]

    assert once(1) == once(1)
    assert len({tuple(once(seed)) for seed in range(4)}) > 1


# Where a plan lands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_plan_is_written_right_before_its_target_is_consumed_and_into_its_row_only(lag: int, clock: Clock) -> None:
    checkpoint = tiny_checkpoint()
    assumed = tuple(said_alone(checkpoint)[1 : 1 + lag])
    plans: list[Plan] = []

    def answer(request: PlanRequest) -> list[Plan]:
        plans.append(make_plan(request, checkpoint, assumed=assumed))
        return [plans[-1]]

    engine = Engine(checkpoint, FakePlanners(answer), EngineConfig(clock=clock))
    steered = ask(lag=lag, max_plans=1, injection_rate=0.5, withdraw=False, name="steered")
    tokens = run(engine, [ask(OTHER_PROMPT, lag=7, plan_every=20, tokens=8), steered])
    (plan,) = [plan for plan in plans if plan.generation_id == "steered"]
    target = FIRST + lag
    assert (plan.position, plan.target) == (FIRST, target)

    def write(position: int, state: ModelState, decays: Tensor) -> ModelState:
        return written(plan, state, 0.5, row=1) if position == target else state

    want = decode(checkpoint, [OTHER_PROMPT, PROMPT], 8, write)
    assert heard(tokens[0]) == want[0], "the other row keeps its bits"
    assert_alike(tokens[1][:8], want[1])
    assert want[1] != decode(checkpoint, [OTHER_PROMPT, PROMPT], 8)[1], "the write must be audible for this test"
    # The first token whose logits it shaped tells of it, and no other.
    assert [token.position for token in tokens[1] if token.injection] == [target + 1]
    injection = tokens[1][lag + 1].injection
    assert injection is not None and injection.alpha_L == (0.5, 0.5) and injection.plan is plan


def test_a_spent_write_is_withdrawn_at_the_end_of_its_line() -> None:
    checkpoint = tiny_checkpoint()
    plans: list[Plan] = []

    def answer(request: PlanRequest) -> list[Plan]:
        plans.append(make_plan(request, checkpoint, line=(20, 21, 22)))
        return plans

    (tokens,) = run(Engine(checkpoint, FakePlanners(answer)), [ask(lag=0, max_plans=1, injection_rate=0.5)])
    difference: list[Tensor] = []

    def write(position: int, state: ModelState, decays: Tensor) -> ModelState:
        if position == FIRST:
            new = written(plans[0], state, 0.5)
            for old_layer, new_layer in zip(state.layers, new.layers, strict=True):
                difference.append(new_layer.ssm_BHPN - old_layer.ssm_BHPN)
            return new
        if position == FIRST + 3:
            taken = []
            for index, layer in enumerate(state.layers):
                now = difference[index]
                for back in (3, 2, 1):
                    now = now * decays[-back, index][..., None, None]
                taken.append(withdraw(layer.ssm_BHPN, now))
            return state.with_ssm(tuple(taken))
        return state

    want = decode(checkpoint, [PROMPT], 10, write)[0]
    assert_alike(tokens, want)
    left_in = decode(checkpoint, [PROMPT], 10, lambda p, s, d: written(plans[0], s, 0.5) if p == FIRST else s)[0]
    assert want[:4] == left_in[:4] and want[4:] != left_in[4:]


def test_the_policy_channel_mixes_the_visits_into_one_distribution_and_leaves_the_state_alone() -> None:
    checkpoint = tiny_checkpoint()
    engine = Engine(checkpoint, FakePlanners(lambda request: [make_plan(request, checkpoint, confidence=0.25)]))
    (tokens,) = run(engine, [ask(lag=0, max_plans=1, channel=Channel.POLICY)])

    def mix(position: int, log_probs_BV: Tensor) -> Tensor:
        if position != FIRST:
            return log_probs_BV
        probs_BV = 0.75 * log_probs_BV.exp()
        probs_BV[0, 20] += 0.25 * 0.25
        probs_BV[0, 21] += 0.25 * 0.75
        return probs_BV.log()

    assert heard(tokens) == decode(checkpoint, [PROMPT], 10, mix=mix)[0]
    assert heard(tokens) != decode(checkpoint, [PROMPT], 10)[0]
    injection = tokens[1].injection
    assert injection is not None and injection.alpha_L == (0.0, 0.0) and injection.policy_weight == 0.25


def test_both_channels_write_the_state_and_mix_the_policy() -> None:
    checkpoint = tiny_checkpoint()
    plans: list[Plan] = []

    def answer(request: PlanRequest) -> list[Plan]:
        plans.append(make_plan(request, checkpoint, confidence=0.5))
        return plans

    engine = Engine(checkpoint, FakePlanners(answer))
    (tokens,) = run(engine, [ask(lag=0, max_plans=1, channel=Channel.BOTH, withdraw=False, injection_rate=0.5)])

    def mix(position: int, log_probs_BV: Tensor) -> Tensor:
        if position != FIRST:
            return log_probs_BV
        return mix_policy(log_probs_BV[0], torch.tensor([20, 21]), torch.tensor([0.25, 0.75]), 0.5)[None]

    want = decode(checkpoint, [PROMPT], 10, lambda p, s, d: written(plans[0], s, 0.25) if p == FIRST else s, mix)
    assert_alike(tokens, want[0])


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_late_plan_on_the_wall_clock_is_carried_by_the_decays_and_weakened(late: int) -> None:
    checkpoint = tiny_checkpoint()
    alone = said_alone(checkpoint)
    plans: list[Plan] = []

    def answer(request: PlanRequest) -> list[Plan]:
        plans.append(make_plan(request, checkpoint, assumed=(alone[1],), line=tuple(alone[2:6])))
        return plans

    engine = Engine(checkpoint, FakePlanners(answer, delay=lambda request: (1 + late,)), WALL)
    deliberation: dict[str, Any] = {
        "lag": 1,
        "max_plans": 1,
        "injection_rate": 0.5,
        "late_decay": 0.9,
        "withdraw": False,
    }
    (tokens,) = run(engine, [ask(**deliberation)])
    target = FIRST + 1

    def write(position: int, state: ModelState, decays: Tensor) -> ModelState:
        if position != target + late:
            return state
        # One factor for each token consumed since the target: those at target … position - 1.
        carried_LH = torch.ones_like(decays[0, :, 0])
        for back in range(1, late + 1):
            carried_LH = carried_LH * decays[-back, :, 0]
        return written(plans[0], state, 0.5 * 0.9**late, carried_LH=carried_LH)

    want = decode(checkpoint, [PROMPT], 10, write)[0]
    assert words(tokens) == [token for token, _ in want]
    np.testing.assert_allclose([p for _, p in heard(tokens)], [p for _, p in want], atol=1e-6)
    assert [p for _, p in want] != [p for _, p in decode(checkpoint, [PROMPT], 10)[0]]
    assert engine.metrics.outcomes == {Reason.LATE: 1} and engine.metrics.plan_hit_rate == 1.0


def test_a_late_plan_does_not_move_the_policy() -> None:
    plan = make_plan(next(iter(_requests())), tiny_checkpoint())
    settings_ = DeliberationConfig(channel=Channel.BOTH, injection_rate=0.5, late_decay=0.5)
    on_time, late = as_injection(plan, plan.target, settings_), as_injection(plan, plan.target + 2, settings_)
    assert (on_time.alpha_L, on_time.policy_weight) == ((0.5, 0.5), 1.0)
    assert (late.alpha_L, late.policy_weight) == ((0.125, 0.125), 0.0)


def _requests() -> list[PlanRequest]:
    planners = FakePlanners(lambda request: [])
    engine = Engine(tiny_checkpoint(), planners, WALL)
    run(engine, [ask(lag=1, tokens=4)])
    return planners.requests


@pytest.mark.parametrize(
    ("delay", "line", "reason"),
    [
        (3, "other", Reason.MISMATCH),  # late, and something else was said since its target
        (4, "said", Reason.STALE),
    ],
)
def test_late_plans_are_refused_when_overtaken_by_the_text_or_by_time(delay: int, line: str, reason: Reason) -> None:
    checkpoint = tiny_checkpoint()
    alone = said_alone(checkpoint)
    planned = tuple(alone[2:7]) if line == "said" else (alone[2], (alone[3] + 1) % 31, *alone[4:7])
    planners = FakePlanners(
        lambda request: [make_plan(request, checkpoint, assumed=(alone[1],), line=planned)],
        delay=lambda request: (delay,),
    )
    engine = Engine(checkpoint, planners, WALL)
    (tokens,) = run(engine, [ask(lag=1, max_plans=1, max_lag=2)])
    assert engine.metrics.outcomes == {reason: 1} and engine.metrics.injections == 0
    assert heard(tokens) == decode(checkpoint, [PROMPT], 10)[0]


def test_the_future_that_came_true_is_the_one_used() -> None:
    checkpoint = tiny_checkpoint()
    alone = said_alone(checkpoint)

    def answer(request: PlanRequest) -> list[Plan]:
        futures = [(alone[1] + 1) % 31, alone[1], (alone[1] + 2) % 31]
        return [make_plan(request, checkpoint, assumed=(token,), seed=token) for token in futures]

    engine = Engine(checkpoint, FakePlanners(answer))
    (tokens,) = run(engine, [ask(lag=1, max_plans=1, hypotheses=3)])
    (injection,) = [token.injection for token in tokens if token.injection]
    assert injection.plan.assumed == (alone[1],)
    assert engine.metrics.outcomes == {Reason.ON_TIME: 1}


# What is asked --------------------------------------------------------------------------------------------------------


def test_a_request_carries_the_snapshot_taken_before_its_token() -> None:
    checkpoint = tiny_checkpoint(tiny_config(kind="exact"))
    planners = FakePlanners(lambda request: None)
    (tokens,) = run(Engine(checkpoint, planners), [ask(lag=2, name="who", hypotheses=2, simulations=5)])
    assert [request.position for request in planners.requests] == list(range(FIRST, FIRST + 7))
    for request in planners.requests:
        said = words(tokens)[: request.position - FIRST]
        with torch.inference_mode():
            hidden_BTLD, state = checkpoint.model.backbone(torch.tensor([[*PROMPT, *said]]))
        assert request.conv_LCK is not None
        for index, layer in enumerate(state.layers):
            np.testing.assert_allclose(request.ssm_LHPN[index], layer.ssm_BHPN[0].numpy(), atol=1e-5)
            np.testing.assert_allclose(request.conv_LCK[index], layer.conv_BCK[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(request.hidden_LD, hidden_BTLD[0, -1].numpy(), atol=1e-5)
        assert request.token == words(tokens)[request.position - FIRST]
        assert (request.target, request.generation_id) == (request.position + 2, "who")
        assert (request.hypotheses, request.simulations, request.model_version) == (2, 5, 3)
        arrays = (request.hidden_LD, request.ssm_LHPN, request.conv_LCK)
        assert all(array.flags["C_CONTIGUOUS"] and array.dtype == np.float32 for array in arrays)


@pytest.mark.parametrize(
    ("deliberation", "positions"),
    [
        ({"lag": 0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"lag": 3}, [0, 1, 2, 3]),
        ({"lag": 3, "plan_every": 3}, [0, 3]),
        ({"lag": 1, "max_plans": 2}, [0, 1]),
        ({"lag": 7}, []),
    ],
)
def test_plans_are_asked_for_as_often_as_set_and_never_for_after_the_end(
    deliberation: dict[str, Any], positions: list[int]
) -> None:
    planners = FakePlanners(lambda request: None)
    run(Engine(tiny_checkpoint(), planners), [ask(tokens=8, **deliberation)])
    assert [request.position - FIRST for request in planners.requests] == positions


def test_deadlines_are_given_when_a_pace_says_when_the_target_will_be_reached() -> None:
    clock, planners = FakeClock(), FakePlanners(lambda request: None)
    engine = Engine(tiny_checkpoint(), planners, EngineConfig(clock="wall", pace=4.0), clock=clock, sleep=clock.sleep)
    run(engine, [ask(lag=2, tokens=5)])
    # The first token is said at 100 s, the next every 1/4 s; a request is made a pace before its known token is used.
    assert [request.deadline for request in planners.requests] == [100.75, 101.0]
    assert clock.now == 101.0 and clock.slept == [0.25] * 4


def test_the_virtual_clock_waits_for_a_plan_when_its_target_has_come_and_not_before() -> None:
    checkpoint = tiny_checkpoint()
    planners = FakePlanners(lambda request: [make_plan(request, checkpoint, assumed=(0, 0))])
    run(Engine(checkpoint, planners), [ask(lag=2, tokens=6)])
    assert len(planners.requests) == 3
    assert planners.waits == [(request.request_id,) for request in planners.requests]


def test_two_engines_never_give_a_request_the_same_id() -> None:
    checkpoint = tiny_checkpoint()
    both = [FakePlanners(lambda request: None), FakePlanners(lambda request: None)]
    for planners in both:
        run(Engine(checkpoint, planners), [ask(tokens=6)])
    first, second = ({request.request_id for request in planners.requests} for planners in both)
    assert first and second and not first & second


class StalledPlanners:
    """Takes everything, answers nothing, and may not be waited for."""

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        pass

    def room(self) -> int | None:
        return None

    def soonest(self) -> float:
        return 0.0

    def poll(self) -> Arrivals:
        return Arrivals([], [])

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        raise AssertionError("the wall clock never waits")

    def close(self) -> None:
        pass


def test_the_wall_clock_never_waits_for_stalled_planners() -> None:
    """Guarantee 3: nothing in a step depends on an answer."""
    checkpoint = tiny_checkpoint()
    engine = Engine(checkpoint, StalledPlanners(), WALL)
    (tokens,) = run(engine, [ask(lag=1)])
    assert heard(tokens) == decode(checkpoint, [PROMPT], 10)[0]
    assert engine.metrics.outcomes == {Reason.ENDED: engine.metrics.requests} and engine.metrics.requests == 8


# Plans that must not be used ------------------------------------------------------------------------------------------

SPOILED: dict[str, Callable[[Plan], Plan]] = {
    "nan": lambda plan: dataclasses.replace(plan, write_u_LRE=plan.write_u_LRE * np.float32("nan")),
    "infinity": lambda plan: dataclasses.replace(plan, write_b_LRN=np.full_like(plan.write_b_LRN, np.inf)),
    "shape": lambda plan: dataclasses.replace(plan, write_u_LRE=plan.write_u_LRE[:, :, :-1]),
    "layers": lambda plan: dataclasses.replace(plan, confidence_L=plan.confidence_L[:1]),
    "generation": lambda plan: dataclasses.replace(plan, generation_id="another"),
    "position": lambda plan: dataclasses.replace(plan, position=plan.position - 1, assumed=(*plan.assumed, 0)),
    "target": lambda plan: dataclasses.replace(plan, target=plan.target + 1, assumed=(*plan.assumed, 0)),
    "assumed": lambda plan: dataclasses.replace(plan, assumed=(*plan.assumed, 0)),
    "token": lambda plan: dataclasses.replace(plan, line=(31,)),
    "confidence": lambda plan: dataclasses.replace(plan, confidence_L=plan.confidence_L * 1.5),
    "no array": lambda plan: dataclasses.replace(plan, policy_tokens_A=None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("clock", ["virtual", "wall"])
@pytest.mark.parametrize("how", SPOILED)
def test_a_malformed_plan_is_refused_counted_and_not_heard(how: str, clock: Clock) -> None:
    checkpoint = tiny_checkpoint()
    planners = FakePlanners(lambda request: [SPOILED[how](make_plan(request, checkpoint))])
    engine = Engine(checkpoint, planners, EngineConfig(clock=clock))
    (tokens,) = run(engine, [ask(lag=0)])
    assert heard(tokens) == decode(checkpoint, [PROMPT], 10)[0]
    assert engine.metrics.outcomes == {Reason.MALFORMED: 9} and engine.metrics.plan_hit_rate == 0.0


def test_one_malformed_future_spoils_the_whole_request() -> None:
    checkpoint = tiny_checkpoint()
    planners = FakePlanners(
        lambda request: [make_plan(request, checkpoint), SPOILED["nan"](make_plan(request, checkpoint))]
    )
    engine = Engine(checkpoint, planners)
    (tokens,) = run(engine, [ask(lag=0)])
    assert heard(tokens) == decode(checkpoint, [PROMPT], 10)[0]
    assert engine.metrics.outcomes == {Reason.MALFORMED: 9} and engine.metrics.injections == 0


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_plans_of_other_weights_are_refused(clock: Clock) -> None:
    checkpoint = tiny_checkpoint()
    planners = FakePlanners(lambda request: [make_plan(request, checkpoint, model_version=2)])
    engine = Engine(checkpoint, planners, EngineConfig(clock=clock))
    (tokens,) = run(engine, [ask(lag=0)])
    assert heard(tokens) == decode(checkpoint, [PROMPT], 10)[0]
    assert engine.metrics.outcomes == {Reason.OLD_VERSION: 9}


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_lost_plans_are_counted_and_decoding_goes_on(clock: Clock) -> None:
    """Guarantee 6, from the engine's side."""
    checkpoint = tiny_checkpoint()
    engine = Engine(checkpoint, FakePlanners(lambda request: None), EngineConfig(clock=clock))
    (tokens,) = run(engine, [ask(lag=1)])
    assert heard(tokens) == decode(checkpoint, [PROMPT], 10)[0]
    assert engine.metrics.outcomes == {Reason.LOST: 8} and engine.metrics.plan_hit_rate == 0.0


def test_a_plan_that_comes_twice_is_applied_once() -> None:
    checkpoint = tiny_checkpoint()
    once = Engine(checkpoint, FakePlanners(lambda request: [make_plan(request, checkpoint)]), WALL)
    twice = FakePlanners(lambda request: [make_plan(request, checkpoint)] * 2, delay=lambda request: (0, 1, 2))
    repeated = Engine(checkpoint, twice, WALL)
    request = ask(lag=0, injection_rate=0.5)
    assert [heard(row) for row in run(repeated, [request])] == [heard(row) for row in run(once, [request])]
    assert repeated.metrics.outcomes == once.metrics.outcomes == {Reason.ON_TIME: 9}


def test_a_plan_for_a_text_that_is_over_is_settled_as_ended_and_does_not_count_as_a_miss() -> None:
    checkpoint = tiny_checkpoint()
    planners = FakePlanners(lambda request: [make_plan(request, checkpoint, assumed=(0,))], delay=lambda request: (50,))
    engine = Engine(checkpoint, planners, WALL)
    run(engine, [ask(lag=1, tokens=4)])
    assert engine.metrics.outcomes == {Reason.ENDED: 2} and engine.metrics.plan_hit_rate == 0.0


def test_plans_reach_only_the_generation_that_asked_across_cancel_and_reuse_of_its_name() -> None:
    """Guarantee 4: the plans of a cancelled generation, of which every word will come true, arrive while another of the
    same name says the same text."""
    checkpoint = tiny_checkpoint()
    line = tuple(said_alone(checkpoint)[1:])
    planners = FakePlanners(lambda request: [make_plan(request, checkpoint, line=line)], delay=lambda request: (3,))
    engine = Engine(checkpoint, planners, WALL)
    engine.submit(ask(lag=0, name="slot", max_plans=2))
    first = engine.step() + engine.step() + engine.step()
    engine.cancel("slot")
    (gone,) = engine.step()
    assert (gone.finished, gone.finish_reason, gone.position) == (True, "cancelled", first[-1].position)
    assert engine.metrics.outcomes == {Reason.ENDED: 2} and not engine.busy
    tokens = run(engine, [ask(lag=9, tokens=9, name="slot")])
    assert heard(tokens[0]) == decode(checkpoint, [PROMPT], 9)[0]
    assert engine.metrics.injections == 0


def test_a_plan_that_came_before_its_time_leaves_with_its_generation() -> None:
    """The same on the virtual clock, where the plan was there already and waited for its target."""
    checkpoint = tiny_checkpoint()
    assumed = tuple(said_alone(checkpoint)[1:4])

    def answer(request: PlanRequest) -> list[Plan]:
        return [make_plan(request, checkpoint, assumed=assumed if request.generation_id == "slot" else ())]

    engine = Engine(checkpoint, FakePlanners(answer, eager=True))
    engine.submit(ask(OTHER_PROMPT, tokens=30, lag=0, name="other"))
    engine.submit(ask(lag=3, name="slot", max_plans=1))
    engine.step()
    engine.step()
    engine.cancel("slot")
    engine.step()
    engine.submit(ask(lag=9, name="slot"))
    said = [token for _ in range(10) for token in engine.step() if token.generation_id == "slot"]
    assert words(said) == said_alone(checkpoint) and not any(token.injection for token in said)
    assert engine.metrics.outcomes[Reason.ENDED] == 1


def test_rows_keep_their_plans_when_another_row_leaves() -> None:
    """A generation that ends or is cancelled shifts the rows of the batch, not the plans."""
    checkpoint = tiny_checkpoint()

    def planners() -> FakePlanners:
        return FakePlanners(lambda request: [make_plan(request, checkpoint)] if request.target % 2 else None)

    steered = ask(tokens=10, lag=0, injection_rate=0.5, name="steered")
    (alone,) = run(Engine(checkpoint, planners()), [steered])
    engine = Engine(checkpoint, planners())
    for request in (ask(OTHER_PROMPT, tokens=3, lag=5), ask(OTHER_PROMPT, tokens=9, lag=9, name="leaves"), steered):
        engine.submit(request)
    said: list[Token] = []
    for step in range(12):
        if step == 5:
            engine.cancel("leaves")
        said += [token for token in engine.step() if token.generation_id == "steered"]
    assert words(said) == words(alone)
    assert [token.position for token in said if token.injection] == [t.position for t in alone if t.injection]
    np.testing.assert_allclose([t.logprob for t in said], [t.logprob for t in alone], atol=1e-4)


schedules = st.lists(
    st.tuples(
        st.sampled_from(["plan", "plan", "shut", "lost", "nan", "old", "silence", "foreign"]),
        st.lists(st.integers(0, 6), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(schedules, st.integers(0, 2), st.integers(0, 3), st.booleans(), st.integers(0, 8))
def test_every_request_is_settled_exactly_once_whatever_arrives_when(
    schedule: list[tuple[str, list[int]]], lag: int, max_lag: int, withdraws: bool, cancel_at: int
) -> None:
    checkpoint = _shared()

    def kind(request: PlanRequest) -> tuple[str, list[int]]:
        return schedule[request.request_id % len(schedule)]

    def answer(request: PlanRequest) -> list[Plan] | None:
        plan = make_plan(request, checkpoint, assumed=(0,) * (request.target - request.position), line=(0,) * 4)
        match kind(request)[0]:
            case "lost":
                return None
            case "silence":
                return []
            case "shut":
                return [dataclasses.replace(plan, confidence_L=np.zeros_like(plan.confidence_L))]
            case "nan":
                return [plan, SPOILED["nan"](plan)]
            case "old":
                return [dataclasses.replace(plan, model_version=1)]
            case "foreign":
                return [dataclasses.replace(plan, generation_id="b")]
        return [plan]

    engine = Engine(checkpoint, FakePlanners(answer, delay=lambda request: kind(request)[1]), WALL)
    deliberation: dict[str, Any] = {"lag": lag, "max_lag": max_lag, "withdraw": withdraws, "injection_rate": 0.5}
    engine.submit(ask(tokens=8, name="a", **deliberation))
    engine.submit(ask(OTHER_PROMPT[:3], tokens=6, name="b", **deliberation))
    said: dict[str, list[Token]] = {"a": [], "b": []}
    step = 0
    while engine.busy:
        if step == cancel_at:
            engine.cancel("b")
        for token in engine.step():
            said[token.generation_id].append(token)
        step += 1
    metrics = engine.metrics
    assert sum(metrics.outcomes.values()) == metrics.requests
    assert metrics.injections == metrics.outcomes[Reason.ON_TIME] + metrics.outcomes[Reason.LATE]
    assert len(said["a"]) == 8 and all(np.isfinite(token.logprob) for token in said["a"])


_CHECKPOINTS: list[Checkpoint] = []


def _shared() -> Checkpoint:
    """One checkpoint for all drawn examples."""
    if not _CHECKPOINTS:
        _CHECKPOINTS.append(tiny_checkpoint())
    return _CHECKPOINTS[0]


# Batches, ends, bad input ---------------------------------------------------------------------------------------------


def test_generations_that_join_at_different_times_say_what_they_say_alone() -> None:
    checkpoint = tiny_checkpoint()
    prompts = [PROMPT, OTHER_PROMPT[:3], (20,), OTHER_PROMPT]
    engine = Engine(checkpoint, config=EngineConfig(max_batch=3))
    said: dict[str, list[int]] = {}
    names: list[str] = []
    for step in range(40):
        if step % 3 == 0 and len(names) < len(prompts):
            names.append(engine.submit(ask(prompts[len(names)], tokens=9)))
            said[names[-1]] = []
        tokens = engine.step()
        assert len(tokens) <= 3
        for token in tokens:
            said[token.generation_id].append(token.token)
    assert not engine.busy
    assert list(said.values()) == [said_alone(checkpoint, prompt, 9) for prompt in prompts]


def test_a_generation_over_the_batch_limit_waits_for_room() -> None:
    engine = Engine(tiny_checkpoint(), config=EngineConfig(max_batch=1))
    first, second = engine.submit(ask(tokens=3)), engine.submit(ask(tokens=2))
    order = [(token.generation_id, token.finished) for token in engine.generate([])]
    assert order == [(first, False), (first, False), (first, True), (second, False), (second, True)]


def test_length_and_stop_tokens_end_a_generation_and_say_so() -> None:
    checkpoint = tiny_checkpoint()
    (tokens,) = run(Engine(checkpoint), [ask(tokens=4)])
    assert [token.finish_reason for token in tokens] == [None, None, None, "length"]
    assert [token.position for token in tokens] == list(range(FIRST, FIRST + 4))
    terminal = set(checkpoint.tokenizer.terminal_ids)
    stopped = 0
    for seed in range(20):
        request = GenerationRequest(PROMPT, SamplingConfig(temperature=2.0, max_tokens=30, seed=seed))
        (tokens,) = run(Engine(checkpoint), [request])
        assert not terminal & set(words(tokens[:-1]))
        if tokens[-1].finish_reason == "stop":
            stopped += 1
            assert tokens[-1].token in terminal
        else:
            assert len(tokens) == 30
    assert stopped > 0


def test_sampling_follows_its_seed_alone_whoever_shares_the_batch() -> None:
    checkpoint = tiny_checkpoint()

    def sampled(seed: int) -> GenerationRequest:
        return GenerationRequest(PROMPT, SamplingConfig(temperature=1.0, max_tokens=12, seed=seed))

    alone = Engine(checkpoint).generate_all([sampled(1)])[0]
    together = Engine(checkpoint).generate_all([sampled(2), sampled(1), sampled(1)])
    assert together[1] == together[2] == alone
    assert together[0] != alone


def test_a_cancelled_generation_keeps_what_it_said() -> None:
    checkpoint = tiny_checkpoint()

    class CancelsAfterTwo(Engine):
        steps = 0

        def step(self) -> list[Token]:
            self.steps += 1
            if self.steps == 3:
                self.cancel("gone")
            return super().step()

    said = CancelsAfterTwo(checkpoint).generate_all([ask(name="gone"), ask(tokens=5)])
    assert said == [said_alone(checkpoint)[:2], said_alone(checkpoint)[:5]]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(()), "prompt is empty"),
        (ask((3, 31)), "token 31; allowed: 0 to 30"),
        (ask((-1,)), "token -1; allowed: 0 to 30"),
        (ask(name="taken"), "'taken' is in use"),
    ],
)
def test_bad_generations_are_refused_by_name_and_change_nothing(request_: GenerationRequest, message: str) -> None:
    checkpoint = tiny_checkpoint()
    engine = Engine(checkpoint)
    engine.submit(ask(name="taken"))
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert words(list(engine.generate([]))) == said_alone(checkpoint)


def test_planners_and_an_injection_source_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="injection_source"):
        Engine(tiny_checkpoint(), StalledPlanners(), injection_source=lambda name, position: None)


# Event log ------------------------------------------------------------------------------------------------------------


def source_of(logged: Sequence[LoggedGeneration]) -> InjectionSource:
    by_name = {generation.generation_id: generation.injections for generation in logged}
    return lambda name, position: by_name[name].get(position)


def replay(checkpoint: Checkpoint, logged: Sequence[LoggedGeneration], config: EngineConfig) -> list[list[Token]]:
    engine = Engine(checkpoint, config=config, injection_source=source_of(logged))
    requests = [
        GenerationRequest(
            generation.prompt, generation.sampling, generation.deliberation, generation_id=generation.generation_id
        )
        for generation in logged
    ]
    return run(engine, requests)


def record(path: Path, checkpoint: Checkpoint, **settings_: Any) -> tuple[list[list[Token]], Engine]:
    world = ExactDynamics(checkpoint.model.backbone)
    planners = InlinePlanners(Deliberator.from_checkpoint(checkpoint, world_model=world))
    with open(path, "w", encoding="utf-8") as file:
        engine = Engine(checkpoint, planners, world_model=world, event_log=EventLog(file))
        sampled = SamplingConfig(temperature=0.7, max_tokens=12, seed=5)
        deliberation = DeliberationConfig(lag=1, injection_rate=0.5, **settings_)
        requests = [
            GenerationRequest(PROMPT, sampled, deliberation, 8),
            GenerationRequest(OTHER_PROMPT, SamplingConfig(max_tokens=12), deliberation, 8),
        ]
        return run(engine, requests), engine


@pytest.mark.parametrize("channel", [Channel.STATE, Channel.BOTH])
@pytest.mark.parametrize("withdraw", [True, False])
def test_a_log_replays_to_the_same_tokens_without_a_planner(tmp_path: Path, channel: Channel, withdraw: bool) -> None:
    checkpoint = tiny_checkpoint()
    said, engine = record(tmp_path / "events.jsonl", checkpoint, channel=channel, withdraw=withdraw)
    logged = read_log(tmp_path / "events.jsonl")
    assert [heard(row) for row in replay(checkpoint, logged, EngineConfig())] == [heard(row) for row in said]
    assert [generation.tokens for generation in logged] == [words(row) for row in said]
    assert sum(len(generation.injections) for generation in logged) == engine.metrics.injections > 0
    silent = [dataclasses.replace(generation, injections={}) for generation in logged]
    assert [heard(row) for row in replay(checkpoint, silent, EngineConfig())] != [heard(row) for row in said]


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_log_with_late_plans_replays_on_either_clock(tmp_path: Path, clock: Clock) -> None:
    checkpoint = tiny_checkpoint()
    alone = said_alone(checkpoint)
    planners = FakePlanners(
        lambda request: [make_plan(request, checkpoint, line=tuple(alone[1:9]))], delay=lambda request: (2,)
    )
    path = tmp_path / "events.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        engine = Engine(checkpoint, planners, WALL, event_log=EventLog(file))
        said = run(engine, [ask(lag=0, max_plans=1, injection_rate=0.5)])
    assert engine.metrics.outcomes == {Reason.LATE: 1}
    replayed = replay(checkpoint, read_log(path), EngineConfig(clock=clock))
    assert [heard(row) for row in replayed] == [heard(row) for row in said]


def test_every_request_of_a_log_is_followed_by_what_became_of_it(tmp_path: Path) -> None:
    _, engine = record(tmp_path / "events.jsonl", tiny_checkpoint())
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    asked = [event["request"] for event in events if event["event"] == "request"]
    settled = [event["request"] for event in events if event["event"] in ("inject", "reject")]
    assert sorted(settled) == sorted(asked) == sorted(set(asked))
    assert len(asked) == engine.metrics.requests
    reasons = [event["reason"] for event in events if event["event"] == "reject"]
    assert len(reasons) == engine.metrics.requests - engine.metrics.injections


def test_the_log_of_a_cancelled_generation_holds_the_tokens_it_said(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        engine = Engine(tiny_checkpoint(), event_log=EventLog(file))
        engine.submit(ask(name="gone"))
        said = engine.step() + engine.step()
        engine.cancel("gone")
        engine.step()
    assert read_log(path)[0].tokens == words(said)


def _spoil(number: int, change: Callable[[dict[str, Any]], object]) -> Callable[[list[str]], list[str]]:
    def spoil(lines: list[str]) -> list[str]:
        event = json.loads(lines[number])
        change(event)
        return [*lines[:number], json.dumps(event), *lines[number + 1 :]]

    return spoil


def _edit_write(event: dict[str, Any]) -> None:
    data = event["arrays"]["write_u_LRE"]["data"]
    event["arrays"]["write_u_LRE"]["data"] = ("B" if data[0] == "A" else "A") + data[1:]


def _first(lines: list[str], kind: str) -> int:
    return next(number for number, line in enumerate(lines) if json.loads(line)["event"] == kind)


@pytest.mark.parametrize(
    ("spoil", "line", "message"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:-9]], -1, "not JSON"),
        (lambda lines: [lines[0], "[]", *lines[1:]], 2, "a list; allowed: an object"),
        (lambda lines: [lines[0], '{"event": "x", "generation": "g"}'], 2, "allowed: start, request, inject"),
        (lambda lines: lines[2:], 1, "not an event of this log"),
        (_spoil(0, lambda event: event.update(format=99)), 1, "format = 99; allowed: 1"),
        (_spoil(0, lambda event: event.update(sampling={"heat": 1})), 1, "heat"),
        (_spoil(0, lambda event: event.pop("prompt")), 1, "prompt"),
        (lambda lines: _spoil(_first(lines, "inject"), _edit_write)(lines), "inject", "the event says"),
    ],
)
def test_a_corrupted_log_is_refused_with_file_and_line(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]], line: int | str, message: str
) -> None:
    path = tmp_path / "events.jsonl"
    record(path, tiny_checkpoint())
    lines = path.read_text().splitlines()
    number = _first(lines, line) + 1 if isinstance(line, str) else line if line > 0 else len(lines)
    path.write_text("\n".join(spoil(lines)))
    with pytest.raises(ValueError, match=message) as caught:
        read_log(path)
    assert f"{path}, line {number}:" in str(caught.value)


def test_an_empty_or_missing_log_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    for name in ("empty", "missing"):
        with pytest.raises(ValueError, match=name):
            read_log(tmp_path / name)
