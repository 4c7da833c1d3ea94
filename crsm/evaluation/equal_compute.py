"""Accuracy against compute: System 2 beside best-of-N, self-consistency and beam search with the same model.

Everything is counted after the prompt, which all of them run once. A sample costs the tokens that it consumes (the last
one said is not), best-of-N one look of the critics at each leaf; System 2 costs the tokens of one answer and its plan,
at the most that the search may have spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crsm.config import EngineConfig
from crsm.data.sequences import encode_prompt
from crsm.evaluation.compute import Costs, costs
from crsm.evaluation.sampled_answers import Sample, beam_search, best_of, majority, sample_answers
from crsm.evaluation.solving import solve
from crsm.evaluation.statistics import mcnemar, wilson_interval
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.tasks.base import Problem, Task

SAMPLES = (1, 2, 4, 8, 16)
SIMULATIONS = (8, 16, 32, 64)
METHODS = ("system_2", "best_of", "self_consistency", "beam_search")


@dataclass(frozen=True, slots=True)
class Spent:
    """What the methods did to some problems; M problems. Parts of many problems can be joined."""

    points: dict[tuple[str, int], tuple[list[bool], list[float]]]
    """By method and budget: verdicts (M), and multiply-adds (M)."""
    sample: list[float]
    """Multiply-adds of one sample, the mean of a problem's (M)."""
    prompt: list[int]
    """Tokens of the prompts (M)."""

    def __add__(self, other: Spent) -> Spent:
        points = {
            key: (right + other.points[key][0], spent + other.points[key][1])
            for key, (right, spent) in self.points.items()
        }
        return Spent(points, self.sample + other.sample, self.prompt + other.prompt)


def accuracy_against_compute(
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence[Problem],
    *,
    lag: int,
    seed: int,
    samples: Sequence[int] = SAMPLES,
    simulations: Sequence[int] = SIMULATIONS,
    on_progress: Callable[[str, float], None] = lambda name, accuracy: None,
) -> dict[str, Any]:
    """Curves of all methods on the same problems: :func:`spend`, then :func:`curves`."""
    spent = spend(
        checkpoint,
        task,
        problems,
        lag=lag,
        seed=seed,
        samples=samples,
        simulations=simulations,
        on_progress=on_progress,
    )
    return curves(checkpoint, task.name, lag, spent)


def spend(
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence[Problem],
    *,
    lag: int,
    seed: int,
    first: int = 0,
    max_tokens: int | None = None,
    samples: Sequence[int] = SAMPLES,
    simulations: Sequence[int] = SIMULATIONS,
    on_progress: Callable[[str, float], None] = lambda name, accuracy: None,
) -> Spent:
    """Answers problems by every method at every budget.

    Args:
        checkpoint: the model.
        task: judges the answers.
        problems: what to solve.
        lag: of System 2, which may make one plan per answer.
        seed: of the samples; the samples of a small N are the first ones of a large N.
        first: number of the first problem, if these are some of many.
        max_tokens: of an answer; None: the checkpoint's.
        samples: values of N, also the widths of the beam.
        simulations: budgets of System 2.
        on_progress: told every point's accuracy.
    """
    price = costs(checkpoint.model)
    tokenizer = checkpoint.tokenizer
    prompts = [tuple(encode_prompt(problem, tokenizer)) for problem in problems]
    limit = max_tokens or checkpoint.config.sampling.max_tokens
    points: dict[tuple[str, int], tuple[list[bool], list[float]]] = {}

    def right(answers: Sequence[Sample]) -> list[bool]:
        return [
            task.verify(problem, tokenizer.decode(answer.tokens))
            for problem, answer in zip(problems, answers, strict=True)
        ]

    def add(method: str, budget: int, correct: list[bool], multiply_adds: list[float]) -> None:
        points[method, budget] = (correct, multiply_adds)
        on_progress(f"{method}_{budget}", float(np.mean(correct)))

    drawn = sample_answers(checkpoint, prompts, count=max(samples), max_tokens=limit, seed=seed, first=first)
    said = [[_said(price, len(sample.tokens)) for sample in row] for row in drawn]
    for count in samples:
        spent = [float(sum(row[:count])) for row in said]
        judged = [total + count * price.critic for total in spent]
        add("best_of", count, right([best_of(row[:count]) for row in drawn]), judged)
        add("self_consistency", count, right([majority(row[:count], tokenizer.terminal_ids) for row in drawn]), spent)
    for width in samples:
        beams = beam_search(checkpoint, prompts, width=width, max_tokens=limit)
        consumed = [float(consumed * price.token) for _, consumed in beams]
        add("beam_search", width, right([answer for answer, _ in beams]), consumed)
    for budget in simulations:
        add("system_2", budget, *_system_2(checkpoint, task, problems, price, lag, budget, limit))
    return Spent(points, [float(np.mean(row)) for row in said], [len(prompt) for prompt in prompts])


