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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

    def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
        drawn = Table(title=Text(title, "bold"), title_justify="left")
        for index, column in enumerate(columns):
            drawn.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)

    config, train, stage = plan.config, plan.config.train, plan.config.stage_1
    counts = plan.parameters
    table(
        f"{config.name}: parameters",
        ["part", "parameters"],
        [
            *([part, f"{count:,}"] for part, count in counts.items() if count),
            ["together", f"{sum(counts.values()):,}"],
            ["trained by stage 1", f"{plan.trained:,}"],
        ],
    )
    groups = ", ".join(f"{group.rows} of {group.length} ({group.name})" for group in plan.workload.groups)
    table(
        f"on {plan.devices} {plan.device.name}, {train.strategy}, {train.precision}",
        ["workload of stage 1", ""],
        [
            ["rows of a step", f"{stage.batch:,} in {stage.optimizer.accumulate} micro-batches"],
            ["tokens of a step", f"{plan.workload.step_tokens:,.0f}"],
            ["fullest micro-batch of a device", groups],
            ["tokens of the stage", f"{plan.speed.tokens / 1e9:.2f} billion in {stage.steps:,} steps"],
        ],
    )
    table("memory of a device, at its peak", ["what", "GB"], _memory_rows(plan))
    table("communication and time", ["what", ""], _time_rows(plan))
    for note in plan.workload.notes:
        console.print(Text(note))


def _memory_rows(plan: Plan) -> list[list[str]]:
    from crsm.scaling.devices import GB

    memory = plan.memory
    return [
        *([kind, f"{size / GB:.3f}"] for kind, size in memory.parts.items()),
        [f"together ({memory.moment})", f"{memory.peak / GB:.3f}"],
        [f"allowed: {plan.device.usable:.0%} of {plan.device.memory / GB:g}", f"{plan.device.room / GB:.3f}"],
        ["peak if all activations are kept", f"{plan.memory_kept.peak / GB:.3f}"],
        ["peak if they are checkpointed", f"{plan.memory_checkpointed.peak / GB:.3f}"],
    ]


def _time_rows(plan: Plan) -> list[list[str]]:
    from crsm.scaling.devices import GB

    sent, speed = plan.communication, plan.speed
    rows = [["sent by a device in a step", f"{sent.total / GB:.3f} GB"]]
    for name, size in (
        ("all-reduce of gradients", sent.all_reduce),
        ("all-gather of weights", sent.all_gather),
        ("reduce-scatter of gradients", sent.reduce_scatter),
    ):
        if size:
            rows.append([f"  {name}", f"{size / GB:.3f} GB"])
    rows.append(["operations of a token", f"{speed.flops_per_token / 1e9:.3f} billion"])
    if speed.tokens_per_second is None or speed.step_seconds is None or speed.days is None:
        rows.append(["tokens per second", "not known: no peak for this device"])
    else:
        rows += [
            [f"tokens per second at {plan.utilisation:.0%} of the peak", f"{speed.tokens_per_second:,.0f}"],
            ["seconds of a step", f"{speed.step_seconds:.3f}"],
            ["to be sent meanwhile, to hide it", f"{sent.total / speed.step_seconds / GB:.1f} GB/s"],
            ["days of stage 1", f"{speed.days:.2f}"],
        ]
    return [
        *rows,
        ["saved state of the training", f"{plan.state_bytes / GB:.2f} GB"],
        ["finished checkpoint, fp32", f"{plan.checkpoint_bytes / GB:.2f} GB"],
    ]
