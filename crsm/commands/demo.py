"""System 1 and System 2 side by side on fresh problems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crsm.commands.options import CheckpointOption, ConfigOption, JsonOption, SeedOption, SetOption


def demo(
    checkpoint: CheckpointOption = "nano",
    problems: Annotated[int, typer.Option("--problems", min=1, help="Fresh test problems of each task.")] = 200,
    pace: Annotated[float, typer.Option("--pace", min=0.1, help="Tokens per second by the wall clock.")] = 10.0,
    actors: Annotated[
        bool, typer.Option("--actors/--threads", help="The planner as a Ray actor, or as a thread of this process.")
    ] = True,
    figure: Annotated[
        Path, typer.Option("--figure", metavar="FILE", help="Where the picture goes (PNG, SVG, PDF).")
    ] = Path("runs/demo/demo.png"),
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """System 1 and System 2 side by side on fresh problems: a table and a picture.

    Accuracy by the virtual clock, which no machine's speed can change; then some answers by the wall clock, where
    planners must not delay a token. Exit status 1 if they did, or if no plan was written.
    """
    from crsm.evaluation.demo import run_demo
    from crsm.evaluation.figures import check_figure_path
    from jobs.checkpoints import limit_threads, load_with_settings
    from jobs.command import write_result
    from jobs.demo import demo_planners

    loaded = load_with_settings(checkpoint, config, overrides, seed)
    check_figure_path(figure)
    limit_threads()
    with demo_planners(loaded, actors) as (planners, kind):
        results, status = run_demo(loaded, planners, problems, pace, figure)
    write_result("demo", loaded.config, loaded.config.seed, {"planners": kind, **results}, json)
    if status:
        raise SystemExit(status)
