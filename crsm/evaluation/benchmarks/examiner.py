"""Answers parts of benchmarks, whichever process it is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crsm.evaluation.benchmarks.base import Benchmark, PartResult
from crsm.evaluation.benchmarks.registry import build_benchmark
from crsm.evaluation.benchmarks.settings import BenchmarkConfig
from crsm.model import Checkpoint


@dataclass(frozen=True, slots=True)
class Part:
    """What is answered at once: some problems, by one system."""

    benchmark: str
    system: str
    first: int
    count: int
    """There may be fewer."""


class Examiner:
    """A checkpoint and the benchmarks it is asked, each built when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, benchmarks: Mapping[str, BenchmarkConfig], seed: int) -> None:
        """
        Args:
            checkpoint: with the settings of the run.
            benchmarks: by name, their tasks' settings in them.
            seed: of the problems, and of all answers.
        """
        self.checkpoint = checkpoint
        self._settings, self._seed = dict(benchmarks), seed
        self._built: dict[str, Benchmark] = {}

    def benchmark(self, name: str) -> Benchmark:
        """A benchmark with its problems.

        Raises:
            ValueError: as :func:`crsm.evaluation.benchmarks.registry.build_benchmark`.
        """
        if name not in self._built:
            self._built[name] = build_benchmark(self._settings[name], self.checkpoint.tokenizer, self._seed)
        return self._built[name]

    def answer(self, part: Part, digest: str) -> PartResult:
        """A part's answers.

        Raises:
            ValueError: this process finds other problems than the one that asks, whose ``digest`` this is.
        """
        benchmark = self.benchmark(part.benchmark)
        if benchmark.digest != digest:
            raise ValueError(
                f"benchmark {part.benchmark!r} has other problems here ({benchmark.digest}) than where it was started "
                f"({digest}); allowed: the same files on every node"
            )
        return benchmark.answer(self.checkpoint, part.system, part.first, part.count, self._seed)
