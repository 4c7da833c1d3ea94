"""System 1 against System 2 with all controls, on the same problems and seeds, by the virtual clock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import (
    CheckpointOption,
    PlannerKind,
    limit_threads,
    load_with_settings,
    pick_task,
    planner_factory,
    print_table,
)
from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, run, write_result

if TYPE_CHECKING:
    from crsm.model import Checkpoint
    from crsm.tasks.base import Problem, Task


def main(
    checkpoint: CheckpointOption = "nano",
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="A task of the checkpoint.")] = "path_star",
    problems: Annotated[int, typer.Option("--problems", min=1, help="Fresh test problems.")] = 500,
    lag: Annotated[
        list[str] | None,
        typer.Option("--lag", metavar="LAGS", help="Tokens between request and target; repeatable, or 0,1,2."),
    ] = None,
    planners: Annotated[PlannerKind, typer.Option("--planners", help="Where System 2 runs.")] = PlannerKind.INLINE,
    controls: Annotated[
        str, typer.Option("--controls", metavar="NAMES", help="all, none, or names with commas between them.")
    ] = "all",
    compute: Annotated[
        bool, typer.Option("--compute", help="Also accuracy against compute, beside best-of-N and beam search.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="A picture of --compute (PNG, SVG, PDF).")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Compare System 1 with System 2, and with every control, on fresh problems of one task.

    The settings are those of the checkpoint; --config and --set change them (--set tasks.path_star.arms=2,
    --set search.simulations=16, --set deliberation.max_plans=1). Everything but tokens per second is the same on every
    run: torch uses one thread, and the virtual clock hands every plan over at its target.
    """
    lags = parse_lags(lag)
    if figure is not None and not compute:
        raise ValueError(f"--figure {str(figure)!r} draws what --compute measures; allowed: together with --compute")
    if figure is not None:
        from crsm.evaluation.figures import check_figure_path

        check_figure_path(figure)
    loaded = load_with_settings(checkpoint, config, overrides, seed)
    settings = loaded.config
    judge = pick_task(settings, task)
    names = parse_controls(controls)
    threads = limit_threads()

    from crsm.tasks.base import problems as draw

    fresh = draw(judge, settings.seed, "test", problems)
    compared = _compare(loaded, judge, fresh, lags or [settings.deliberation.lag], planners, names)
    results: dict[str, Any] = {
        "checkpoint": {"name": checkpoint, "weights": loaded.weights_hash, "version": loaded.model_version},
        "threads": threads,
        "planners": planners.value,
        **compared[0],
    }
    if len(compared) > 1:
        results["lags"] = compared
    for result in compared:
        _print_comparison(result)
    if compute:
        results["compute"] = _compute(loaded, judge, fresh, compared[0]["lag"], figure)
    write_result("benchmark_reasoning", settings, settings.seed, results, json)


def parse_lags(texts: list[str] | None) -> list[int]:
    """Lags from ``["1"]``, ``["0", "1"]`` or ``["0,1,2"]``; each once, in order; empty without any.

    Raises:
        ValueError: naming the part that is no lag.
    """
    lags: list[int] = []
    for part in (part.strip() for text in texts or () for part in text.split(",")):
        if not part.isdecimal():
            raise ValueError(f"lag = {part!r}; allowed: whole numbers from 0 on, with commas between them")
        if int(part) not in lags:
            lags.append(int(part))
    return lags


def parse_controls(text: str) -> tuple[str, ...]:
    """Names of controls from ``all``, ``none`` or ``gate_zero,oracle``.

    Raises:
        ValueError: naming the part that is no control.
    """
    from crsm.evaluation.comparison import CONTROLS

    if text in ("all", "none"):
        return CONTROLS if text == "all" else ()
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in CONTROLS:
            raise ValueError(f"control {name!r}; allowed: all, none, {', '.join(CONTROLS)}")
    return names


