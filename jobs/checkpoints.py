"""What jobs that measure a checkpoint share: its settings with changes on top, its tasks, planners of every kind."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crsm.overrides import merge_settings as merge_settings

if TYPE_CHECKING:
    from crsm.config import Config
    from crsm.model import Checkpoint
    from crsm.planners import Planners
    from crsm.tasks.base import Task

CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", metavar="NAME", help="A checkpoint's folder, or the name of a shipped one.")
]


class PlannerKind(str, enum.Enum):
    """Where planners run."""

    INLINE = "inline"
    """In the engine's own thread: the synchronous reference."""
    THREADS = "threads"
    ACTORS = "actors"
    """Ray actors."""


def load_with_settings(
    name: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] | None = None,
    seed: int | None = None,
) -> Checkpoint:
    """A checkpoint whose settings are its own, those that ``config`` states, ``overrides`` and ``seed`` on top.

    Raises:
        ValueError: as :func:`crsm.model.load_checkpoint` and :func:`crsm.overrides.merge_settings`.
    """
    from crsm.model import load_checkpoint, use_settings
    from jobs.command import commit
    from jobs.runs import local_copy

    commit()  # of the code that starts; it may be another by the time the result is written
    checkpoint = load_checkpoint(local_copy(name) if "://" in str(name) else name)
    use_settings(checkpoint, merge_settings(checkpoint.config, config, overrides, seed))
    return checkpoint


def pick_task(config: Config, name: str) -> Task:
    """One of the tasks of the settings, by name.

    Raises:
        ValueError: no such task; those there are, are listed.
    """
    from crsm.tasks import build_task

    for task in config.tasks:
        if task.label == name:
            return build_task(task)
    raise ValueError(f"task = {name!r}; allowed: {', '.join(task.label for task in config.tasks)}")


@contextlib.contextmanager
def planner_factory(kind: PlannerKind, checkpoint: Checkpoint) -> Iterator[Callable[[], Planners]]:
    """Makes planners of one kind, each time new ones, by the checkpoint's settings; Ray runs meanwhile if it is needed.

    None of them sheds requests: they are for the virtual clock, which waits.
    """
    from crsm.planners import InlinePlanners, ThreadPlanners
    from crsm.reasoning import Deliberator

    settings = checkpoint.config.planners
    if kind is PlannerKind.INLINE:
        yield lambda: InlinePlanners(Deliberator.from_checkpoint(checkpoint), settings.max_batch)
        return
    if settings.count < 1:
        raise ValueError(f"planners.count = {settings.count}; allowed: at least 1 for planners as {kind.value}")
    if kind is PlannerKind.THREADS:
        yield lambda: ThreadPlanners(Deliberator.from_checkpoint(checkpoint), settings.count, settings.max_batch)
        return
    from crsm.evaluation.lent_planners import LentPlanners

    with planner_actors(checkpoint) as pool:
        yield lambda: LentPlanners(pool)


@contextlib.contextmanager
def planner_actors(checkpoint: Checkpoint, shed: bool = False) -> Iterator[Planners]:
    """A pool of planner actors that are ready, and Ray, for the time of a ``with`` block.

    Raises:
        OSError: no actor could be started; the reason is named.
    """
    from actors.cluster import start_ray
    from actors.metrics import Counts, GeneratorCounts, exported
    from actors.pool import PlannerPool

    with start_ray():
        pool = PlannerPool(checkpoint, checkpoint.config.planners, shed=shed)
        counts = GeneratorCounts(Counts("planners"))
        try:
            if not pool.wait_until_ready():
                raise OSError(f"no planner actor could be started: {pool.stats().last_error or 'no reason was given'}")
            with exported(lambda: counts.look({"pool": dataclasses.asdict(pool.stats())})):
                yield pool
        finally:
            pool.close()


def limit_threads(threads: int = 1) -> int:
    """Threads of this process. One by default, so that figures are the same bits on every machine."""
    from crsm.threads import use_threads

    use_threads(threads)
    return threads


def print_table(title: str, columns: list[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on standard error; the first column is text, the others are figures."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, "bold"), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A file has no width: nothing is to be cut there.
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 200).print(table)
