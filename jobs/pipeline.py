"""All four stages in a row, from one file of settings."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import ConfigOption, JsonOption, SeedOption, SetOption, load_settings, run, write_result
from jobs.runs import (
    STAGES,
    CheckpointOption,
    NameOption,
    Outcome,
    StorageOption,
    describe_outcome,
    local_copy,
    locate,
    previous_checkpoint,
    put_aside,
    read_description,
    run_folder,
)
from jobs.storage import StoragePath
from jobs.train import cluster, one_line_failure, train_stage

if TYPE_CHECKING:
    from crsm.config import Config

StagesOption = Annotated[str, typer.Option("--stages", metavar="1,2,3,4", help="Which stages, in ascending order.")]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="Copies the last checkpoint there, with report.json and report.png."),
]
FreshOption = Annotated[
    bool,
    typer.Option("--fresh/--resume", help="Put aside these stages of the run and all later ones, or go on with them."),
]


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    stages: StagesOption = "1,2,3,4",
    output: OutputOption = None,
    checkpoint: CheckpointOption = None,
    name: NameOption = None,
    storage: StorageOption = None,
    fresh: FreshOption = False,
) -> None:
    """Train all stages in one Ray session.

    The same name and storage go on where they stopped: finished stages are passed over.
    """
    settings = load_settings(config, overrides, seed)
    chosen = parse_stages(stages)
    storage, name = locate(settings, storage, name)
    if fresh:
        for folder in run_folder(storage, name).iterdir():
            is_stage = folder.name.startswith("stage_") and ".old-" not in folder.name
            if is_stage and folder.name[: len("stage_1")] >= chosen[0]:
                put_aside(folder)
    started = time.perf_counter()
    with one_line_failure():
        outcomes = train(settings, chosen, checkpoint, storage, name)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "jobs.pipeline", *sys.argv[1:]]),
        "checkpoint": str(output or outcomes[-1].checkpoint),
        "seconds": {outcome.stage: outcome.report["seconds"] for outcome in outcomes},
        "wall_seconds": time.perf_counter() - started,
        "stages": read_description(outcomes[-1].checkpoint)["report"],
        "parameters": _parameters(outcomes[-1].checkpoint),
    }
    if output is not None:
        from crsm.model import load_checkpoint, save_checkpoint
        from jobs.report import draw_report

        save_checkpoint(load_checkpoint(local_copy(outcomes[-1].checkpoint)), output)
        write_result("pipeline", settings, settings.seed, results, output / "report.json")
        draw_report(results["stages"], output / "report.png", title=f"{name}: training")
        print(f"checkpoint, report.json and report.png in {output}", file=sys.stderr)
    write_result("pipeline", settings, settings.seed, results, json)


def parse_stages(text: str) -> list[str]:
    """``1,2,4`` as names of stages.

    Raises:
        ValueError: something else than numbers of stages in ascending order.
    """
    names = [f"stage_{part.strip()}" for part in text.split(",")]
    if any(name not in STAGES for name in names) or names != sorted(set(names)):
        raise ValueError(f"stages = {text!r}; allowed: some of 1,2,3,4 in ascending order, each once")
    return names


def train(settings: Config, stages: list[str], checkpoint: str | None, storage: str, name: str) -> list[Outcome]:
    """Runs stages in a row, each starting from what the one before left."""
    from jobs.make_attempts import bootstrap, needs_attempts
    from jobs.stage_3_value_head import describe_judgment, train_judgment

    source: str | StoragePath | None = checkpoint
    if source is None and stages[0] != "stage_1":
        source = previous_checkpoint(stages[0], storage, name)
    outcomes: list[Outcome] = []
    with cluster():
        for stage in stages:
            if stage == "stage_1" and needs_attempts(settings):
                settings, source = bootstrap(settings, source, storage, name)
            if stage == "stage_3":
                assert source is not None
                outcome = train_judgment(settings, source, storage, name)
            else:
                outcome = train_stage(stage, settings, source, storage, name)
            print(describe_outcome(outcome), file=sys.stderr)
            if stage == "stage_3":
                print(describe_judgment(outcome, settings), file=sys.stderr)
            outcomes.append(outcome)
            source = outcome.checkpoint
    return outcomes


def _parameters(checkpoint: StoragePath) -> dict[str, int]:
    from crsm.model import load_checkpoint

    return load_checkpoint(local_copy(checkpoint)).model.num_parameters()


if __name__ == "__main__":
    run(main)
