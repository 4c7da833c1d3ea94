"""Public benchmarks and built-in tasks, answered by System 1, System 2 and the controls on the same problems.

The output folder holds ``results.json``, ``results.md``, and a folder per benchmark with every answer
(:mod:`jobs.evaluation.folder`). A run that was stopped goes on from the answers that are there.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import limit_threads, load_with_settings, print_table
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
    from crsm.evaluation.benchmarks.base import PartResult
    from crsm.evaluation.benchmarks.examiner import Examiner, Part
    from crsm.evaluation.benchmarks.settings import BenchmarkConfig, EvaluationConfig
    from jobs.evaluation.folder import AnswerFolder

DEFAULT_OUTPUT = Path("runs") / "evaluate"

AnyCheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", metavar="NAME", help="In the place of evaluation.checkpoint.")
]
BenchmarksOption = Annotated[
    str | None,
    typer.Option(
        "--benchmarks", metavar="NAMES", help="Names with commas between them; all of the file's if not given."
    ),
]
ProblemsOption = Annotated[
    int | None, typer.Option("--problems", min=1, help="Of every benchmark, at most; the file's if not given.")
]
ActorsOption = Annotated[
    int, typer.Option("--actors", min=0, metavar="N", help="Ray actors that share the work; 0: this process alone.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Where to write; runs/evaluate/NAME if not given.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh/--resume", help="Put aside what the output folder holds, or go on with it.")
]


def main(
    checkpoint: AnyCheckpointOption = None,
    benchmarks: BenchmarksOption = None,
    problems: ProblemsOption = None,
    controls: Annotated[
        str | None, typer.Option("--controls", metavar="NAMES", help="all, none, or names; the file's if not given.")
    ] = None,
    compute: Annotated[
        bool, typer.Option("--compute", help="Also accuracy against compute, beside best-of-N and beam search.")
    ] = False,
    actors: ActorsOption = 0,
    output: OutputOption = None,
    fresh: FreshOption = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> int:
    """Evaluate a checkpoint on benchmarks: both systems and the controls, on the same problems.

    --config names a file with a section "evaluation" (configs/evaluate.yaml); what else it states, and --set, changes
    the checkpoint's settings. Everything runs by the virtual clock: the table depends on neither the machine's speed
    nor the number of actors, and a run that was stopped gives the same when it goes on.
    """
    from jobs.evaluation.settings import load_evaluation

    asked = load_evaluation(config, overrides or ())
    evaluation = _with_options(asked.evaluation, checkpoint, controls, compute)
    loaded = load_with_settings(evaluation.checkpoint, asked.stated, asked.overrides, seed)
    chosen = _choose(evaluation, loaded.config, benchmarks, problems)
    limit_threads()

    from crsm.evaluation.benchmarks.examiner import Examiner
    from jobs.evaluation.folder import AnswerFolder

    settings = loaded.config
    place = output or DEFAULT_OUTPUT / settings.name
    examiner = Examiner(loaded, chosen, settings.seed)
    for name in chosen:  # all of them, before anything is answered
        examiner.benchmark(name)
    if fresh:
        put_aside(place)
    made_with = {
        "checkpoint": loaded.weights_hash,
        **settings.model_dump(mode="json", include={"seed", "search", "deliberation", "sampling"}),
        "planners": {"max_batch": settings.planners.max_batch},
        "world_model": settings.model.world_model.kind,
        "uncertainty_penalty": settings.model.critic.uncertainty_penalty,
        "part": evaluation.part,
    }
    folders = {
        name: AnswerFolder(
            place / name,
            examiner.benchmark(name),
            made_with | {"benchmark": benchmark.model_dump(mode="json", exclude={"problems"})},
        )
        for name, benchmark in chosen.items()
    }
    systems = {name: _systems(evaluation, examiner, name) for name in chosen}
    _answer_all(examiner, chosen, folders, systems, evaluation.part, actors)
    results: dict[str, Any] = {
        "checkpoint": {
            "name": evaluation.checkpoint,
            "weights": loaded.weights_hash,
            "version": loaded.model_version,
        },
        "seed": settings.seed,
        "lag": settings.deliberation.lag,
        "benchmarks": {
            name: _conclude(examiner, folders[name], systems[name], benchmark, evaluation.resamples)
            for name, benchmark in chosen.items()
        },
    }
    from crsm.evaluation.benchmarks.table import report

    command = _command(evaluation, chosen, config, overrides or [], settings.seed)
    write_atomically(place / "results.md", report(f"Evaluation of {settings.name}", results, command))
    times = {name: {system: folders[name].seconds(system) for system in systems[name]} for name in chosen}
    described = {"evaluation": evaluation.model_dump(mode="json")} | settings.model_dump(mode="json")
    everything = results | {"times": times, "output": str(place)}
    write_result("evaluate", described, settings.seed, everything, place / "results.json")
    write_result("evaluate", described, settings.seed, everything, json)
    _print(results)
    print(f"every answer: {place}", file=sys.stderr)
    broken = [
        name
        for name, figures in results["benchmarks"].items()
        if figures["systems"].get("gate_zero", {}).get("changed", 0)
    ]
    if broken:
        print(f"error: plans that write nothing changed answers of {broken[0]}", file=sys.stderr)
    return 1 if broken else 0


# -------------------------------------------------------------------------------------------------------- what is asked


def _with_options(
    evaluation: EvaluationConfig, checkpoint: str | None, controls: str | None, compute: bool
) -> EvaluationConfig:
    from jobs.benchmark_reasoning import parse_controls

    changes: dict[str, Any] = {}
    if checkpoint is not None:
        changes["checkpoint"] = checkpoint
    if controls is not None:
        changes["controls"] = parse_controls(controls)
    if compute:
        changes["compute"] = True
    return evaluation.model_copy(update=changes)


def _choose(
    evaluation: EvaluationConfig, settings: Config, names: str | None, problems: int | None
) -> dict[str, BenchmarkConfig]:
    """The benchmarks of this run, by name.

    Raises:
        ValueError: there is none of a name, or none at all.
    """
    from crsm.evaluation.benchmarks.settings import pick_benchmark

    asked = [benchmark.name for benchmark in evaluation.benchmarks]
    if names is not None:
        asked = list(dict.fromkeys(name.strip() for name in names.split(",")))
    if not asked:
        raise ValueError("no benchmark is asked for; allowed: --benchmarks NAMES, or evaluation.benchmarks in --config")
    chosen = {name: pick_benchmark(evaluation, settings, name) for name in asked}
    if problems is not None:
        chosen = {name: found.model_copy(update={"problems": problems}) for name, found in chosen.items()}
    return chosen


def _systems(evaluation: EvaluationConfig, examiner: Examiner, name: str) -> list[str]:
    """Who answers a benchmark; what is not defined there is said and left out."""
    from crsm.evaluation.benchmarks.answers import COMPUTE

    benchmark = examiner.benchmark(name)
    systems = ["system1", "system2"]
    for control in evaluation.controls:
        if control in benchmark.excluded:
            print(f"{name}: without {control} ({benchmark.excluded[control]})", file=sys.stderr)
        else:
            systems.append(control)
    if evaluation.compute and benchmark.kind == "answers":
        systems.append(COMPUTE)
    return systems


def _command(
    evaluation: EvaluationConfig,
    chosen: dict[str, BenchmarkConfig],
    config: Path | None,
    overrides: list[str],
    seed: int,
) -> str:
    """The command that gives the same table."""
    words = ["python", "-m", "jobs.evaluate", "--checkpoint", evaluation.checkpoint, "--benchmarks", ",".join(chosen)]
    limits = {benchmark.problems for benchmark in chosen.values()}
    if len(limits) == 1 and (limit := limits.pop()) is not None:
        words += ["--problems", str(limit)]
    words += ["--controls", ",".join(evaluation.controls) or "none"]
    words += ["--compute"] if evaluation.compute else []
    words += [] if config is None else ["--config", str(config)]
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join([*words, "--seed", str(seed)])


# ------------------------------------------------------------------------------------------------------------ answering


def _answer_all(
    examiner: Examiner,
    chosen: dict[str, BenchmarkConfig],
    folders: dict[str, AnswerFolder],
    systems: dict[str, list[str]],
    size: int,
    actors: int,
) -> None:
    """Answers what is missing; every part is kept as soon as it is there."""
    parts = [part for name, folder in folders.items() for part in folder.missing(systems[name], size)]
    if not parts:
        return
    every = sum(len(systems[name]) * -(-len(folder.benchmark) // size) for name, folder in folders.items())
    if len(parts) < every:
        print(f"going on: {every - len(parts)} of {every} parts are there", file=sys.stderr)
    with Progress(f"{', '.join(folders)}: parts of {size} problems", len(parts)) as progress:
        progress.update(0)
        results = (
            ((part, examiner.answer(part, folders[part.benchmark].benchmark.digest), 0) for part in parts)
            if actors == 0
            else _answer_with_actors(examiner, chosen, folders, parts, actors)
        )
        for done, (part, result, deaths) in enumerate(results, start=1):
            folders[part.benchmark].add(part, result)
            figures: dict[str, Any] = {"deaths": deaths} if deaths else {}
            progress.update(done, **figures)


def _answer_with_actors(
    examiner: Examiner,
    chosen: dict[str, BenchmarkConfig],
    folders: dict[str, AnswerFolder],
    parts: list[Part],
    actors: int,
) -> Iterator[tuple[Part, PartResult, int]]:
    import ray

    from actors.examiners import ExaminerActor
    from actors.rollouts import fleet_results
    from actors.weights import share
    from jobs.train import cluster, require_resources

    with cluster():
        require_resources({"CPU": float(actors)}, f"jobs.evaluate with --actors {actors}")
        checkpoint = examiner.checkpoint
        source = share(checkpoint)
        remote = ray.remote(num_cpus=1)(ExaminerActor)

        def start() -> ray.actor.ActorHandle:
            return remote.remote(source, checkpoint.config, chosen, checkpoint.config.seed)

        def give(actor: ray.actor.ActorHandle, part: Part) -> ray.ObjectRef:
            return actor.answer.remote(part, folders[part.benchmark].benchmark.digest)

        for index, result, deaths in fleet_results(parts, start, actors, give):
            yield parts[index], result, deaths


# -------------------------------------------------------------------------------------------------------------- figures


def _conclude(
    examiner: Examiner, folder: AnswerFolder, systems: list[str], settings: BenchmarkConfig, resamples: int
) -> dict[str, Any]:
    from crsm.evaluation.benchmarks.answers import COMPUTE, spent_of
    from crsm.evaluation.benchmarks.table import tabulate
    from crsm.evaluation.equal_compute import curves

    folder.conclude(systems)
    said = [system for system in systems if system != COMPUTE]
    figures = tabulate(
        folder.benchmark,
        {system: folder.records(system) for system in said},
        {system: folder.plans(system) for system in said},
        resamples,
    )
    if COMPUTE in systems:
        checkpoint = examiner.checkpoint
        lag = checkpoint.config.deliberation.lag
        figures["compute"] = curves(checkpoint, settings.name, lag, spent_of(folder.records(COMPUTE)))
    return figures | {"settings": settings.model_dump(mode="json")}


def _print(results: dict[str, Any]) -> None:
    from crsm.evaluation.benchmarks.table import compute_rows, rows

    for name, figures in results["benchmarks"].items():
        for measure, header, body in rows(figures):
            print_table(f"{name}: {measure}, {figures['problems']} problems, lag {results['lag']}", header, body)
        if "compute" in figures:
            header, body = compute_rows(figures["compute"])
            print_table(f"{name}: accuracy against compute after the prompt, one plan per answer", header, body)


if __name__ == "__main__":
    run(main)
