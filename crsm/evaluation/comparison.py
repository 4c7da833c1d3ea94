"""System 1 against System 2 with all controls, on the same problems, seeds and virtual clock."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig, SearchConfig
from crsm.data.sequences import encode_answer
from crsm.evaluation.controls import (
    AlteredPlanners,
    OraclePlanners,
    other_problem,
    random_write,
    silent_tokens,
    time_shifted,
)
from crsm.evaluation.solving import Run, solve
from crsm.evaluation.statistics import bootstrap_difference, mcnemar, wilson_interval
from crsm.latent_dynamics import LatentDynamics
from crsm.mamba_ssm import Backbone
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners, Planners
from crsm.reasoning import Deliberator
from crsm.tasks.base import Problem, Task
from crsm.types import Channel

TIME_SHIFT = 2
"""Positions by which the plans of the control ``time_shifted`` are late."""

CONTROLS = (
    "gate_zero",
    "random_write",
    "other_problem",
    "time_shifted",
    "oracle",
    "silent_tokens",
    "untrained_planner",
)


def compare(
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence[Problem],
    *,
    deliberation: DeliberationConfig,
    search: SearchConfig,
    sampling: SamplingConfig,
    seed: int,
    make_planners: Callable[[], Planners] | None = None,
    controls: Sequence[str] = CONTROLS,
    on_progress: Callable[[str, float], None] = lambda name, accuracy: None,
) -> dict[str, Any]:
    """The figures of ``jobs.benchmark_reasoning``.

    Args:
        checkpoint: the model.
        task: judges the answers.
        problems: the same for every system and control.
        deliberation: lag, rate, channel.
        search: settings of the planners' search.
        sampling: of the tokens.
        seed: of the controls' randomness.
        make_planners: who plans for System 2 (threads, actors); None: inline. The controls always plan inline.
        controls: which controls to run.
        on_progress: told every system's accuracy.

    Returns:
        ``system1``, ``system2`` (accuracy, 95 % interval), ``mcnemar_p``, ``difference``, ``plan_hit_rate``,
        ``outcomes``, ``tokens_per_second``, ``controls``.
    """

    def run(name: str, planners: Planners | None = None) -> Run:
        return run_system(
            name,
            checkpoint,
            task,
            problems,
            deliberation=deliberation,
            search=search,
            sampling=sampling,
            seed=seed,
            planners=planners,
        )

    system1 = run("system1")
    on_progress("system1", system1.accuracy)
    system2 = run("system2", make_planners() if make_planners else None)
    on_progress("system2", system2.accuracy)
    results: dict[str, Any] = {
        "task": task.name,
        "problems": len(problems),
        "lag": deliberation.lag,
        "system1": _accuracy(system1),
        "system2": _accuracy(system2),
        "difference": {
            "accuracy": system2.accuracy - system1.accuracy,
            "interval": bootstrap_difference(system2.correct_M, system1.correct_M),
        },
        "mcnemar_p": mcnemar(system1.correct_M, system2.correct_M),
        "plan_hit_rate": system2.metrics.plan_hit_rate,
        "plans": system2.metrics.summary(),
        "tokens_per_second": {"system1": system1.tokens_per_second, "system2": system2.tokens_per_second},
        "controls": {},
    }
    for name in controls:
        outcome = run(name)
        on_progress(name, outcome.accuracy)
        results["controls"][name] = _accuracy(outcome) | {"injections": outcome.metrics.injections}
        if name == "gate_zero":
            results["controls"][name]["identical"] = identical(system1, outcome)
    return results


def run_system(
    name: str,
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence[Problem],
    *,
    deliberation: DeliberationConfig,
    search: SearchConfig,
    sampling: SamplingConfig,
    seed: int,
    planners: Planners | None = None,
) -> Run:
    """One system's answers by the virtual clock.

    Args:
        name: ``system1``, ``system2``, or one of ``CONTROLS``.
        checkpoint: the model.
        task: judges the answers.
        problems: what to solve.
        deliberation: lag, rate, channel.
        search: settings of the planners' search.
        sampling: of the tokens.
        seed: of a control's randomness.
        planners: who plans for System 2 (threads, actors), closed here; None: inline. The controls always plan inline.
    """
    planners, deliberation = system_planners(
        name,
        checkpoint,
        deliberation=deliberation,
        search=search,
        seed=seed,
        solutions=lambda: solutions_of(checkpoint, problems),
        planners=planners,
    )
    try:
        return solve(
            checkpoint,
            task,
            problems,
            planners=planners,
            deliberation=deliberation,
            sampling=sampling,
            simulations=search.simulations,
            engine=EngineConfig(clock="virtual", max_batch=checkpoint.config.engine.max_batch),
        )
    finally:
        if planners is not None:
            planners.close()


def system_planners(
    name: str,
    checkpoint: Checkpoint,
    *,
    deliberation: DeliberationConfig,
    search: SearchConfig,
    seed: int,
    solutions: Callable[[], Mapping[str, tuple[int, Sequence[int]]]],
    planners: Planners | None = None,
) -> tuple[Planners | None, DeliberationConfig]:
    """Who plans for a system or control, and how it is asked.

    Args:
        name: ``system1``, ``system2``, or one of ``CONTROLS``.
        checkpoint: the model.
        deliberation: lag, rate, channel.
        search: settings of the planners' search.
        seed: of a control's randomness.
        solutions: for the oracle: by generation, where the answer begins, and its tokens.
        planners: who plans for System 2; None: inline.
    """

    def inline(source: Checkpoint = checkpoint, **options: Any) -> InlinePlanners:
        deliberator = Deliberator.from_checkpoint(
            source, search=search, plan_length=deliberation.plan_length, **options
        )
        return InlinePlanners(deliberator, checkpoint.config.planners.max_batch)

    if name == "system1":
        planners = None
    elif name == "system2":
        planners = planners or inline()
    elif name == "gate_zero":
        planners = inline(forced_confidence=0.0)
    elif name == "random_write":
        planners = AlteredPlanners(inline(), random_write(seed))
    elif name == "other_problem":
        planners = AlteredPlanners(inline(), other_problem)
    elif name == "time_shifted":
        planners = AlteredPlanners(inline(), time_shifted(TIME_SHIFT))
    elif name == "silent_tokens":
        deliberation = deliberation.model_copy(update={"channel": Channel.POLICY})
        planners = AlteredPlanners(inline(), silent_tokens)
    elif name == "untrained_planner":
        planners = inline(with_untrained_world_model(checkpoint, seed))
    elif name == "oracle":
        planners = OraclePlanners(checkpoint.model, solutions(), deliberation.plan_length)
    else:
        raise ValueError(f"control {name!r}; allowed: {', '.join(CONTROLS)}")
    return planners, deliberation


def with_untrained_world_model(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """A planner's checkpoint with random weights in what imagines (the latent world model, or its own backbone); head,
    writer, gates and critics stay as they are."""
    trained = checkpoint.model
    model = copy.copy(trained)
    model._modules = dict(trained._modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if checkpoint.config.model.world_model.kind == "latent":
            model.world_model = LatentDynamics(checkpoint.config.model, trained.backbone.embedding).eval()
        else:
            model.backbone = Backbone(checkpoint.config.model.backbone).eval()
    return dataclasses.replace(checkpoint, model=model)


def solutions_of(checkpoint: Checkpoint, problems: Sequence[Problem]) -> dict[str, tuple[int, Sequence[int]]]:
    """What the oracle plans, by the names that :func:`crsm.evaluation.solving.solve` gives to generations."""
    tokenizer = checkpoint.tokenizer
    end = tokenizer.verdict_id(True) if tokenizer.has_verdicts else tokenizer.eos_id
    return {
        f"problem-{index}": (len(tokenizer.encode(problem.prompt)), (*encode_answer(problem.solution, tokenizer), end))
        for index, problem in enumerate(problems)
    }


def _accuracy(run: Run) -> dict[str, Any]:
    right = int(run.correct_M.sum())
    return {"accuracy": run.accuracy, "interval": wilson_interval(right, len(run.answers))}


def identical(a: Run, b: Run) -> bool:
    """Same tokens with the same log-probabilities, bit for bit."""
    return all(x.tokens == y.tokens and x.logprobs == y.logprobs for x, y in zip(a.answers, b.answers, strict=True))
