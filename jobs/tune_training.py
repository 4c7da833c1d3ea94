"""Searches for good settings of one training stage: Ray Tune over runs of Ray Train, with ASHA.

A trial is a whole run of ``jobs.train`` in a small process of Tune's; its controller and workers are Ray Train's own,
and tell Tune how far they are whenever they save a state. What a trial leaves lies under ``trials/`` of the output
folder like any run, with its trackers (``train.trackers``); every trial that ended is kept
(:mod:`jobs.ablation.place`), and ``--resume`` goes on from there: trials that had begun resume from their last state.
"""

from __future__ import annotations

import json as jsonlib
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import (
    ConfigOption,
    JsonOption,
    Progress,
    SeedOption,
    SetOption,
    commit,
    run,
    write_result,
)

if TYPE_CHECKING:
    from crsm.config import Config
    from jobs.ablation.space import Point
    from jobs.ablation.tuning import TuningConfig, TuningFile
    from jobs.storage import StoragePath

DEFAULT_OUTPUT = Path("runs") / "tuning"
HEAD_NODE = "node:__internal_head__"
"""A resource that every cluster has, once."""

OutputOption = Annotated[
    str | None,
    typer.Option("--output", metavar="PLACE", help="A folder, s3://… or gs://…; runs/tuning/NAME if not given."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with what is in the output folder; without it, that is put aside.")
]

Trial = dict[str, Any]


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
) -> None:
    """Tune settings of one training stage (learning rate, batch, ...) with ASHA.

    --config names a file with a section "tuning" beside the settings of a training run (configs/tune_stage_1.yaml).
    """
    from jobs.ablation.place import open_folder, output_place
    from jobs.ablation.tuning import as_options, load_tuning
    from jobs.trackers import check_trackers
    from jobs.train import one_line_failure

    commit()
    asked = load_tuning(config, overrides or [], seed)
    folder = output_place(output, DEFAULT_OUTPUT / asked.tuning.name)
    check_trackers(asked.settings.train.trackers, "train.trackers", folder.local is not None)
    open_folder(folder, _fingerprint(asked), resume)
    started = time.perf_counter()
    with one_line_failure():
        trials = tune_stage(asked, folder)
    ranked = rank(trials, asked.tuning)
    results = {
        "command": shlex.join(["python", "-m", "jobs.tune_training", *sys.argv[1:]]),
        "stage": asked.tuning.stage,
        "metric": asked.tuning.metric,
        "trials": len(trials),
        "best": {**ranked[0], "options": as_options(ranked[0]["point"], asked.tuning.stage)},
        "table": write_trials(ranked, folder),
        "output": str(folder),
        "wall_seconds": time.perf_counter() - started,
    }
    _print(results)
    settings = {"tuning": asked.tuning.model_dump(mode="json")} | asked.settings.model_dump(mode="json")
    write_result("tune_training", settings, asked.settings.seed, results, json)


def _fingerprint(asked: TuningFile) -> dict[str, Any]:
    from jobs.runs import plain_settings, weights_hash

    tuning = asked.tuning.model_dump(mode="json")
    tree = plain_settings(asked.settings, {"seed", "model", "tokenizer", "tasks", "search", "deliberation", "sampling"})
    tree[asked.tuning.stage] = getattr(asked.settings, asked.tuning.stage).model_dump(mode="json")
    tree["tuning"] = {name: value for name, value in tuning.items() if name not in ("concurrent", "name", "checkpoint")}
    tree["tuning.space, in order"] = list(asked.space)
    if asked.tuning.checkpoint is not None:
        tree["checkpoint"] = weights_hash(asked.tuning.checkpoint)
    return dict(jsonlib.loads(jsonlib.dumps(tree)))


