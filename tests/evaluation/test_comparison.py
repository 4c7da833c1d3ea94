"""The controls do what they say, and the comparison reports what happened."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.data.sequences import encode_answer, encode_prompt
from crsm.engine import Engine
from crsm.evaluation.comparison import CONTROLS, TIME_SHIFT, compare, with_untrained_world_model
from crsm.evaluation.controls import (
    AlteredPlanners,
    OraclePlanners,
    other_problem,
    random_write,
    silent_tokens,
    time_shifted,
)
from crsm.generation import GenerationRequest
from crsm.planners import InlinePlanners, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.tasks import build_task
from crsm.tasks.base import problems
from crsm.types import Channel
from tests.fixtures import PROMPT, TASK, a_request, make_plan, tiny_checkpoint, tiny_config

CONTENT = ("line", "value_root_L", "value_plan_L", "uncertainty", "confidence_L", "write_u_LRE", "write_b_LRN")
ADDRESS = ("request_id", "generation_id", "position", "target", "assumed", "model_version")


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint()


def plan_for(checkpoint, generation, position=6, line=(21, 22), seed=0, number=0):
    request = a_request(request_id=number, generation_id=generation, position=position, lag=1)
    return make_plan(request, checkpoint, assumed=(20 + number % 3,), line=line, seed=seed)


def same(one, other, names):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def factor_norms(plan):
    return [np.linalg.norm(factor, axis=-1) for factor in (plan.write_u_LRE, plan.write_b_LRN)]


# ------------------------------------------------------------------------------------------------- single controls


def test_a_random_write_has_the_norm_of_the_plans_own_and_another_direction(checkpoint):
    plan = plan_for(checkpoint, "a")
    (altered,) = random_write(seed=5)([plan])
    for mine, theirs in zip(factor_norms(plan), factor_norms(altered), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    u, v = plan.write_u_LRE.ravel(), altered.write_u_LRE.ravel()
    assert abs(u @ v) < 0.5 * np.linalg.norm(u) * np.linalg.norm(v)
    assert same(plan, altered, (*ADDRESS, "line", "confidence_L"))
    assert random_write(seed=5)([plan])[0].write_u_LRE.tolist() == altered.write_u_LRE.tolist()


def test_another_problems_plan_keeps_the_address_and_brings_its_own_content(checkpoint):
    plans = [plan_for(checkpoint, name, seed=place, number=place) for place, name in enumerate("abc")]
    altered = other_problem(plans)
    for place, plan in enumerate(plans):
        assert same(altered[place], plan, ADDRESS)
        assert same(altered[place], plans[place - 1], CONTENT)


def test_another_problems_plan_is_one_of_the_same_position(checkpoint):
    # What a first wait brings at lag 2: the plans of two steps.
    plans = [
        plan_for(checkpoint, name, position, seed=10 * position + place, number=2 * position + place)
        for position in (6, 7)
        for place, name in enumerate("ab")
    ]
    altered = other_problem(plans)
    assert [same(a, b, CONTENT) for a, b in zip(altered, (plans[i] for i in (1, 0, 3, 2)), strict=True)] == [True] * 4


def test_another_problems_plan_is_never_ones_own(checkpoint):
    alone = [plan_for(checkpoint, "a", position, seed=position, number=position) for position in (6, 7)]
    assert not any(plan.confidence_L.any() for plan in other_problem(alone))
    mixed = [*alone, plan_for(checkpoint, "b", 9, seed=9, number=9)]
    altered = other_problem(mixed)
    assert [same(plan, mixed[2], CONTENT) for plan in altered] == [True, True, False]
    assert same(altered[2], mixed[1], CONTENT)


def test_a_shifted_plan_is_the_one_of_some_positions_before(checkpoint):
    alter = time_shifted(2)
    plans = [plan_for(checkpoint, "a", position, seed=position, number=position) for position in range(6, 11)]
    altered = [alter([plan])[0] for plan in plans]
    assert [plan.confidence_L.any() for plan in altered] == [False, False, True, True, True]
    for place in (2, 3, 4):
        assert same(altered[place], plans[place - 2], CONTENT)
        assert same(altered[place], plans[place], ADDRESS)


def test_a_shift_does_not_mix_generations(checkpoint):
    alter = time_shifted(1)
    alter([plan_for(checkpoint, "a", 6)])
    (altered,) = alter([plan_for(checkpoint, "b", 7)])
    assert not altered.confidence_L.any()


def test_a_silent_token_is_the_plans_next_token_and_nothing_else(checkpoint):
    opened, shut, empty = (
        plan_for(checkpoint, "a", line=(23, 24)),
        dataclasses.replace(plan_for(checkpoint, "b"), confidence_L=np.zeros(2, np.float32)),
        plan_for(checkpoint, "c", line=()),
    )
    altered = silent_tokens([opened, shut, empty])
    assert altered[0].policy_tokens_A.tolist() == [23]
    assert altered[0].policy_probs_A.tolist() == [1.0]
    assert altered[0].confidence_L.tolist() == [1.0, 1.0]
    assert not altered[1].confidence_L.any()
    assert not altered[2].confidence_L.any()


def test_the_oracle_plans_the_next_tokens_of_the_solution(checkpoint):
    answer = (20, 21, 22, 23, 24)
    oracle = OraclePlanners(checkpoint.model, {"g": (6, answer)}, plan_length=2)
    oracle.submit([a_request(request_id=n, position=position, lag=1) for n, position in enumerate((6, 8, 9, 10))])
    plans = oracle.poll().plans
    # Asked at position 6 with lag 1: token 7 is assumed, 8 and 9 are planned; answer[i] stands at position 6 + i.
    assert [plan.assumed for plan in plans] == [(21,), (23,), (24,), (0,)]
    assert [plan.line for plan in plans] == [(22, 23), (24,), (), ()]
    assert [bool(plan.confidence_L.all()) for plan in plans] == [True, True, False, False]
    with torch.inference_mode():
        write = checkpoint.model.writer(torch.tensor([[22, 23]]), torch.tensor([2]))
    np.testing.assert_array_equal(plans[0].write_u_LRE, write.u_BLRE[0].numpy())


# ---------------------------------------------------------------------------------------------- through the engine


def say(checkpoint, planners, tokens=8, **deliberation):
    engine = Engine(checkpoint, planners, EngineConfig(clock="virtual"))
    settings = DeliberationConfig(lag=0, plan_length=3, **deliberation)
    request = GenerationRequest(PROMPT, SamplingConfig(max_tokens=tokens), settings, 8, "g")
    return list(engine.generate([request]))


def inline(checkpoint, **options):
    return InlinePlanners(Deliberator.from_checkpoint(checkpoint, **options))


def test_silent_tokens_make_the_generation_say_the_line(checkpoint):
    def chatty(plans):
        return silent_tokens([dataclasses.replace(plan, line=(27,)) for plan in plans])

    said = say(checkpoint, AlteredPlanners(inline(checkpoint), chatty), channel=Channel.POLICY)
    assert said[0].token == say(checkpoint, None)[0].token
    assert [token.token for token in said[1:]] == [27] * 7
    assert all(token.logprob == pytest.approx(0.0, abs=1e-6) for token in said[1:])


def test_silent_tokens_of_real_plans_are_said(checkpoint):
    said = say(checkpoint, AlteredPlanners(inline(checkpoint), silent_tokens), channel=Channel.POLICY)
    steered = [token for token in said if token.injection is not None]
    assert steered
    assert [token.token for token in steered] == [token.injection.plan.line[0] for token in steered]
    assert not any(alpha for token in steered for alpha in token.injection.alpha_L)


@pytest.fixture(scope="module")
def compared(checkpoint):
    task = build_task(TASK)
    return compare(
        checkpoint,
        task,
        problems(task, 0, "test", 6),
        deliberation=DeliberationConfig(lag=1, plan_length=3, injection_rate=0.5),
        search=checkpoint.config.search,
        sampling=SamplingConfig(max_tokens=8),
        seed=1,
    )


def test_the_comparison_reports_every_system_and_control(compared):
    assert set(compared["controls"]) == set(CONTROLS)
    for figures in (compared["system1"], compared["system2"], *compared["controls"].values()):
        low, high = figures["interval"]
        assert 0 <= low <= figures["accuracy"] <= high <= 1
    assert set(compared["tokens_per_second"]) == {"system1", "system2"}
    assert 0 <= compared["plan_hit_rate"] <= 1
    assert compared["mcnemar_p"] == 1.0  # nobody is right: random weights
    assert (compared["lag"], compared["problems"]) == (1, 6)


def test_shut_gates_say_the_very_same_tokens(compared):
    assert compared["controls"]["gate_zero"]["identical"] is True
    assert compared["controls"]["gate_zero"]["injections"] == 0


def test_the_other_controls_write(compared):
    for name in set(CONTROLS) - {"gate_zero", "oracle"}:
        assert compared["controls"][name]["injections"] > 0, name


def test_steering_is_seen_by_the_comparison_of_tokens(checkpoint):
    plain, steered = say(checkpoint, None), say(checkpoint, inline(checkpoint), injection_rate=1.0)
    assert [t.logprob for t in plain] != [t.logprob for t in steered]


def test_the_virtual_clock_gives_the_same_figures_twice_and_with_threads(checkpoint, compared):
    task = build_task(TASK)
    arguments = {
        "deliberation": DeliberationConfig(lag=1, plan_length=3, injection_rate=0.5),
        "search": checkpoint.config.search,
        "sampling": SamplingConfig(max_tokens=8),
        "seed": 1,
        "controls": ("random_write",),
    }
    fresh = problems(task, 0, "test", 6)
    again = compare(checkpoint, task, fresh, **arguments)
    threads = compare(
        checkpoint,
        task,
        fresh,
        make_planners=lambda: ThreadPlanners(Deliberator.from_checkpoint(checkpoint, plan_length=3), 2),
        **arguments,
    )
    for other in (again, threads):
        assert other["system2"] == compared["system2"]
        for key in ("requests", "tokens", "outcomes", "injections", "simulations"):
            assert other["plans"][key] == compared["plans"][key]
        assert other["controls"]["random_write"] == compared["controls"]["random_write"]


def test_an_unknown_control_is_named(checkpoint):
    task = build_task(TASK)
    with pytest.raises(ValueError, match="control 'placebo'; allowed: gate_zero"):
        compare(
            checkpoint,
            task,
            problems(task, 0, "test", 1),
            deliberation=DeliberationConfig(),
            search=checkpoint.config.search,
            sampling=SamplingConfig(max_tokens=2),
            seed=0,
            controls=("placebo",),
        )


@pytest.mark.parametrize(("kind", "part"), [("latent", "world_model"), ("exact", "backbone")])
def test_an_untrained_world_model_has_other_weights_and_changes_nothing_else(kind, part):
    trained = tiny_checkpoint(tiny_config(kind=kind))
    before, kept = torch.random.get_rng_state(), copy.deepcopy(trained.model.state_dict())
    one, two = with_untrained_world_model(trained, 1), with_untrained_world_model(trained, 1)
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, tensor), other in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other) and torch.equal(trained.model.state_dict()[name], kept[name])
        if not name.startswith(part):
            assert torch.equal(tensor, kept[name]), name
    name = next(name for name, _ in trained.model.named_parameters() if name.startswith(part))
    assert not torch.equal(one.model.state_dict()[name], kept[name])
    world = one.model.planning_model()
    assert world is one.model.world_model if kind == "latent" else world.backbone is one.model.backbone


@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_every_control_runs_with_either_world_model(kind):
    checkpoint = tiny_checkpoint(tiny_config(kind=kind))
    task = build_task(TASK)
    found = compare(
        checkpoint,
        task,
        problems(task, 0, "test", 2),
        deliberation=DeliberationConfig(lag=1),
        search=checkpoint.config.search.model_copy(update={"simulations": 4}),
        sampling=SamplingConfig(max_tokens=4),
        seed=0,
        controls=CONTROLS,
    )
    assert set(found["controls"]) == set(CONTROLS)


def test_the_oracles_plans_are_the_solutions_own_tokens_through_the_engine(checkpoint):
    """With the token channel and every gate open, the oracle says the whole solution that is left at its first plan."""
    task = build_task(TASK)
    problem = problems(task, 0, "test", 1)[0]
    prompt = tuple(encode_prompt(problem, checkpoint.tokenizer))
    answer = (*encode_answer(problem.solution, checkpoint.tokenizer), checkpoint.tokenizer.verdict_id(True))
    oracle = OraclePlanners(checkpoint.model, {"g": (len(prompt), answer)}, 4)
    engine = Engine(checkpoint, oracle, EngineConfig(clock="virtual"))
    settings = DeliberationConfig(lag=0, channel=Channel.POLICY)
    said = engine.generate_all([GenerationRequest(prompt, SamplingConfig(max_tokens=12), settings, 8, "g")])[0]
    assert tuple(said[1:]) == answer[1:]
    assert TIME_SHIFT > 0
