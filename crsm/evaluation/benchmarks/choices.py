"""Multiple choice by log-likelihood, as lm-eval measures it: ARC.

Every option is scored as a continuation of the question. ``acc`` takes the likeliest; ``acc_norm`` divides an option's
log-likelihood by its characters first; of equals the first counts. Under System 2 the log-likelihood is that of
:mod:`crsm.evaluation.scoring`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.benchmarks.base import Measure, PartResult, Record, bits_of, count_plans, digest_of
from crsm.evaluation.benchmarks.settings import BenchmarkConfig
from crsm.evaluation.comparison import system_planners
from crsm.evaluation.scoring import encode_continuation, score
from crsm.model import Checkpoint
from crsm.tasks.arc import MultipleChoice
from crsm.tasks.base import Problem


class Choices:
    """Questions with their options.

    Raises:
        ValueError: the vocabulary cannot write a question or an option.
    """

    kind = "choices"
    excluded: Mapping[str, str] = {
        "silent_tokens": "a plan's token that is said for certain leaves every other option a probability of 0"
    }

    def __init__(
        self,
        settings: BenchmarkConfig,
        task: MultipleChoice,
        problems: Sequence[Problem],
        examples: Sequence[Problem],
        tokenizer: Tokenizer,
    ) -> None:
        self.name = settings.name
        before = "".join(f"{example.prompt}{example.solution}\n\n" for example in examples)
        self._problems = list(problems)
        self._options, self._right = zip(*map(task.choices, problems), strict=True)
        self._continuations = [
            [encode_continuation(tokenizer, before + problem.prompt, f" {option}") for option in options]
            for problem, options in zip(problems, self._options, strict=True)
        ]
        self._prompts = [before + problem.prompt for problem in problems]
        self.digest = digest_of(self.problems())

    def __len__(self) -> int:
        return len(self._problems)

    def problems(self) -> Iterable[Record]:
        for index, (problem, prompt) in enumerate(zip(self._problems, self._prompts, strict=True)):
            options, right = list(self._options[index]), self._right[index]
            yield {"index": index, "key": problem.key, "prompt": prompt, "choices": options, "answer": right}

    def answer(self, checkpoint: Checkpoint, system: str, first: int, count: int, seed: int) -> PartResult:
        part = range(first, min(first + count, len(self)))
        named = {
            f"problem-{index}/choice-{place}": continuation
            for index in part
            for place, continuation in enumerate(self._continuations[index])
        }
        right = {index: self._continuations[index][self._right[index]] for index in part}
        config = checkpoint.config
        planners, deliberation = system_planners(
            system,
            checkpoint,
            deliberation=config.deliberation,
            search=config.search,
            seed=seed + first,
            solutions=lambda: {
                f"problem-{index}/choice-{place}": (len(continuation.context), continuation.tokens)
                for index, continuation in right.items()
                for place in range(len(self._options[index]))
            },
        )
        started = time.perf_counter()
        try:
            scores = score(
                checkpoint,
                list(named.values()),
                planners=planners,
                deliberation=deliberation,
                simulations=config.search.simulations,
                seed=seed + first,
                names=list(named),
            )
        finally:
            if planners is not None:
                planners.close()
        rows = iter(scores.logprobs)
        records = [self._record(index, [next(rows) for _ in self._options[index]]) for index in part]
        return PartResult(records, count_plans(scores.metrics), time.perf_counter() - started)

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        """``acc`` and ``acc_norm``."""
        return {name: Measure(np.array([float(record[name]) for record in records])) for name in ("acc", "acc_norm")}

    def _record(self, index: int, rows: Sequence[Sequence[float]]) -> Record:
        totals = [sum(row) for row in rows]
        lengths = [len(option) for option in self._options[index]]
        chosen = int(np.argmax(totals))
        chosen_norm = int(np.argmax(np.array(totals) / lengths))
        right = self._right[index]
        return {
            "index": index,
            "logprobs": totals,
            "chosen": chosen,
            "chosen_norm": chosen_norm,
            "acc": chosen == right,
            "acc_norm": chosen_norm == right,
            "tokens": sum(map(len, rows)),
            "bits": bits_of((), [logprob for row in rows for logprob in row]),
        }
