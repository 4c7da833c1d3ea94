"""Solving problems with System 1 or System 2, and judging the answers by the task's verifier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.data.sequences import encode_prompt
from crsm.engine import Engine, InjectionSource
from crsm.generation import GenerationRequest
from crsm.latent_dynamics import WorldModel
from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint
from crsm.planners import Planners
from crsm.tasks.base import Problem, Task

OFFLINE_CHUNK = 8192
"""Tokens of prompts per step."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and its verdict."""

    problem: Problem
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Run:
    """All answers of one system to a list of problems."""

    answers: tuple[Answer, ...]
    metrics: PlanMetrics
    seconds: float

    @property
    def correct_M(self) -> np.ndarray:
        return np.array([answer.correct for answer in self.answers])

    @property
    def accuracy(self) -> float:
        return float(self.correct_M.mean())

    @property
    def tokens_per_second(self) -> float:
        return self.metrics.tokens / self.seconds


def solve(
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence[Problem],
    *,
    planners: Planners | None = None,
    deliberation: DeliberationConfig | None = None,
    sampling: SamplingConfig | None = None,
    simulations: int | None = None,
    engine: EngineConfig | None = None,
    world_model: WorldModel | None = None,
    injection_source: InjectionSource | None = None,
) -> Run:
    """Answers every problem; generation ``i`` is called ``problem-i`` and sampled with seed ``sampling.seed + i``.

    Args:
        checkpoint: the model.
        task: judges the answers.
        problems: what to solve.
        planners: System 2; None: System 1 alone. Not closed here.
        deliberation: None: the checkpoint's.
        sampling: None: the checkpoint's.
        simulations: budget per plan; None: the checkpoint's.
        engine: None: the checkpoint's.
        world_model: what the planners use, if not the checkpoint's.
        injection_source: injections that do not come from planners.
    """
    config = checkpoint.config
    deliberation = deliberation or config.deliberation
    sampling = sampling or config.sampling
    loop = Engine(
        checkpoint,
        planners,
        # Nobody waits for a token here: prompts go in whole batches at a time.
        (engine or config.engine).model_copy(update={"prefill_chunk": OFFLINE_CHUNK}),
        world_model=world_model,
        injection_source=injection_source,
    )
    prompts = [tuple(encode_prompt(problem, checkpoint.tokenizer)) for problem in problems]
    said: dict[str, tuple[list[int], list[float]]] = {}
    started = time.perf_counter()
    requests = [
        GenerationRequest(
            prompt,
            sampling.model_copy(update={"seed": sampling.seed + index}),
            deliberation,
            simulations or config.search.simulations,
            generation_id=f"problem-{index}",
        )
        for index, prompt in enumerate(prompts)
    ]
    for token in loop.generate(requests):
        tokens, logprobs = said.setdefault(token.generation_id, ([], []))
        tokens.append(token.token)
        logprobs.append(token.logprob)
    seconds = time.perf_counter() - started
    answers = []
    for problem, prompt, (tokens, logprobs) in zip(
        problems, prompts, (said[request.generation_id] for request in requests), strict=True
    ):
        text = checkpoint.tokenizer.decode(tokens)
        answers.append(Answer(problem, prompt, tuple(tokens), tuple(logprobs), text, task.verify(problem, text)))
    return Run(tuple(answers), loop.metrics, seconds)