def _compare(
    checkpoint: Checkpoint,
    task: Task,
    problems: list[Problem],
    lags: list[int],
    kind: PlannerKind,
    controls: tuple[str, ...],
) -> list[dict[str, Any]]:
    from crsm.evaluation.comparison import compare

    settings = checkpoint.config
    compared: list[dict[str, Any]] = []
    with (
        planner_factory(kind, checkpoint) as make_planners,
        Progress(f"{task.name}, {len(problems)} problems", len(lags) * (2 + len(controls))) as progress,
    ):
        done = 0

        def report(name: str, accuracy: float) -> None:
            nonlocal done
            done += 1
            progress.update(done, **{name: accuracy})

        for lag in lags:
            compared.append(
                compare(
                    checkpoint,
                    task,
                    problems,
                    deliberation=settings.deliberation.model_copy(update={"lag": lag}),
                    search=settings.search,
                    sampling=settings.sampling.model_copy(update={"seed": settings.seed}),
                    seed=settings.seed,
                    make_planners=make_planners,
                    controls=controls,
                    on_progress=report,
                )
            )
    return compared


def _print_comparison(result: dict[str, Any]) -> None:
    rows = [
        (name, figures)
        for name, figures in (("System 1", result["system1"]), ("System 2", result["system2"]), *_controls(result))
    ]
    print_table(
        f"{result['task']}, {result['problems']} problems, lag {result['lag']}",
        ["", "accuracy", "95 % interval"],
        ((name, f"{f['accuracy']:.3f}", _interval(f["interval"])) for name, f in rows),
    )
    speed, gap = result["tokens_per_second"], result["difference"]
    identical = result["controls"].get("gate_zero", {}).get("identical")
    print(
        f"difference {gap['accuracy']:+.3f} ({_interval(gap['interval'], '+.3f')}), "
        f"McNemar p {result['mcnemar_p']:.2g}, plan hit rate {result['plan_hit_rate']:.3f}, "
        f"tokens/s {speed['system1']:,.0f} and {speed['system2']:,.0f}"
        + ("" if identical is None else f", gate zero identical: {'yes' if identical else 'NO'}"),
        file=sys.stderr,
    )


def _controls(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"  {name.replace('_', ' ')}", figures) for name, figures in result["controls"].items()]


def _interval(interval: tuple[float, float], form: str = ".3f") -> str:
    return f"{interval[0]:{form}} … {interval[1]:{form}}"


def _compute(
    checkpoint: Checkpoint, task: Task, problems: list[Problem], lag: int, figure: Path | None
) -> dict[str, Any]:
    from crsm.evaluation.equal_compute import accuracy_against_compute

    with Progress("accuracy against compute") as progress:
        done = 0

        def report(name: str, accuracy: float) -> None:
            nonlocal done
            done += 1
            progress.update(done, **{name: accuracy})

        curves = accuracy_against_compute(
            checkpoint, task, problems, lag=lag, seed=checkpoint.config.seed, on_progress=report
        )
    rows = []
    for method, points in curves["methods"].items():
        for point in points:
            rows.append(
                (
                    f"{method.replace('_', ' ')}, {point['budget']}",
                    f"{point['accuracy']:.3f}",
                    _interval(point["interval"]),
                    f"{point['multiply_adds'] / 1e6:.2f} M",
                    f"{point['samples']:.2f}",
                )
            )
    print_table(
        f"{task.name}: accuracy against compute after the prompt, lag {lag}, one plan per answer",
        ["method, budget", "accuracy", "95 % interval", "multiply-adds", "costs as samples"],
        rows,
    )
    for pair in curves["against_best_of"]:
        print(
            f"{pair['simulations']} simulations beside best of {pair['best_of']} at {pair['times_the_cost']:.2f} times "
            f"the cost: {pair['difference']:+.3f}, McNemar p {pair['mcnemar_p']:.2g}"
        )
    if figure is not None:
        from crsm.evaluation.figures import compute_figure, save_figure

        save_figure(compute_figure(curves), figure)
        print(f"picture: {figure}", file=sys.stderr)
    return curves


if __name__ == "__main__":
    run(main)
