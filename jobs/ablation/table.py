"""The tidy table: one row per trial, in the order of the plan; and the same pooled over the seeds, one row per point.

Pure but for the writing. Nothing in the table depends on the machine or on time, so that a sweep that was interrupted
has the same table, row for row, as one that was not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crsm.evaluation.statistics import wilson_interval
from jobs.ablation.space import Point
from jobs.ablation.trial import Tally
from jobs.storage import StoragePath

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """A finished trial."""

    trial: int
    """Its number in the plan."""
    point: Point
    seed: int
    tally: Tally
    finished: bool = True
    """False: ASHA ended it before it had seen all problems."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """All seeds of one point together."""

    point: Point
    tally: Tally

    @property
    def accuracy(self) -> float:
        return self.tally.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        return _interval(self.tally.correct)

    @property
    def multiply_adds(self) -> float:
        """Per answer."""
        return self.tally.multiply_adds / self.tally.problems


def pool(records: Sequence[Record]) -> list[Pooled]:
    """Points in the order of the plan. Problems of different seeds are different problems, so counts add up."""
    found: list[tuple[Point, Tally]] = []
    places: dict[str, int] = {}
    for record in sorted(records, key=lambda record: record.trial):
        key = repr(sorted(record.point.items()))
        if key not in places:
            places[key] = len(found)
            found.append((record.point, record.tally))
        else:
            point, tally = found[places[key]]
            found[places[key]] = (point, tally + record.tally)
    return [Pooled(point, tally) for point, tally in found]


def rows(records: Sequence[Record], controls: Sequence[str] = ()) -> list[Row]:
    """The table; every row has the same columns, None where there is nothing."""
    return [
        {"trial": record.trial, "seed": record.seed}
        | record.point
        | figures(record.tally, controls)
        | {"finished": record.finished}
        for record in sorted(records, key=lambda record: record.trial)
    ]


def pooled_rows(points: Sequence[Pooled], controls: Sequence[str] = ()) -> list[Row]:
    return [point.point | figures(point.tally, controls) for point in points]


def figures(tally: Tally, controls: Sequence[str] = ()) -> Row:
    """What a tally says, in columns."""
    problems, right = tally.problems, tally.correct.count("1")
    low, high = _interval(tally.correct)
    system1_low, system1_high = _interval(tally.system1_correct)
    gap, gap_low, gap_high = paired_difference(tally.correct, tally.system1_correct)
    row: Row = {
        "problems": problems,
        "right": right,
        "accuracy": right / problems,
        "accuracy_low": low,
        "accuracy_high": high,
        "system1_right": tally.system1_correct.count("1"),
        "system1_accuracy": tally.system1_correct.count("1") / problems,
        "system1_low": system1_low,
        "system1_high": system1_high,
        "difference": gap,
        "difference_low": gap_low,
        "difference_high": gap_high,
        "identical_to_system1": tally.identical,
        "plan_hit_rate": tally.hits / tally.settled if tally.settled else None,
        "requests_per_answer": tally.requests / problems,
        "injections_per_answer": tally.injections / problems,
        "simulations_per_answer": tally.simulations / problems,
        "tokens_per_answer": tally.tokens / problems,
        "multiply_adds_per_answer": tally.multiply_adds / problems,
        "system1_multiply_adds_per_answer": tally.system1_multiply_adds / problems,
    }
    for name in controls:
        known = tally.controls.get(name)
        row[f"control_{name}"] = None if known is None else known / problems
    return row


def paired_difference(correct_a: str, correct_b: str) -> tuple[float, float, float]:
    """``accuracy(a) − accuracy(b)`` on the same problems with its 95 % interval (normal, from the discordant pairs)."""
    assert len(correct_a) == len(correct_b), "not the same problems"
    count = len(correct_a)
    only_a = sum(a > b for a, b in zip(correct_a, correct_b, strict=True))
    only_b = sum(b > a for a, b in zip(correct_a, correct_b, strict=True))
    gap = (only_a - only_b) / count
    half = 1.96 * math.sqrt(max(0.0, only_a + only_b - (only_a - only_b) ** 2 / count)) / count
    return gap, gap - half, gap + half


def _interval(correct: str) -> tuple[float, float]:
    return wilson_interval(correct.count("1"), len(correct))


def write_table(table: Sequence[Mapping[str, Any]], folder: StoragePath | Path) -> list[StoragePath]:
    """``table.parquet`` and ``table.csv``, each replaced as a whole.

    Raises:
        OSError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    # A swept setting may have values of several kinds (a trust horizon of 3, or null, is fine; words beside numbers are
    # not): then the column is text.
    columns = {name: [row[name] for row in table] for name in table[0]}
    arrays = {name: _array(values) for name, values in columns.items()}
    tidy = pa.table(arrays)
    place = StoragePath.of(folder)
    paths = [place / "table.parquet", place / "table.csv"]
    for path, write in zip(paths, (pyarrow.parquet.write_table, pyarrow.csv.write_csv), strict=True):
        buffer = io.BytesIO()
        write(tidy, buffer)
        path.write_bytes(buffer.getvalue())
    return paths


def _array(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
