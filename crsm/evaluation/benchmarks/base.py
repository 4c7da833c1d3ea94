"""What every kind of benchmark is: problems, answers by part and system, and measures of the answers.

Invariants:

* a benchmark is a function of its settings, the tokenizer and the seed: every process builds the same one, which its
  ``digest`` proves;
* the answers to a part are a function of the part, the system and the weights: who computes them, when, and beside
  what else, changes nothing;
* answers are plain data (JSON), and all figures are made from answers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint
from crsm.types import Reason

Record = dict[str, Any]
"""One answer of one system: ``index`` of the problem, and what the kind of benchmark keeps of it. ``bits`` is equal for
answers that are equal bit for bit, log-probabilities included."""


@dataclass(frozen=True, slots=True)
class PartResult:
    """The answers of one system to one part."""

    records: list[Record]
    plans: dict[str, int] = field(default_factory=dict)
    """Counts that add up: ``tokens``, ``requests``, ``hits``, ``settled``, ``injections``, ``simulations``."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of one system, as what it is made of: ``Σ top / Σ bottom`` over M problems (or windows)."""

    top_M: np.ndarray
    bottom_M: np.ndarray | None = None
    """None: ones; the figure is a mean."""
    unit: str = ""
    """Empty: a share of the problems."""

    @property
    def value(self) -> float:
        return float(self.top_M.mean() if self.bottom_M is None else self.top_M.sum() / self.bottom_M.sum())

    @property
    def is_binary(self) -> bool:
        return self.bottom_M is None and bool(np.isin(self.top_M, (0, 1)).all())


class Benchmark(Protocol):
    """Problems that every system answers."""

    name: str
    kind: str
    """``answers``, ``choices`` or ``text``."""
    digest: str
    """Of all problems, as the systems see them."""
    excluded: Mapping[str, str]
    """Systems that are not defined here, and why."""

    def __len__(self) -> int: ...

    def problems(self) -> Iterable[Record]:
        """The problems, for whoever reads the answers."""
        ...

    def answer(self, checkpoint: Checkpoint, system: str, first: int, count: int, seed: int) -> PartResult:
        """What a system (or control) says to the problems ``first`` to ``first + count``.

        Args:
            checkpoint: the model, with the settings of search, deliberation and sampling.
            system: ``system1``, ``system2`` or a control.
            first: number of the first problem.
            count: of problems; there may be fewer.
            seed: of sampling, search and the controls' randomness.
        """
        ...

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        """Figures by name; ``records`` are one system's, in order, and complete."""
        ...


def digest_of(records: Iterable[Any]) -> str:
    """Start of the sha256 of plain data."""
    text = hashlib.sha256()
    for record in records:
        text.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return text.hexdigest()[:16]


def bits_of(tokens: Sequence[int], logprobs: Sequence[float]) -> str:
    """A fingerprint of an answer, log-probabilities to the last bit."""
    packed = struct.pack(f"<{len(tokens)}q{len(logprobs)}d", *tokens, *logprobs)
    return hashlib.sha256(packed).hexdigest()[:16]


def count_plans(metrics: PlanMetrics) -> dict[str, int]:
    """What became of the plans of a run."""
    return {
        "tokens": metrics.tokens,
        "requests": metrics.requests,
        "hits": sum(count for reason, count in metrics.outcomes.items() if reason.is_hit),
        "settled": sum(metrics.outcomes.values()) - metrics.outcomes[Reason.ENDED],
        "injections": metrics.injections,
        "simulations": metrics.simulations,
    }
