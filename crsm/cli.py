"""The command ``crsm``. Parses first: torch and Ray are imported once a command knows what to do."""

from __future__ import annotations

from typing import Annotated

import typer

from crsm import __version__
from crsm.commands.demo import demo
from crsm.commands.doctor import doctor
from crsm.commands.export import export
from crsm.commands.generate import generate
from crsm.commands.import_ import import_
from crsm.commands.inspect import inspect
from crsm.commands.plan import plan
from crsm.commands.push import push
from crsm.commands.replay import replay
from crsm.commands.serve import serve

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Continuous Reasoning State Models: a language model that thinks while it speaks.",
)


def main() -> None:
    """The entry point ``crsm``."""
    from jobs.command import run

    run(app)


def _version(value: bool) -> None:
    if value:
        print(f"crsm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (generate, replay, inspect, demo, serve, doctor, plan, export, push):
    app.command()(command)
app.command("import")(import_)


if __name__ == "__main__":
    main()
