"""Accuracy against compute: System 2 beside best-of-N, self-consistency and beam search with the same model.

Everything is counted after the prompt, which all of them run once. A sample costs the tokens that it consumes (the last
one said is not), best-of-N one look of the critics at each leaf; System 2 costs the tokens of one answer and its plan,
at the most that the search may have spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from crsm.config import EngineConfig
from crsm.data.sequences import encode_prompt
from crsm.evaluation.compute import Costs, costs
from crsm.evaluation.sampled_answers import Sample, beam_search, best_of, majority, sample_answers
from crsm.evaluation.solving import solve
from crsm.evaluation.statistics import wilson_interval
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.tasks.base import Problem, Task

SAMPLES = (1, 2, 4, 8, 16)
SIMULATIONS = (8, 16, 32, 64)


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
    """Curves of all methods on the same problems.

    Args:
        checkpoint: the model.
        task: judges the answers.
        problems: what to solve.
        lag: of System 2, which may make one plan per answer.
        seed: of the samples; the samples of a small N are the first ones of a large N.
        samples: values of N, also the widths of the beam.
        simulations: budgets of System 2.
        on_progress: told every point's accuracy.

    Returns:
        ``methods``: per method, points with ``budget``, ``accuracy``, ``interval``, ``multiply_adds`` per answer, and
        ``samples``, the same in units of one sample; ``costs``; ``sample``, the multiply-adds of one sample.
    """
    price = costs(checkpoint.model)
    tokenizer = checkpoint.tokenizer
    prompts = [tuple(encode_prompt(problem, tokenizer)) for problem in problems]
    limit = checkpoint.config.sampling.max_tokens

    def right(answers: Sequence[Sample]) -> np.ndarray:
        return np.array(
            [
                task.verify(problem, tokenizer.decode(answer.tokens))
                for problem, answer in zip(problems, answers, strict=True)
            ]
        )

    drawn = sample_answers(checkpoint, prompts, count=max(samples), max_tokens=limit, seed=seed)
    one = float(np.mean([_said(price, len(sample.tokens)) for row in drawn for sample in row]))
    points: dict[str, list[dict[str, Any]]] = {}

    def add(method: str, budget: int, right_M: np.ndarray, multiply_adds: float) -> None:
        accuracy = float(right_M.mean())
        point = {
            "budget": budget,
            "accuracy": accuracy,
            "interval": wilson_interval(int(right_M.sum()), len(right_M)),
            "multiply_adds": multiply_adds,
            "samples": multiply_adds / one,
        }
        points.setdefault(method, []).append(point)
        on_progress(f"{method}_{budget}", accuracy)

    for count in samples:
        spent = float(np.mean([sum(_said(price, len(sample.tokens)) for sample in row[:count]) for row in drawn]))
        add("best_of", count, right([best_of(row[:count]) for row in drawn]), spent + count * price.critic)
        chosen = [majority(row[:count], tokenizer.terminal_ids) for row in drawn]
        add("self_consistency", count, right(chosen), spent)
    for width in samples:
        beams = beam_search(checkpoint, prompts, width=width, max_tokens=limit)
        consumed = float(np.mean([consumed for _, consumed in beams]))
        add("beam_search", width, right([answer for answer, _ in beams]), consumed * price.token)
    for budget in simulations:
        right_M, spent = _system_2(checkpoint, task, problems, price, lag, budget)
        add("system_2", budget, right_M, spent)
    order = ("system_2", "best_of", "self_consistency", "beam_search")
    return {
        "task": task.name,
        "problems": len(problems),
        "lag": lag,
        "sample": one,
        "prompt": float(np.mean([len(prompt) for prompt in prompts])) * price.backbone,
        "costs": asdict(price) | {"token": price.token, "simulation": price.simulation},
        "methods": {method: points[method] for method in order},
    }


def _said(price: Costs, tokens: int) -> int:
    """Saying an answer: every token but the last is consumed."""
    return max(0, tokens - 1) * price.token


def _system_2(
    checkpoint: Checkpoint, task: Task, problems: Sequence[Problem], price: Costs, lag: int, simulations: int
) -> tuple[np.ndarray, float]:
    config = checkpoint.config
    search = config.search.model_copy(update={"simulations": simulations})
    deliberator = Deliberator.from_checkpoint(checkpoint, search=search)
    run = solve(
        checkpoint,
        task,
        problems,
        planners=InlinePlanners(deliberator, config.planners.max_batch),
        deliberation=config.deliberation.model_copy(update={"lag": lag, "max_plans": 1}),
        sampling=config.sampling.model_copy(update={"temperature": 0.0}),
        simulations=simulations,
        engine=EngineConfig(clock="virtual", max_batch=config.engine.max_batch),
    )
    plans = run.metrics.requests / len(problems)
    said = float(np.mean([_said(price, len(answer.tokens)) for answer in run.answers]))
    plan = price.plan(simulations, lag, config.deliberation.plan_length)
    return run.correct_M, said + plans * plan
