"""What a checkpoint is made of, and what is known about it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from crsm.commands.options import JsonOption


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or the name of a shipped one.")] = "nano",
    messages: Annotated[
        bool, typer.Option("--messages", help="Only sizes of messages, beside those of public models, as Markdown.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Show what a checkpoint is made of and what is known about it."""
    from crsm.evaluation.inspection import inspect_checkpoint, public_message_sizes
    from crsm.model import load_checkpoint
    from jobs.command import write_result

    loaded = load_checkpoint(checkpoint)
    if messages:
        sizes = public_message_sizes(checkpoint, loaded.config.model)
        _print_messages(sizes)
        write_result("inspect", loaded.config, loaded.config.seed, {"messages": sizes}, json)
        return
    results = inspect_checkpoint(loaded)
    _print_inspection(checkpoint, results)
    write_result("inspect", loaded.config, loaded.config.seed, results, json)


def _print_messages(sizes: dict[str, dict[str, dict[str, int]]]) -> None:
    columns = [f"{what}, {wire}" for what, by_wire in next(iter(sizes.values())).items() for wire in by_wire]
    print(f"| bytes | {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * len(columns))
    for name, row in sizes.items():
        print(f"| {name} | {' | '.join(f'{size:,}' for by_wire in row.values() for size in by_wire.values())} |")


def _print_inspection(name: str, results: dict[str, Any]) -> None:
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

    table(
        f"{name}: parts",
        ["part", "parameters", "bytes"],
        [[part, f"{size['parameters']:,}", f"{size['bytes']:,}"] for part, size in results["parts"].items()],
    )
    table("sizes in bytes", ["what", "bytes"], [[what, f"{size:,}"] for what, size in results["bytes"].items()])
    # A row per layer: models may have many.
    layers = results["layers"]
    table(
        "per layer",
        ["layer", *(what.replace("_", " ") for what in layers)],
        [
            [str(layer), *(f"{value:.3f}" for value in values)]
            for layer, values in enumerate(zip(*layers.values(), strict=True))
        ],
    )
    for task, steps in results["fidelity"].items():
        table(
            f"world model on {task}, by imagined steps",
            ["steps", "policy KL (nats)", "value error", "cosine", "branch accuracy"],
            [
                [
                    str(int(step["step"])),
                    *(
                        "–" if step[key] is None else f"{step[key]:.3f}"
                        for key in ("policy_kl", "value_error", "cosine", "branch_accuracy")
                    ),
                ]
                for step in steps
            ],
        )
    facts = [[what, str(value)] for what, value in results["facts"].items()]
    table("known about it", ["what", "value"], facts)