def tune_stage(asked: TuningFile, folder: StoragePath) -> list[Trial]:
    """Runs what is missing; gives all trials."""
    import ray

    from actors.metrics import Counts
    from crsm.config import core_count
    from jobs.ablation.place import add_ended
    from jobs.ablation.space import draw, grid
    from jobs.train import cluster, require_resources

    tuning, settings = asked.tuning, asked.settings
    chosen = grid(asked.space) if tuning.method == "grid" else draw(asked.space, tuning.points, settings.seed)
    trials = read_trials(folder)
    missing = [(index, point) for index, point in enumerate(chosen) if index not in {t["trial"] for t in trials}]
    if not missing:
        return trials
    workers = float(settings.train.workers)
    need = {"CPU": workers} | ({"GPU": workers} if settings.train.use_gpu else {})
    what = f"a trial of {tuning.stage} with train.workers = {settings.train.workers}"
    require_resources(need, what)
    title = f"{tuning.name}: {tuning.stage}, {len(chosen)} trials"
    with cluster(), Progress(title, len(chosen), begun=len(trials)) as progress:
        require_resources(need, what)
        there = ray.cluster_resources()
        if len(ray.nodes()) == 1:  # a small machine says that it has more CPUs than cores
            there["CPU"] = min(there["CPU"], float(core_count()))
        room = min(int(there.get(name, 0.0) // amount) for name, amount in need.items())

        counts = Counts(tuning.name)

        def hear(trial: Trial) -> None:
            add_ended(folder, trial)
            trials.append(trial)
            counts.add("crsm_trials", 1, finished=str(trial["finished"]).lower())
            progress.update(len(trials), **{tuning.metric: trial["value"]})

        progress.update(len(trials))
        _fit(tuning, settings, missing, folder, tuning.concurrent or max(1, room), hear)
    return trials


def _fit(
    tuning: TuningConfig,
    settings: Config,
    missing: list[tuple[int, Point]],
    folder: StoragePath,
    concurrent: int,
    hear: Callable[[Trial], None],
) -> None:
    import os

    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler

    from jobs.ablation.sweep import Listener, experiment, quiet_tune

    stage = getattr(settings, tuning.stage)
    quiet_tune()
    # Figures of evaluations are not there from the first look on.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

    def ended(config: dict[str, Any], result: dict[str, Any]) -> None:
        hear(
            {
                "trial": config["run"]["trial"],
                "point": config["run"]["point"],
                "value": float(result[tuning.metric]),
                "steps": int(result["step"]),
                "finished": int(result["step"]) >= stage.steps,
            }
        )

    told = [{"trial": index, "point": point} for index, point in missing]
    results = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(
                train_trial,
                tuning=tuning.model_dump(mode="json"),
                settings=settings.model_dump(mode="json"),
                folder=str(folder),
            ),
            # It only waits for the run's controller and workers, which reserve what they need. A trial must ask for
            # something; a CPU could leave none for the workers of trials that all wait for theirs.
            {"cpu": 0, HEAD_NODE: 0.001},
        ),
        param_space={"run": tune.grid_search(told)},
        tune_config=tune.TuneConfig(
            metric=tuning.metric,
            mode=tuning.mode,
            max_concurrent_trials=concurrent,
            scheduler=AsyncHyperBandScheduler(
                time_attr="step",
                max_t=stage.steps,
                grace_period=min(stage.steps, tuning.grace * stage.checkpoint_every),
                reduction_factor=tuning.reduction,
            ),
        ),
        run_config=tune.RunConfig(
            **experiment(folder),
            verbose=0,
            failure_config=tune.FailureConfig(fail_fast=True),  # Ray Train has tried again where that may help
            callbacks=[Listener(ended)],
        ),
    ).fit()
    if results.errors:
        raise results.errors[0]


def train_trial(config: dict[str, Any], tuning: dict[str, Any], settings: dict[str, Any], folder: str) -> None:
    """A trial, in a process of Tune's: one run of Ray Train."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from crsm.config import parse_config
    from jobs.ablation.tuning import apply_tuned
    from jobs.storage import StoragePath
    from jobs.train import train_stage

    stage = tuning["stage"]
    point = apply_tuned(config["run"]["point"], parse_config(settings, source="the search's settings"), stage)
    outcome = train_stage(
        stage,
        point,
        tuning["checkpoint"],
        str(StoragePath.of(folder) / "trials"),
        f"{config['run']['trial']:04d}",
        callbacks=[TuneReportCallback()],
    )
    # The last evaluation comes after the last state, and a run that had finished before tells nothing on its way.
    last = {name: value for name, value in outcome.report.items() if isinstance(value, int | float)}
    if tuning["metric"] not in last:
        known = ", ".join(sorted(last))
        raise ValueError(f"tuning.metric = {tuning['metric']!r}; allowed: a figure of {stage}: {known}")
    tune.report({**last, "step": outcome.report["steps"]})


def read_trials(folder: StoragePath) -> list[Trial]:
    """Trials that ended."""
    from jobs.ablation.place import read_ended

    trials: dict[int, Trial] = {}
    for trial in read_ended(folder):
        trials.setdefault(trial["trial"], trial)
    return list(trials.values())


def rank(trials: list[Trial], tuning: TuningConfig) -> list[Trial]:
    """The best first. One that ASHA ended is behind all that it let finish: its figure is of a shorter training."""
    sign = 1.0 if tuning.mode == "min" else -1.0
    return sorted(trials, key=lambda trial: (not trial["finished"], -trial["steps"], sign * trial["value"]))


def write_trials(ranked: list[Trial], folder: StoragePath) -> list[dict[str, Any]]:
    """The table, as Parquet and CSV."""
    from jobs.ablation.table import write_table

    table = [
        {"trial": trial["trial"], **trial["point"], **{key: trial[key] for key in ("value", "steps", "finished")}}
        for trial in ranked
    ]
    write_table(table, folder)
    return table


def _print(results: dict[str, Any]) -> None:
    from jobs.ablation.report import show
    from jobs.checkpoints import print_table

    header = [results["metric"] if name == "value" else name for name in results["table"][0]]
    print_table(
        f"{results['stage']}: {results['trials']} trials",
        header,
        [[show(value) for value in row.values()] for row in results["table"]],
    )
    print(f"best: {results['best']['options']}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
