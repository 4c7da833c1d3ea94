"""How exact is it to carry a late write, or one that is to be withdrawn, by the product of the state's decays?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs.checkpoints import CheckpointOption, limit_threads, load_with_settings, pick_task, print_table
from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, run, write_result

LATE = (1, 2, 4, 8)
"""Tokens after the write."""
COLUMNS = ("carried", "fixed", "raw", "late_write", "withdrawn")


def main(
    checkpoint: CheckpointOption = "nano",
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Repeatable; all tasks of the checkpoint if none."),
    ] = None,
    problems: Annotated[int, typer.Option("--problems", min=1, help="Fresh test problems of each task.")] = 200,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Verify the transport of writes: per layer, its error over the size of what the write really changed.

    The solution's next tokens are written before the first answer token. Some tokens later the state is compared with
    that of the same text without the write. In the first layer the difference, carried by the decays, is exact to
    rounding; above it the inputs differ too, and the error says by how much.
    """
    loaded = load_with_settings(checkpoint, config, overrides, seed)
    settings = loaded.config
    tasks = [pick_task(settings, name) for name in task or [entry.name for entry in settings.tasks]]
    threads = limit_threads()

    from crsm.evaluation.steering_audit import lines_of
    from crsm.evaluation.transport import FIXED_DECAY, transport_errors
    from crsm.tasks.base import problems as draw

    results: dict[str, Any] = {
        "checkpoint": {"name": checkpoint, "weights": loaded.weights_hash, "version": loaded.model_version},
        "threads": threads,
        "rate": settings.deliberation.injection_rate,
        "fixed_decay": FIXED_DECAY,
        "tasks": {},
    }
    with Progress("verify transport", len(tasks)) as progress:
        for number, judge in enumerate(tasks, start=1):
            fresh = draw(judge, settings.seed, "test", problems)
            lines = [line for line in lines_of(loaded, judge, fresh, settings.seed) if line.correct]
            # One length of prompt and answer at a time; the graph tasks have no other.
            shape = (len(lines[0].prompt), len(lines[0].answer))
            alike = [line for line in lines if (len(line.prompt), len(line.answer)) == shape]
            rows = transport_errors(loaded, alike, rate=settings.deliberation.injection_rate, late=LATE)
            results["tasks"][judge.name] = {"problems": len(alike), "rows": rows}
            progress.update(number, **{judge.name: f"{len(alike)} problems"})
    for name, result in results["tasks"].items():
        print_table(
            f"{name}, {result['problems']} problems: error over the size of the write's effect",
            ["tokens", "layer", *(column.replace("_", " ") for column in COLUMNS), "heads cut", "norm", "norm after"],
            (
                (
                    str(row["late"]),
                    str(row["layer"]),
                    *(f"{row[column]:.2g}" for column in COLUMNS),
                    *(f"{row[column]:.3f}" for column in ("cut", "norm_written", "norm_withdrawn")),
                )
                for row in result["rows"]
            ),
        )
    write_result("verify_transport", settings, settings.seed, results, json)


if __name__ == "__main__":
    run(main)
