"""Actors that answer parts of benchmarks, each with a checkpoint of its own.

What a part's answers are depends on neither the actor nor how many there are (:mod:`crsm.evaluation.benchmarks.base`);
a part that an actor died over is given to another (:func:`actors.rollouts.fleet_results`).
"""

from __future__ import annotations

from collections.abc import Mapping

from actors.weights import Weights, open_source
from crsm.config import Config
from crsm.evaluation.benchmarks.base import PartResult
from crsm.evaluation.benchmarks.examiner import Examiner, Part
from crsm.evaluation.benchmarks.settings import BenchmarkConfig
from crsm.model import use_settings
from crsm.threads import use_threads


class ExaminerActor:
    """An :class:`Examiner` in a process of its own, on one thread."""

    def __init__(
        self, source: str | Weights, settings: Config, benchmarks: Mapping[str, BenchmarkConfig], seed: int
    ) -> None:
        use_threads(1)
        checkpoint = open_source(source)
        use_settings(checkpoint, settings)
        self._examiner = Examiner(checkpoint, benchmarks, seed)

    def answer(self, part: Part, digest: str) -> PartResult:
        return self._examiner.answer(part, digest)
