"""Where the time goes, with the native core and without it: training by operator, and a deliberation as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from crsm.kernels import cpu_kernels, reference, select_kernels
from crsm.kernels.module import KernelModule
from crsm.reasoning import Deliberator
from jobs.speed.search_speed import random_roots, requests_of
from jobs.speed.shapes import NANO, TINY, build
from jobs.speed.timing import median
from jobs.speed.train_speed import Case, our_loss, random_tokens, trainable, training_step

if TYPE_CHECKING:
    from crsm.model import Checkpoint
    from jobs.command import Progress

REPEATS = 7
SHOWN = 8
"""Operators of a profile, the most expensive first."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One piece of work, by one implementation."""

    work: str
    by: str
    milliseconds: float
    """Median of a run."""
    shares: dict[str, float]
    """Share of the time by operator, its callees not counted; empty: not looked into."""


def profiles(checkpoint: Checkpoint, *, seed: int, progress: Progress, quick: bool = False) -> list[Profile]:
    """All of ``benchmark_speed profile``."""
    case = Case(TINY, 2, 12, peer=False) if quick else Case(NANO, 64, 64, peer=False)
    found = []
    names = dict.fromkeys((reference.NAME, cpu_kernels().NAME))
    for name in names:
        model = build(case.shape, seed, planners=False)
        for module in model.modules():
            if isinstance(module, KernelModule):
                module.kernels = select_kernels(name)
        tokens_BT = random_tokens(case, seed)
        step = training_step(trainable(model), partial(our_loss, model, tokens_BT))
        work = f"training step, {case.shape.name}, {case.batch} × {case.length}"
        found.append(Profile(work, name, _milliseconds(step), _shares(step)))
        progress.update(len(found))
    simulations = 4 if quick else 64
    for engine in ("python", "native") if len(names) > 1 else ("python",):
        deliberator = Deliberator.from_checkpoint(checkpoint, engine=engine)
        requests = requests_of(*random_roots(checkpoint.model, 1, seed), simulations)
        work = f"deliberation of {simulations} simulations, one request"
        found.append(Profile(work, engine, _milliseconds(partial(deliberator, requests)), {}))
        progress.update(len(found))
    return found


def _milliseconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    middle = median(seconds[2:])
    assert middle is not None
    return 1e3 * middle


def _shares(work: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            work()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events[:SHOWN]}


def plain(found: list[Profile]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def print_profiles(found: list[Profile], threads: int) -> None:
    """A table on standard error."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"where the time goes, {threads} thread{'s' if threads > 1 else ''}", "bold"), title_justify="left"
    )
    for column in ("", "by", "ms", "share by operator"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for one in found:
        shares = ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in one.shares.items())
        table.add_row(one.work, one.by, f"{one.milliseconds:.3g}", shares)
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(table)
