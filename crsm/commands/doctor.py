"""What this machine and its cluster have and lack."""

from __future__ import annotations

from typing import Annotated

import typer

from crsm.commands.options import ConfigOption, JsonOption, SetOption


def doctor(
    config: ConfigOption = None,
    overrides: SetOption = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="A cluster's head; RAY_ADDRESS if not given.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """What this machine and its cluster have, what is missing, and the command that mends it.

    Exit status 1 if something is missing that the settings ask for.
    """
    from jobs.command import load_settings, write_result
    from jobs.doctor import State, diagnose, look, show

    settings = load_settings(config, overrides)
    findings = diagnose(look(settings, address))
    show(findings)
    write_result("doctor", settings, settings.seed, {"findings": findings}, json)
    if any(finding.state is State.MISSING for finding in findings):
        raise SystemExit(1)
