"""Options and ways of saying things that commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def _json_target(value: str | None) -> str | None:
    from jobs.command import check_json

    return check_json(value)


CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", metavar="NAME", help="A checkpoint's folder, or the name of a shipped one.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings (YAML) on top of the checkpoint's own.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Changes one setting; repeatable, the last one wins."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, metavar="INTEGER", help="The settings' seed.")]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", callback=_json_target, help="Writes the result; - for standard output."),
]


def note(line: str) -> None:
    """Beside the result: on standard error."""
    print(line, file=sys.stderr, flush=True)