def curves(checkpoint: Checkpoint, task: str, lag: int, spent: Spent) -> dict[str, Any]:
    """Figures of what was spent.

    Returns:
        ``methods``: per method, points with ``budget``, ``accuracy``, ``interval``, ``multiply_adds`` per answer, and
        ``samples``, the same in units of one sample; ``costs``; ``sample``, the multiply-adds of one sample;
        ``against_best_of``: :func:`paired_with_best_of`.
    """
    price = costs(checkpoint.model)
    one = float(np.mean(spent.sample))
    methods: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for (method, budget), (correct, multiply_adds) in spent.points.items():
        mean = float(np.mean(multiply_adds))
        methods[method].append(
            {
                "budget": budget,
                "accuracy": float(np.mean(correct)),
                "interval": wilson_interval(sum(correct), len(correct)),
                "multiply_adds": mean,
                "samples": mean / one,
            }
        )
    return {
        "task": task,
        "problems": len(spent.sample),
        "lag": lag,
        "sample": one,
        "prompt": float(np.mean(spent.prompt)) * price.backbone,
        "costs": asdict(price) | {"token": price.token, "simulation": price.simulation},
        "methods": methods,
        "against_best_of": paired_with_best_of(spent),
    }


def paired_with_best_of(spent: Spent) -> list[dict[str, Any]]:
    """System 2 at every budget beside the cheapest best-of-N that costs as much or more, on the same problems: the
    difference of their accuracies and McNemar's p. A budget that costs more than every best-of-N is left out."""
    cost = {key: float(np.mean(multiply_adds)) for key, (_, multiply_adds) in spent.points.items()}
    found = []
    for (method, budget), (correct, _) in spent.points.items():
        if method != "system_2":
            continue
        enough = [key for key in cost if key[0] == "best_of" and cost[key] >= cost[method, budget]]
        if not enough:
            continue
        other = min(enough, key=lambda key: cost[key])
        theirs = spent.points[other][0]
        found.append(
            {
                "simulations": budget,
                "best_of": other[1],
                "times_the_cost": cost[other] / cost[method, budget],
                "difference": float(np.mean(correct)) - float(np.mean(theirs)),
                "mcnemar_p": mcnemar(correct, theirs),
            }
        )
    return found


def _said(price: Costs, tokens: int) -> int:
    """Saying an answer: every token but the last is consumed."""
    return max(0, tokens - 1) * price.token


def _system_2(
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence[Problem],
    price: Costs,
    lag: int,
    simulations: int,
    max_tokens: int,
) -> tuple[list[bool], list[float]]:
    config = checkpoint.config
    search = config.search.model_copy(update={"simulations": simulations})
    deliberator = Deliberator.from_checkpoint(checkpoint, search=search)
    run = solve(
        checkpoint,
        task,
        problems,
        planners=InlinePlanners(deliberator, config.planners.max_batch),
        deliberation=config.deliberation.model_copy(update={"lag": lag, "max_plans": 1}),
        sampling=config.sampling.model_copy(update={"temperature": 0.0, "max_tokens": max_tokens}),
        simulations=simulations,
        engine=EngineConfig(clock="virtual", max_batch=config.engine.max_batch),
    )
    # A plan each, but for answers that had no time for one.
    plans = run.metrics.requests / len(problems)
    plan = plans * price.plan(simulations, lag, config.deliberation.plan_length)
    return [answer.correct for answer in run.answers], [
        _said(price, len(answer.tokens)) + plan for answer in run.answers
    ]
