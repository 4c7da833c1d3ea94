"""The rows of a result: a figure, the same of a peer, their ratio, and the share of what the machine can do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.speed.timing import median


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table and of ``results.rows``."""

    name: str
    unit: str
    threads: int
    ours: float | None = None
    """Median of our samples; None: not there (``note`` says why)."""
    peer_name: str | None = None
    peer: float | None = None
    """Median of the peer's samples in the same run."""
    ratio: float | None = None
    """Ours over the peer's, above 1 where ours is better, whatever the unit; None without a peer."""
    limit: float | None = None
    """What the machine allows, in the same unit."""
    share_of_limit: float | None = None
    limit_by: str | None = None
    """What sets the limit, in words."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    note: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    """More figures of this row, by name."""


def make_row(
    name: str,
    unit: str,
    threads: int,
    ours: Sequence[float],
    *,
    peer_name: str | None = None,
    peer: Sequence[float] = (),
    limit: float | None = None,
    limit_by: str | None = None,
    higher_is_better: bool = True,
    note: str | None = None,
    **figures: Any,
) -> Row:
    """A row from samples that are already in ``unit``; medians, ratio and share of the limit follow from them.

    Args:
        ours: our samples; empty: not measured.
        peer: the peer's samples; empty: there is no such peer here, which ``note`` explains.
        limit: what the machine allows, in ``unit``; what sets it is said in ``limit_by``.
        higher_is_better: False for times.
    """
    mine, theirs = median(ours), median(peer)
    ratio = share = None
    if mine is not None and theirs is not None:
        ratio = mine / theirs if higher_is_better else theirs / mine
    if mine is not None and limit is not None:
        share = mine / limit if higher_is_better else limit / mine
    samples = {key: list(values) for key, values in (("ours", ours), ("peer", peer)) if values}
    return Row(
        name=name,
        unit=unit,
        threads=threads,
        ours=mine,
        peer_name=peer_name,
        peer=theirs,
        ratio=ratio,
        limit=limit,
        share_of_limit=share,
        limit_by=limit_by,
        samples=samples,
        note=note,
        figures=figures,
    )


def plain(row: Row) -> dict[str, Any]:
    """A row as it stands in the result: figures beside the others, and no ratio or limit where there is none."""
    optional = ("ratio", "limit", "share_of_limit", "limit_by", "note", "peer_name")
    values = {name: getattr(row, name) for name in Row.__dataclass_fields__ if name != "figures"}
    return {key: value for key, value in values.items() if value is not None or key not in optional} | row.figures


def print_rows(title: str, rows: Iterable[Row]) -> None:
    """A table on standard error, with the limit in a line of its own under each row that has one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, "bold"), title_justify="left")
    for column in ("", "ours", "peer", "", "ours / peer"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
        cells = (f"{row.name}, {row.unit}", figure(row.ours), figure(row.peer), row.peer_name or "", ratio)
        table.add_row(*(Text(cell) for cell in cells))
        if row.limit is not None and row.share_of_limit is not None:
            line = f"  {row.share_of_limit:.0%} of {figure(row.limit)}, the limit by {row.limit_by}"
            table.add_row(Text(line, "dim"))
        if row.note:
            table.add_row(Text(f"  {row.note}", "dim"))
    # A file has no width: nothing is to be cut there.
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(table)


def figure(value: float | None) -> str:
    """Three significant digits or more; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
