"""Whose rows a batch holds: weights of tasks and of sources of text, and how they change in the course of a stage.

A pure function of the step. Shares are exact in the long run and within one row in every step: row ``r`` of ``R`` goes
to the member whose stretch of [0, 1) holds ``(r + φ) / R``, with another offset ``φ`` in every step, evenly spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crsm.training_config import BackboneStageConfig, CurriculumPoint

_GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are as evenly spread as those of any number."""
_BLOCK = 1 << 16
"""Steps that are counted at a time."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Rows of every member in every step (letters: S steps, M members)."""

    names: tuple[str, ...]
    """Tasks first, then sources of text."""
    before_SM: np.ndarray
    """Rows that a member had before a step. (S + 1, M) int64"""

    def counts(self, step: int) -> dict[str, int]:
        """Rows of each member in a step.

        Raises:
            ValueError: there is no such step.
        """
        self._check(step)
        return dict(zip(self.names, (self.before_SM[step + 1] - self.before_SM[step]).tolist(), strict=True))

    def firsts(self, step: int) -> dict[str, int]:
        """Rows of each member in all steps before."""
        self._check(step)
        return dict(zip(self.names, self.before_SM[step].tolist(), strict=True))

    def _check(self, step: int) -> None:
        if not 0 <= step < len(self.before_SM) - 1:
            raise ValueError(f"step = {step}; allowed: 0 to {len(self.before_SM) - 2}")


def build_mixture(
    settings: BackboneStageConfig, tasks: Mapping[str, float], sources: Mapping[str, float], *, rows: int, steps: int
) -> Mixture:
    """The mixture of a stage.

    Args:
        settings: share of text, weights, and curriculum.
        tasks: weight of each task.
        sources: tokens of each source of text.
        rows: of a step.
        steps: of the whole stage.

    Raises:
        ValueError: a name that nothing has, or a point of the curriculum that leaves nobody a weight.
    """
    if both := tasks.keys() & sources.keys():
        raise ValueError(f"{sorted(both)[0]!r} is a task and a source of text; allowed: different names")
    given = {} if settings.text is None else settings.text.weights
    _check_names(given, sources, "stage_1.text.weights")
    base = dict(tasks) | {name: float(given.get(name, 0.0 if given else tokens)) for name, tokens in sources.items()}
    share = 0.0 if settings.text is None else settings.text.share
    points = settings.curriculum or (CurriculumPoint(at=0.0),)
    rows_of = []
    for number, point in enumerate(points):
        where = f"stage_1.curriculum[{number}]" if settings.curriculum else "stage_1.text"
        _check_names(point.weights, base, f"{where}.weights")
        weights = base | dict(point.weights)
        rows_of.append(_shares(weights, tasks, share if point.share is None else point.share, where))
    before_SM = np.zeros((steps + 1, len(base)), np.int64)
    at, shares_PM = np.array([point.at for point in points]), np.array(rows_of)
    for start in range(0, steps, _BLOCK):
        step_S = np.arange(start, min(start + _BLOCK, steps))
        shares_SM = np.stack([np.interp(step_S / steps, at, column) for column in shares_PM.T], axis=1)
        ends_SM = np.cumsum(shares_SM, axis=1) / shares_SM.sum(axis=1, keepdims=True)
        ends_SM[:, -1] = 1.0
        offset_S1 = ((0.5 + step_S * _GOLDEN) % 1.0)[:, None]
        places_SM = np.ceil(ends_SM * rows - offset_S1).astype(np.int64)
        counts_SM = np.diff(places_SM, axis=1, prepend=0)
        before_SM[start + 1 : start + 1 + len(step_S)] = before_SM[start] + np.cumsum(counts_SM, axis=0)
    return Mixture(tuple(base), before_SM)


def _shares(weights: Mapping[str, float], tasks: Mapping[str, float], share: float, where: str) -> list[float]:
    """Of every member: tasks have ``1 - share`` between them, sources of text the rest."""
    totals = {True: 0.0, False: 0.0}
    for name, weight in weights.items():
        totals[name in tasks] += weight
    parts = {True: 1.0 - share, False: share}
    for is_task, what in ((True, "task"), (False, "source of text")):
        if parts[is_task] > 0 and totals[is_task] <= 0:
            raise ValueError(
                f"{where}: no {what} has a weight, and their share is {parts[is_task]:g}; allowed: a weight"
            )
    return [
        parts[name in tasks] * weight / totals[name in tasks] if totals[name in tasks] else 0.0
        for name, weight in weights.items()
    ]


def _check_names(given: Mapping[str, float], known: Mapping[str, float] | Sequence[str], where: str) -> None:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{where}: {unknown[0]!r} is not known; allowed: {', '.join(known) or '(none)'}")
