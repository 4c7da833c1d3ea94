"""Do several workers do what one does? Losses of DDP, of FSDP and of runs whose workers change, beside one worker's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, load_settings, run, write_result
from jobs.local_workers import Leg, train

if TYPE_CHECKING:
    from crsm.config import Config

TINY = (
    "model.backbone={d_model: 32, n_layer: 3, d_state: 8, headdim: 16, chunk_size: 16}",
    "model.world_model={width: 16, decoder_width: 16}",
    "model.writer.width=16",
    "tasks=[{name: path_star, arms: 3, length: 4, labels: 30}, {name: tree_path, depth: 2, labels: 30, weight: 0.3}]",
    "stage_1={batch: 18, evaluate_problems: 8, optimizer: {accumulate: 2, warmup: 5}}",
    "stage_2={batch: 10, evaluate_problems: 8, unroll: 4, optimizer: {warmup: 5}}",
    "stage_4={batch: 40, evaluate_problems: 8, optimizer: {warmup: 5}}",
)
"""Two tasks, and batches that no number of workers divides: of the second task some workers have no row."""
STAGES = ("stage_1", "stage_2", "stage_4")


def main(
    stage: Annotated[
        list[str] | None, typer.Option("--stage", metavar="NAME", help="Repeatable; stages 1, 2 and 4 if none.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=2, help="Beside the one.")] = 2,
    steps: Annotated[int, typer.Option("--steps", min=6)] = 50,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Verify workers: the largest difference of a step's loss from that of one worker, at the same global batch.

    On this machine's CPU, by gloo, from a new model; without --config a tiny one. The last line of a stage is a run
    whose workers become fewer and more, and change from shards to copies and back.
    """
    changes = [*(() if config else TINY), *(overrides or ())]
    names = stage or list(STAGES)
    for name in names:
        if name not in STAGES:
            raise ValueError(f"stage = {name!r}; allowed: {', '.join(STAGES)}")
        once = {"steps": steps, "log_every": 1, "evaluate_every": 10 * steps, "checkpoint_every": 10 * steps}
        changes += [f"{name}.{key}={value}" for key, value in once.items()]
    settings = load_settings(config, changes, seed)
    results: dict[str, Any] = {"workers": workers, "steps": steps, "stages": {}}
    runs = legs(workers, steps)
    done = 0
    with Progress("verify workers", len(names) * (1 + len(runs))) as progress:
        for name in names:
            alone = losses(settings, name, [Leg()])
            found = results["stages"][name] = {"first loss": alone[0], "last loss": alone[-1], "difference": {}}
            for how, row in runs.items():
                found["difference"][how] = largest_difference(losses(settings, name, row), alone)
                done += 1
                progress.update(done + names.index(name) + 1)
    for name, found in results["stages"].items():
        print(f"{name}: {steps} steps, loss {found['first loss']:.4f} to {found['last loss']:.4f} with one worker")
        for how, difference in found["difference"].items():
            print(f"  {how:<44} differs by at most {difference:.1e}")
    write_result("verify_workers", settings, settings.seed, results, json)


def legs(workers: int, steps: int) -> dict[str, list[Leg]]:
    """What is compared with one worker, by a description."""
    third = steps // 3
    changing = [Leg(2, "fsdp", third), Leg(1, "ddp", 2 * third), Leg(4, "fsdp", 2 * third + 2), Leg(2, "ddp")]
    return {
        f"{workers} workers, ddp": [Leg(workers, "ddp")],
        f"{workers} workers, fsdp": [Leg(workers, "fsdp")],
        "2 (fsdp), then 1, then 4 (fsdp), then 2 (ddp)": changing,
    }


def largest_difference(found: list[float], wanted: list[float]) -> float:
    return max(abs(left - right) for left, right in zip(found, wanted, strict=True))


def losses(settings: Config, stage: str, row: list[Leg]) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="crsm-workers-") as folder:
        return train(settings, stage, row, Path(folder))


if __name__ == "__main__":
    run(main)
