"""Stage 3: the critics, on roll-outs of both systems by a fleet of actors, labelled by the verifier's verdict."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import TYPE_CHECKING, Any

from jobs.command import (
    ConfigOption,
    JsonOption,
    Progress,
    SeedOption,
    SetOption,
    load_settings,
    run,
    write_result,
)
from jobs.runs import (
    CheckpointOption,
    FreshOption,
    NameOption,
    Outcome,
    StorageOption,
    describe_outcome,
    local_copy,
    localised,
    locate,
    plain_settings,
    previous_checkpoint,
    put_aside,
    resolve,
    run_folder,
    weights_hash,
    within_reach,
)
from jobs.storage import StoragePath
from jobs.train import cluster, one_line_failure, require_resources, train_stage

if TYPE_CHECKING:
    from actors.rollouts import Record, RolloutJob
    from crsm.config import Config

CHUNK = 64
"""Problems of one job. Not more where there are more actors: what a record says must not depend on the fleet."""
SEED_STRIDE = 100_003
"""Distance between the problem streams of two rounds, and of the training of other stages."""


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    checkpoint: CheckpointOption = None,
    name: NameOption = None,
    storage: StorageOption = None,
    fresh: FreshOption = False,
) -> None:
    """Train stage 3: the critics, on verified roll-outs of both systems.

    Starts from --checkpoint, or from what stage 2 of the same run left, and prints the pairwise branch accuracy that
    decides whether stage 4 may open the gates.
    """
    settings = load_settings(config, overrides, seed)
    storage, name = locate(settings, storage, name)
    if fresh:
        put_aside_rounds(run_folder(storage, name))
    source = checkpoint or previous_checkpoint("stage_3", storage, name)
    with one_line_failure():
        outcome = train_judgment(settings, source, storage, name)
    print(describe_outcome(outcome), file=sys.stderr)
    print(describe_judgment(outcome, settings), file=sys.stderr)
    results = {"checkpoint": str(outcome.checkpoint), "had_finished": outcome.had_finished, **outcome.report}
    write_result("stage_3_value_head", settings, settings.seed, results, json)


def train_judgment(settings: Config, source: str | StoragePath, storage: str, name: str) -> Outcome:
    """All rounds of roll-outs and training; each trains on the roll-outs of its own and of the earlier rounds."""
    rounds = settings.stage_3.iterations
    earlier: StoragePath | None = None
    outcome: Outcome | None = None
    for index in range(rounds):
        last = index == rounds - 1
        folder_name = "stage_3" if last else f"stage_3.round_{index + 1}"
        folder = run_folder(storage, name) / folder_name
        rollouts = collect(settings, source, folder, index, earlier)
        outcome = train_stage("stage_3", settings, source, storage, name, rollouts=rollouts, folder_name=folder_name)
        source, earlier = outcome.checkpoint, rollouts
    assert outcome is not None
    return outcome


def put_aside_rounds(folder: StoragePath) -> None:
    for path in folder.iterdir():
        if (path.name == "stage_3" or path.name.startswith("stage_3.round_")) and ".old-" not in path.name:
            put_aside(path)


def describe_judgment(outcome: Outcome, settings: Config) -> str:
    """Branch accuracy and its consequence."""
    table = outcome.report["judgment"]
    per_task = "; ".join(
        f"{task} {_shown(row['branch_accuracy'])}, imagined {_shown(row['imagined_branch_accuracy'])}"
        for task, row in table.items()
    )
    bar = settings.stage_3.gate_accuracy
    verdict = "the gates may open" if outcome.report["gates_may_open"] else "THE GATES STAY SHUT"
    return f"pairwise branch accuracy {_shown(outcome.report['branch_accuracy'])} (bar {bar}): {verdict}. {per_task}"


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


# ----------------------------------------------------------------------------------------------------------- roll-outs


def collect(
    settings: Config, source: str | StoragePath, folder: StoragePath, index: int, earlier: StoragePath | None
) -> StoragePath:
    """The roll-outs of a round with those of the earlier ones, one JSON object a line; made only if they are missing.

    Beside them, ``rollouts.json`` says what they were made with and how accurate the systems were.
    """
    from crsm.training.loop import check_fingerprint

    path, summary = folder / "rollouts.jsonl", folder / "rollouts.json"
    made_with = {
        **plain_settings(settings, ("seed", "tasks", "search", "deliberation", "sampling")),
        "stage_3": {key: getattr(settings.stage_3, key) for key in ("problems", "temperature")},
        "round": index + 1,
        "input checkpoint": weights_hash(source),
    }
    if summary.is_file() and path.is_file():
        found = jsonlib.loads(summary.read_text())["made_with"]
        try:
            check_fingerprint(found, made_with, str(path))
        except ValueError as error:
            raise ValueError(f"{error}; allowed: the same settings, another --name, or --fresh") from error
        return path
    folder.check_writable()
    with cluster():
        within = within_reach(resolve(source), folder)
        records = roll_out_jobs(settings, within, plan_jobs(settings, index), "stage_3 roll-outs")
    rounds = [] if earlier is None else jsonlib.loads(earlier.with_name("rollouts.json").read_text())["rounds"]
    before = "" if earlier is None else earlier.read_text()
    path.write_text(before + "".join(jsonlib.dumps(record, ensure_ascii=False) + "\n" for record in records))
    described = {"made_with": made_with, "rounds": [*rounds, {"round": index + 1, "accuracy": accuracies(records)}]}
    summary.write_text(jsonlib.dumps(described, indent=1, ensure_ascii=False) + "\n")
    for task, row in accuracies(records).items():
        figures = ", ".join(f"System {system} {value:.3f}" for system, value in row.items())
        print(f"stage_3: round {index + 1}, roll-outs of {task}: {figures}", file=sys.stderr)
    return path


def plan_jobs(settings: Config, index: int) -> list[RolloutJob]:
    """What a round rolls out: training problems no other stage has drawn by this seed, each with both systems."""
    from actors.rollouts import RolloutJob

    seed = settings.seed + SEED_STRIDE * (index + 1)
    jobs, tasks = [], settings.planned_tasks
    for position, task in enumerate(tasks):
        ends = [settings.stage_3.problems * end // len(tasks) for end in (position, position + 1)]
        count = ends[1] - ends[0]
        for first in range(0, count, CHUNK):
            for system in (2, 1):  # the longer work first
                jobs.append(
                    RolloutJob(
                        task=task.label,
                        split="train",
                        problem_seed=seed,
                        first=first,
                        count=min(CHUNK, count - first),
                        system=system,
                        temperature=settings.stage_3.temperature,
                        sampling_seed=seed,
                    )
                )
    return jobs


def accuracies(records: list[Record]) -> dict[str, dict[int, float]]:
    """Share of right answers per task and system."""
    table: dict[str, dict[int, list[bool]]] = {}
    for record in records:
        table.setdefault(record["task"], {}).setdefault(record["system"], []).append(record["correct"])
    return {
        task: {system: sum(row[system]) / len(row[system]) for system in sorted(row)} for task, row in table.items()
    }


def roll_out_jobs(settings: Config, source: StoragePath, jobs: list[RolloutJob], title: str) -> list[Record]:
    """Runs jobs on ``stage_3.actors`` actors of the running Ray session, each with the checkpoint ``source``."""
    import ray

    from actors.rollouts import RolloutActor, run_fleet
    from crsm.config import core_count

    actors = settings.stage_3.actors
    require_resources({"CPU": float(actors)}, f"{title} with stage_3.actors = {actors}")
    threads = settings.train.threads or max(1, core_count() // actors)

    class LocalRolloutActor(RolloutActor):
        """Opens its checkpoint and its data where they lie, or from the copies of its node."""

        def __init__(self, source: StoragePath, config: Config, threads: int) -> None:
            super().__init__(str(local_copy(source)), localised(config), threads)

    remote = ray.remote(num_cpus=1)(LocalRolloutActor)
    with Progress(f"{title} by {actors} actors", len(jobs)) as progress:
        progress.update(0)

        def show(done: int, deaths: int) -> None:
            figures: dict[str, Any] = {"deaths": deaths} if deaths else {}
            progress.update(done, **figures)

        return run_fleet(jobs, lambda: remote.remote(source, settings, threads), actors, show)


if __name__ == "__main__":
    run(main)
