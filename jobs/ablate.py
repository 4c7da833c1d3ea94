"""Sweeps over the settings of System 2 on Ray Tune: lag × injection rate, and whatever else a file names.

The output folder holds ``table.parquet`` and ``table.csv``, ``report.md`` with its pictures, and what ``--resume``
needs: ``sweep.json``, the settings, and ``trials.jsonl``, a line per finished trial.
"""

from __future__ import annotations

import json as jsonlib
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import limit_threads, load_with_settings, pick_task
from jobs.command import (
    ConfigOption,
    JsonOption,
    Progress,
    SeedOption,
    SetOption,
    run,
    write_atomically,
    write_result,
)
from jobs.runs import put_aside

if TYPE_CHECKING:
    from crsm.config import Config
    from crsm.model import Checkpoint
    from jobs.ablation.settings import AblationConfig
    from jobs.ablation.space import Point, Space
    from jobs.ablation.sweep import Planned
    from jobs.ablation.table import Record

SWEEP_FILE = "sweep.json"
DEFAULT_OUTPUT = Path("runs") / "ablations"
_FREE = ("resources", "concurrent", "max_failures", "targets", "name")
"""Settings of a sweep that change nothing about its trials."""

OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Where to write; runs/ablations/NAME if not given.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with what is in the output folder; without it, that is put aside.")
]
AnyCheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", metavar="NAME", help="In the place of ablation.checkpoint.")
]


@dataclass(frozen=True, slots=True)
class Sweep:
    """All that decides the course of a sweep."""

    ablation: AblationConfig
    checkpoint: Checkpoint
    space: Space
    reference: Point | None
    """Where controls are measured, at every lag; None: points are drawn, and there is no such place."""

    @property
    def settings(self) -> Config:
        return self.checkpoint.config


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    checkpoint: AnyCheckpointOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
) -> int:
    """Sweep over settings of System 2 and report what they do.

    --config names a file with a section "ablation" (configs/ablate_lag_rate.yaml); what else it states, and --set,
    changes the checkpoint's settings. Everything runs by the virtual clock: no figure depends on the machine.
    """
    sweep = prepare(config, overrides or [], seed, checkpoint)
    folder = output or DEFAULT_OUTPUT / sweep.ablation.name
    done = open_folder(folder, fingerprint(sweep), resume)
    limit_threads()
    started = time.perf_counter()
    records = measure(sweep, folder, done)
    seconds = time.perf_counter() - started
    results = conclude(sweep, records, folder, shlex.join(["python", "-m", "jobs.ablate", *sys.argv[1:]]))
    results |= {"wall_seconds": seconds, "resumed_trials": len(done)}
    write_result("ablate", _config(sweep), sweep.settings.seed, results, json)
    broken = results["silence"]["broken"]
    if broken:
        print(f"error: plans that write nothing changed answers at {broken[0]}", file=sys.stderr)
    return 1 if broken else 0


def prepare(config: Path | None, overrides: list[str], seed: int | None, checkpoint: str | None) -> Sweep:
    """Reads and checks everything that a user can get wrong, before Ray starts.

    Raises:
        ValueError: naming what is wrong and what is allowed.
    """
    from jobs.ablation.settings import load_ablation, shrink
    from jobs.ablation.space import corner, parse_space, reference

    asked = load_ablation(config, overrides)
    ablation = asked.ablation
    if checkpoint is not None:
        ablation = ablation.model_copy(update={"checkpoint": checkpoint})
    if ablation.method == "optuna":
        from jobs.ablation.sweep import require_optuna

        require_optuna()
    loaded = load_with_settings(ablation.checkpoint, asked.stated, asked.overrides, seed)
    pick_task(loaded.config, ablation.task)
    space = parse_space(ablation.space, loaded.config, ranges=ablation.method != "grid")
    if ablation.smoke:
        ablation, space = shrink(ablation), corner(space)
    at = reference(space, loaded.config, loaded.trust_horizon) if ablation.method == "grid" else None
    return Sweep(ablation, loaded, space, at)


def _config(sweep: Sweep) -> dict[str, Any]:
    return {"ablation": sweep.ablation.model_dump(mode="json")} | sweep.settings.model_dump(mode="json")


def fingerprint(sweep: Sweep) -> dict[str, Any]:
    """What two starts of a sweep must have in common for their trials to belong to one table."""
    tree = _config(sweep)
    used = ("seed", "model", "tasks", "search", "deliberation", "sampling")
    tree = {name: tree[name] for name in used} | {
        "ablation": {name: value for name, value in tree["ablation"].items() if name not in (*_FREE, "checkpoint")},
        "checkpoint": sweep.checkpoint.weights_hash,
        "ablation.space, in order": list(sweep.space),  # it numbers the trials
    }
    return dict(jsonlib.loads(jsonlib.dumps(tree)))


