"""Benchmarks whose answers are said and judged by the task's verifier: GSM8K, ARC-AGI, ProsQA and all built-in tasks.

Answers are text and stay text: verifiers read them and run nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from crsm.config import SamplingConfig
from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.benchmarks.base import Measure, PartResult, Record, bits_of, count_plans, digest_of
from crsm.evaluation.benchmarks.settings import BenchmarkConfig
from crsm.evaluation.comparison import run_system
from crsm.evaluation.equal_compute import METHODS, Spent, spend
from crsm.evaluation.statistics import pass_at_k
from crsm.model import Checkpoint
from crsm.tasks import Task
from crsm.tasks.base import Problem

COMPUTE = "compute"
"""The system that stands for all methods of equal compute."""
_SAMPLE_STRIDE = 1_000_003
"""Distance between the seeds of two samples of a problem."""


class Answers:
    """The problems of a task, each behind the same solved examples.

    Raises:
        ValueError: the vocabulary cannot write a problem.
    """

    kind = "answers"
    excluded: Mapping[str, str] = {}

    def __init__(
        self,
        settings: BenchmarkConfig,
        task: Task,
        problems: Sequence[Problem],
        examples: Sequence[Problem],
        tokenizer: Tokenizer,
    ) -> None:
        self.name, self._settings, self._task = settings.name, settings, task
        before = "".join(f"{example.prompt}{spaced(example.solution)}\n\n" for example in examples)
        self._problems = [replace(problem, prompt=before + problem.prompt) for problem in problems]
        for problem in self._problems:
            tokenizer.encode(problem.prompt)
        self.digest = digest_of(self.problems())

    def __len__(self) -> int:
        return len(self._problems)

    def problems(self) -> Iterable[Record]:
        for index, problem in enumerate(self._problems):
            yield {"index": index, "key": problem.key, "prompt": problem.prompt, "solution": problem.solution}

    def answer(self, checkpoint: Checkpoint, system: str, first: int, count: int, seed: int) -> PartResult:
        part, settings = self._problems[first : first + count], self._settings
        if system == COMPUTE:
            return self._spend(checkpoint, part, first, seed)
        config = checkpoint.config
        sampling = config.sampling.model_copy(update={"max_tokens": self._max_tokens(config.sampling)})
        if settings.samples > 1:
            sampling = sampling.model_copy(update={"temperature": settings.temperature})
        records: list[Record] = []
        plans: dict[str, int] = {}
        seconds = 0.0
        for sample in range(settings.samples):
            run = run_system(
                system,
                checkpoint,
                self._task,
                part,
                deliberation=config.deliberation,
                search=config.search,
                sampling=sampling.model_copy(update={"seed": seed + first + sample * _SAMPLE_STRIDE}),
                seed=seed + first,
            )
            for index, answer in enumerate(run.answers, start=first):
                records.append(
                    {
                        "index": index,
                        "sample": sample,
                        "correct": answer.correct,
                        "tokens": len(answer.tokens),
                        "text": answer.text,
                        "bits": bits_of(answer.tokens, answer.logprobs),
                    }
                )
            for name, value in count_plans(run.metrics).items():
                plans[name] = plans.get(name, 0) + value
            seconds += run.seconds
        return PartResult(sorted(records, key=lambda record: (record["index"], record["sample"])), plans, seconds)

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        """``accuracy`` of one answer each, or ``pass@k`` of several."""
        samples = self._settings.samples
        right_M = np.array([record["correct"] for record in records]).reshape(-1, samples).sum(axis=1)
        if samples == 1:
            return {"accuracy": Measure(right_M.astype(float))}
        return {
            f"pass@{k}": Measure(np.array([pass_at_k(samples, int(right), k) for right in right_M]))
            for k in self._settings.pass_at
        }

    # ---------------------------------------------------------------- equal compute

    def _spend(self, checkpoint: Checkpoint, part: Sequence[Problem], first: int, seed: int) -> PartResult:
        """Every method at every budget: a record per problem, with verdicts and multiply-adds by method and budget."""
        spent = spend(
            checkpoint,
            self._task,
            part,
            lag=checkpoint.config.deliberation.lag,
            seed=seed,
            first=first,
            max_tokens=self._max_tokens(checkpoint.config.sampling),
        )
        records: list[Record] = [
            {
                "index": first + place,
                "sample": spent.sample[place],
                "prompt": spent.prompt[place],
                "points": {
                    f"{method} {budget}": [right[place], multiply_adds[place]]
                    for (method, budget), (right, multiply_adds) in spent.points.items()
                },
            }
            for place in range(len(part))
        ]
        return PartResult(records)

    def _max_tokens(self, sampling: SamplingConfig) -> int:
        return self._settings.max_tokens or sampling.max_tokens


def spent_of(records: Sequence[Record]) -> Spent:
    """What the records of ``compute`` say, joined."""
    points: dict[tuple[str, int], tuple[list[bool], list[float]]] = {}
    for record in records:
        for name, (right, multiply_adds) in record["points"].items():
            method, _, budget = name.rpartition(" ")
            assert method in METHODS
            rights, spent = points.setdefault((method, int(budget)), ([], []))
            rights.append(right)
            spent.append(multiply_adds)
    return Spent(points, [record["sample"] for record in records], [record["prompt"] for record in records])


def spaced(answer: str) -> str:
    """An answer as it follows a prompt."""
    return answer if answer[:1].isspace() else f" {answer}"
