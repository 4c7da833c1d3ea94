"""Roll-outs: answers of System 1 and of System 2 with their verified outcome, as plain data for stage 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crsm.data.sequences import Sequence as TokenSequence
from crsm.evaluation.solving import Answer, solve
from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.tasks.base import Problem, Task
from crsm.types import Channel


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer with its outcome, as plain data."""

    task: str
    system: int
    """1 or 2; a record, not a label."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Tokens said, the terminal one included if there was one."""
    correct: bool

    @classmethod
    def from_answer(cls, answer: Answer, system: int) -> Rollout:
        return cls(answer.problem.task, system, answer.prompt, answer.tokens, answer.correct)

    def sequence(self, terminal: Sequence[int]) -> TokenSequence:
        """The roll-out for training; the verdict that the model itself said is not judged."""
        ended = bool(self.answer) and self.answer[-1] in terminal
        start = len(self.prompt)
        end = start + len(self.answer) - ended
        tokens = np.array((*self.prompt, *self.answer), dtype=np.int64)
        return TokenSequence(tokens, start, end, self.correct)


def roll_out(
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence[Problem],
    *,
    system: Literal[1, 2],
    temperature: float,
    seed: int,
    hear: Callable[[PlanMetrics], None] = lambda metrics: None,
) -> list[Rollout]:
    """Answers problems with one of the systems.

    System 2 goes through the policy channel with every gate forced open: stage 3 comes before there is a writer or a
    calibration, and roll-outs shall hold what the search prefers, right or wrong.

    Args:
        checkpoint: with a trained world model, for System 2.
        task: judges the answers.
        problems: what to solve.
        system: 1 or 2.
        temperature: of the sampling.
        seed: of the sampling.
        hear: told what became of the plans.
    """
    planners = None
    deliberation = checkpoint.config.deliberation
    if system == 2:
        deliberation = deliberation.model_copy(update={"channel": Channel.POLICY})
        deliberator = Deliberator.from_checkpoint(checkpoint, forced_confidence=1.0)
        planners = InlinePlanners(deliberator, checkpoint.config.planners.max_batch)
    run = solve(
        checkpoint,
        task,
        problems,
        planners=planners,
        deliberation=deliberation,
        sampling=checkpoint.config.sampling.model_copy(update={"temperature": temperature, "seed": seed}),
        engine=checkpoint.config.engine.model_copy(update={"clock": "virtual"}),
    )
    hear(run.metrics)
    return [Rollout.from_answer(answer, system) for answer in run.answers]