def open_folder(folder: Path, asked: dict[str, Any], resume: bool) -> list[Record]:
    """Makes the output folder ready and gives the trials that are finished already.

    Raises:
        ValueError: there is nothing to resume, or it was made with other settings, or the folder holds something else.
        OSError: it cannot be written.
    """
    from crsm.training.loop import check_fingerprint
    from jobs.ablation.sweep import read_records

    saved = folder / SWEEP_FILE
    if resume:
        if not saved.is_file():
            raise ValueError(f"nothing to resume in {folder}; allowed: an output folder of this job")
        try:
            check_fingerprint(jsonlib.loads(saved.read_text(encoding="utf-8")), asked, str(folder))
        except ValueError as error:
            raise ValueError(f"{error}; allowed: the same settings, or another sweep without --resume") from error
    elif saved.is_file():
        put_aside(folder)
        print(f"{folder} held a sweep; it is put aside beside it (--resume goes on with one)", file=sys.stderr)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output {str(folder)!r} holds something else; allowed: a new or empty folder, or a sweep's")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "cannot be written", str(folder))
    if not resume:
        write_atomically(saved, jsonlib.dumps(asked, indent=1, ensure_ascii=False) + "\n")
    return read_records(folder) if resume else []


def plan(sweep: Sweep) -> list[Planned]:
    """All trials of a sweep whose points are known beforehand, the seeds of a point neighbouring."""
    from jobs.ablation.space import draw, grid, is_reference
    from jobs.ablation.sweep import Planned

    ablation, space = sweep.ablation, sweep.space
    points = grid(space) if ablation.method == "grid" else draw(space, ablation.points, sweep.settings.seed)
    planned: list[Planned] = []
    for point in points:
        at_reference = sweep.reference is not None and is_reference(point, sweep.reference)
        for seed in ablation.seeds:
            planned.append(Planned(len(planned), point, seed, ablation.controls if at_reference else ()))
    return planned


def measure(sweep: Sweep, folder: Path, done: list[Record]) -> list[Record]:
    """Runs what is missing; gives all records."""
    from jobs.ablation.sweep import append_record, cluster, complete_points, run_optuna, run_planned
    from jobs.ablation.trial import Bench

    ablation, records = sweep.ablation, list(done)
    known = {record.trial for record in done}
    optuna = ablation.method == "optuna"
    missing = complete_points(done, ablation.seeds)[1] if optuna else plan(sweep)
    missing = [planned for planned in missing if planned.trial not in known]
    total = ablation.points * len(ablation.seeds) if optuna else len(known) + len(missing)
    if len(records) >= total:
        return records
    bench = Bench(sweep.checkpoint, ablation.task, ablation.problems)

    with (
        cluster(ablation.resources),
        Progress(f"{ablation.name}: {ablation.task}, {total} trials", total) as progress,
    ):

        def hear(record: Record) -> None:
            append_record(folder, record)
            records.append(record)
            progress.update(len(records), accuracy=record.tally.accuracy)

        progress.update(len(records))
        if missing:
            run_planned(bench, ablation, missing, hear)
        if optuna:
            run_optuna(bench, ablation, sweep.space, records, sweep.settings.seed, hear)
    return sorted(records, key=lambda record: record.trial)


def conclude(sweep: Sweep, records: list[Record], folder: Path, command: str) -> dict[str, Any]:
    """Writes the table, the pictures and the report, and gives the job's results."""
    from jobs.ablation.cheapest import cheapest
    from jobs.ablation.checks import lag_trend, silence
    from jobs.ablation.figures import draw_all
    from jobs.ablation.report import print_summary, report
    from jobs.ablation.table import pool, pooled_rows, rows, write_table

    ablation = sweep.ablation
    controls = ablation.controls if sweep.reference is not None else ()
    table, points = rows(records, controls), pool(records)
    results: dict[str, Any] = {
        "checkpoint": {
            "name": ablation.checkpoint,
            "weights": sweep.checkpoint.weights_hash,
            "version": sweep.checkpoint.model_version,
        },
        "command": command,
        "task": ablation.task,
        "trials": len(records),
        "points": pooled_rows(points, controls),
        "reference": sweep.reference,
        "silence": silence(points, sweep.settings),
        "lag_trend": lag_trend(points),
        "cheapest": cheapest(points, ablation.targets),
        "output": str(folder),
        "table": table,
    }
    results["files"] = [path.name for path in write_table(table, folder)]
    pictures = draw_all(points, sweep.reference, controls, results["cheapest"], ablation.task, folder)
    write_atomically(folder / "report.md", report(results, ablation, pictures))
    results["files"] += [*pictures, "report.md"]
    print_summary(results)
    return results


if __name__ == "__main__":
    run(main)
