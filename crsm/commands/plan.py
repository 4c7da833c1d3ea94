"""What training a config takes on given devices, and whether it fits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crsm.commands.options import JsonOption, SetOption

if TYPE_CHECKING:
    from crsm.scaling.plan import Plan


def plan(
    config: Annotated[Path, typer.Argument(help="Settings (YAML).", show_default=False)],
    gpus: Annotated[
        str,
        typer.Option("--gpus", metavar="COUNTxNAME", help="Devices: 8xH100, 64xA100-80, 2xcpu:12GB (memory of each)."),
    ],
    utilisation: Annotated[
        float, typer.Option("--utilisation", help="Operations that are done, over the devices' peak.")
    ] = 0.4,
    overrides: SetOption = None,
    json: JsonOption = None,
) -> int:
    """Plan stage 1: parameters, memory, communication, time; exit status 1 if it does not fit.

    One worker a device. Nothing is built, and no device is asked.
    """
    from crsm.scaling.devices import parse_devices
    from crsm.scaling.plan import make_plan, refusal
    from jobs.command import load_settings, write_result

    settings = load_settings(config, overrides)
    made = make_plan(settings, *parse_devices(gpus), utilisation=utilisation)
    _show(made)
    line = None if made.fits else refusal(made)
    write_result("plan", made.config, made.config.seed, made.as_dict() | {"refusal": line}, json)
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


def _show(plan: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    train = plan.config.train
    title = f"{plan.config.name} on {plan.devices} {plan.device.name}, {train.strategy}, {train.precision}"
    checkpointed = ", activations checkpointed" if train.checkpoint_activations else ""
    drawn = Table(title=Text(f"{title}{checkpointed}", "bold"), title_justify="left", box=box.SIMPLE, show_header=False)
    drawn.add_column()
    drawn.add_column(justify="right")
    for section in (_parameter_rows(plan), _work_rows(plan), _memory_rows(plan), _time_rows(plan)):
        for what, value in section:
            drawn.add_row(Text(what), Text(value))
        drawn.add_section()
    console.print(drawn)
    for remark in plan.notes:
        console.print(Text(remark))


_Rows = list[tuple[str, str]]


def _parameter_rows(plan: Plan) -> _Rows:
    counts = plan.parameters
    return [
        *((f"parameters, {part}", f"{count:,}") for part, count in counts.items() if count),
        ("parameters", f"{sum(counts.values()):,}"),
        ("trained by stage 1", f"{plan.trained:,}"),
    ]


def _work_rows(plan: Plan) -> _Rows:
    stage, work = plan.config.stage_1, plan.workload
    return [
        ("rows of a step", f"{stage.batch:,} in {stage.optimizer.accumulate} micro-batches"),
        ("tokens of a step", f"{work.step_tokens:,.0f}"),
        ("fullest micro-batch of a device", ", ".join(f"{g.rows} x {g.length} {g.name}" for g in work.groups)),
        ("tokens of stage 1", f"{plan.speed.tokens / 1e9:.3g} billion in {stage.steps:,} steps"),
    ]


def _memory_rows(plan: Plan) -> _Rows:
    from crsm.scaling.devices import GB

    memory = plan.memory
    return [
        *((f"{kind}, GB", f"{size / GB:.3f}") for kind, size in memory.parts.items()),
        (f"peak of a device, GB ({memory.moment})", f"{memory.peak / GB:.3f}"),
        (
            f"there is room for, GB ({plan.device.usable:.0%} of {plan.device.memory / GB:g})",
            f"{plan.device.room / GB:.3f}",
        ),
        ("peak with all activations kept, GB", f"{plan.memory_kept.peak / GB:.3f}"),
        ("peak with activations checkpointed, GB", f"{plan.memory_checkpointed.peak / GB:.3f}"),
        (
            f"peak of an evaluation, GB ({plan.memory_evaluated.moment})",
            f"{plan.memory_evaluated.peak / GB:.3f}",
        ),
        ("saved state of the training, GB", f"{plan.state_bytes / GB:.3f}"),
        ("finished checkpoint in fp32, GB", f"{plan.checkpoint_bytes / GB:.3f}"),
    ]


def _time_rows(plan: Plan) -> _Rows:
    from crsm.scaling.devices import GB

    sent, speed = plan.communication, plan.speed
    parts = {
        "all-reduce of gradients": sent.all_reduce,
        "all-gather of weights": sent.all_gather,
        "reduce-scatter of gradients": sent.reduce_scatter,
    }
    rows = [(f"sent by a device in a step: {name}, GB", f"{size / GB:.3f}") for name, size in parts.items() if size]
    rows.append(("operations of a token, billions", f"{speed.flops_per_token / 1e9:.3f}"))
    if speed.tokens_per_second is None or speed.step_seconds is None or speed.days is None:
        return [*rows, ("tokens per second", "not known: no peak for this device")]
    return [
        *rows,
        (f"tokens per second at {plan.utilisation:.0%} of the peak", f"{speed.tokens_per_second:,.0f}"),
        ("seconds of a step", f"{speed.step_seconds:.3f}"),
        ("GB/s of a device that hide what is sent", f"{sent.total / speed.step_seconds / GB:.1f}"),
        ("days of stage 1", f"{speed.days:.3g}"),
    ]
