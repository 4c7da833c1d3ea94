"""Training on nodes that are lost on purpose, beside the same training undisturbed: both must end with one loss."""

from __future__ import annotations

import sys
import tempfile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import ConfigOption, JsonOption, SeedOption, SetOption, load_settings, run, write_result
from jobs.pipeline import StagesOption, parse_stages
from jobs.runs import StorageOption

if TYPE_CHECKING:
    from crsm.config import Config
    from jobs.faults.nodes import Loss
    from jobs.runs import Outcome

TOLERANCE = 1e-3
"""Between the losses of the two runs."""
STATES_BEFORE = 2
"""States that Ray Train knows of before a node is lost without a notice."""


def main(
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    stages: StagesOption = "1,2,3,4",
    storage: StorageOption = None,
    nodes: Annotated[int, typer.Option("--nodes", min=2, help="Nodes beside the head, which only drives.")] = 2,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="Of every node, as Ray counts them.")] = 2,
    notice: Annotated[
        float, typer.Option("--notice", metavar="SECONDS", min=0, help="A node is drained so long before it is lost.")
    ] = 0,
    absence: Annotated[
        float,
        typer.Option(
            "--absence",
            metavar="SECONDS",
            min=0,
            help="A new node takes its place as soon as the work goes on without it, or after so long.",
        ),
    ] = 60,
) -> int:
    """Trains twice on a cluster on this machine; the second time a node is lost in stage 1 and one in stage 3.

    The node of stage 1 is lost with a training worker, that of stage 3 with an actor that rolls out. The exit status is
    0 only if all nodes were lost and the losses of all stages differ by no more than 0.001.
    """
    settings = load_settings(config, overrides, seed)
    chosen = parse_stages(stages)
    with tempfile.TemporaryDirectory(prefix="crsm-chaos-", ignore_cleanup_errors=True) as scratch:
        place = storage or scratch
        results = compare(settings, chosen, str(place), nodes, cpus, notice, absence)
    _print(results)
    write_result("chaos_training", settings, settings.seed, results, json)
    return 0 if results["same"] else 1


def compare(
    settings: Config, stages: list[str], storage: str, nodes: int, cpus: int, notice: float, absence: float
) -> dict[str, Any]:
    """Both runs, and how their losses differ.

    Raises:
        ValueError: no stage in which a node could be lost, or an input that does not fit.
    """
    from jobs.faults.nodes import local_nodes, losing
    from jobs.pipeline import train
    from jobs.runs import put_aside, run_folder

    planned = plan_losses(settings, stages, storage, notice, absence)
    if not planned:
        raise ValueError(f"stages = {','.join(stages)}; allowed: stage_1, stage_3 or both among them")
    for kind in KINDS:
        put_aside(run_folder(storage, f"{settings.name}-{kind}"))
    with local_nodes(nodes, cpus) as there:
        undisturbed = train(settings, stages, None, storage, f"{settings.name}-{KINDS[0]}")
        with losing(there, planned) as happened:
            disturbed = train(settings, stages, None, storage, f"{settings.name}-{KINDS[1]}")
    table = [compared(one, other) for one, other in zip(undisturbed, disturbed, strict=True)]
    return {
        "nodes": nodes,
        "notice": notice,
        "lost": [{"with": loss.on, "actors": loss.actors, "at_seconds": loss.lost_at} for loss in happened],
        "expected_losses": len(planned),
        "stages": table,
        "largest_difference": max(row["difference"] for row in table),
        "same": len(happened) == len(planned) and all(row["difference"] <= TOLERANCE for row in table),
    }


KINDS = ("undisturbed", "disturbed")


def plan_losses(settings: Config, stages: list[str], storage: str, notice: float, absence: float) -> list[Loss]:
    """A node with a training worker once stage 1 has states to go on from, and one with an actor that rolls out."""
    import json

    from jobs.faults.nodes import ROLL_OUT, WORKER, Loss
    from jobs.runs import run_folder

    known = run_folder(storage, f"{settings.name}-{KINDS[1]}") / "stage_1" / "checkpoint_manager_snapshot.json"

    def has_states() -> bool:
        found = len(json.loads(known.read_text())["checkpoint_results"]) if known.is_file() else 0
        return found >= (1 if notice else STATES_BEFORE)

    losses = []
    if "stage_1" in stages:
        losses.append(Loss(WORKER, has_states, notice, absence))
    if "stage_3" in stages:
        losses.append(Loss(ROLL_OUT, absence=absence))
    return losses


def compared(undisturbed: Outcome, disturbed: Outcome) -> dict[str, Any]:
    losses = [outcome.report["loss"] for outcome in (undisturbed, disturbed)]
    return {
        "stage": undisturbed.stage,
        "undisturbed": losses[0],
        "disturbed": losses[1],
        "difference": abs(losses[0] - losses[1]),
        "seconds": [outcome.report["seconds"] for outcome in (undisturbed, disturbed)],
    }


def _print(results: dict[str, Any]) -> None:
    from jobs.checkpoints import print_table

    print_table(
        "final loss of every stage",
        ["stage", "undisturbed", "nodes lost", "difference"],
        [
            [row["stage"], f"{row['undisturbed']:.6f}", f"{row['disturbed']:.6f}", f"{row['difference']:.1e}"]
            for row in results["stages"]
        ],
    )
    for loss in results["lost"]:
        what = "training worker" if loss["with"] == "RayTrainWorker" else "actor that rolled out"
        plural = "s" if loss["actors"] != 1 else ""
        print(
            f"a node was lost after {loss['at_seconds']:.0f} s, with {loss['actors']} {what}{plural}", file=sys.stderr
        )
    if len(results["lost"]) < results["expected_losses"]:
        print(
            "NOT ALL NODES WERE LOST: a stage ended before it could happen; more steps or problems help",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
