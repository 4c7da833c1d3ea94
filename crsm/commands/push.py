"""An exported folder, put on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from crsm.commands.options import note


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What crsm export wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The model's repository on the hub.")],
    update: Annotated[bool, typer.Option("--update", help="Replace what an existing repository holds.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; private if not given.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
) -> None:
    """Put an exported folder on the Hugging Face hub.

    The token is that of HF_TOKEN. The same command goes on with an upload that was interrupted. A repository that holds
    anything else is left as it is without --update.
    """
    from crsm.release.hub import push_folder

    url = push_folder(
        folder, repository, os.environ.get("HF_TOKEN", ""), update=update, public=public, message=message, say=note
    )
    print(url)
