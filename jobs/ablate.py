"""Sweeps over the settings of System 2 on Ray Tune: lag × injection rate, and whatever else a file names.

The output folder, of a file system or in an object store, holds ``table.parquet`` and ``table.csv``, ``report.md`` with
its pictures, and what ``--resume`` needs: ``sweep.json``, the settings, and the finished trials
(:mod:`jobs.ablation.place`).
"""

from __future__ import annotations

import json as jsonlib
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
    write_result,
)

if TYPE_CHECKING:
    from crsm.config import Config
    from crsm.model import Checkpoint
    from jobs.ablation.settings import AblationConfig
    from jobs.ablation.space import Point, Space
    from jobs.ablation.sweep import Planned
    from jobs.ablation.table import Record
    from jobs.storage import StoragePath

DEFAULT_OUTPUT = Path("runs") / "ablations"
_FREE = ("resources", "concurrent", "max_failures", "targets", "name", "trackers")
"""Settings of a sweep that change nothing about its trials."""

OutputOption = Annotated[
    str | None,
    typer.Option("--output", metavar="PLACE", help="A folder, s3://… or gs://…; runs/ablations/NAME if not given."),
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
    from jobs.ablation.place import open_folder, output_place
    from jobs.ablation.sweep import read_records
    from jobs.trackers import check_trackers

    sweep = prepare(config, overrides or [], seed, checkpoint)
    folder = output_place(output, DEFAULT_OUTPUT / sweep.ablation.name)
    check_trackers(sweep.ablation.trackers, "ablation.trackers", folder.local is not None)
    open_folder(folder, fingerprint(sweep), resume)
    done = read_records(folder) if resume else []
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


def measure(sweep: Sweep, folder: StoragePath, done: list[Record]) -> list[Record]:
    """Runs what is missing; gives all records."""
    from actors.metrics import Counts
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
    bench = Bench(sweep.checkpoint, ablation.task, ablation.problems, ablation.plan_tokens)
    counts = Counts(ablation.name)

    with (
        cluster(ablation.resources),
        Progress(f"{ablation.name}: {ablation.task}, {total} trials", total, begun=len(records)) as progress,
    ):

        def hear(record: Record) -> None:
            append_record(folder, record)
            records.append(record)
            counts.add("crsm_trials", 1, finished=str(record.finished).lower())
            counts.set("crsm_trial_accuracy", record.tally.accuracy)
            progress.update(len(records), accuracy=record.tally.accuracy)

        progress.update(len(records))
        if missing:
            run_planned(bench, ablation, folder, missing, hear)
        if optuna:
            run_optuna(bench, ablation, folder, sweep.space, records, sweep.settings.seed, hear)
    return sorted(records, key=lambda record: record.trial)


def conclude(sweep: Sweep, records: list[Record], folder: StoragePath | Path, command: str) -> dict[str, Any]:
    """Writes the table, the pictures and the report, and gives the job's results."""
    from jobs.ablation.cheapest import cheapest
    from jobs.ablation.checks import lag_trend, silence
    from jobs.ablation.figures import draw_all
    from jobs.ablation.place import drawing_folder
    from jobs.ablation.report import print_summary, report
    from jobs.ablation.table import pool, pooled_rows, rows, write_table
    from jobs.storage import StoragePath

    ablation, folder = sweep.ablation, StoragePath.of(folder)
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
    with drawing_folder(folder) as scratch:
        pictures = draw_all(points, sweep.reference, controls, results["cheapest"], ablation.task, scratch)
    (folder / "report.md").write_text(report(results, ablation, pictures))
    results["files"] += [*pictures, "report.md"]
    print_summary(results)
    return results


if __name__ == "__main__":
    run(main)
