"""What this machine and its cluster have and lack."""

from __future__ import annotations

from crsm.commands.options import ConfigOption, JsonOption, SetOption


def doctor(config: ConfigOption = None, overrides: SetOption = None, json: JsonOption = None) -> None:
    """What this machine and its cluster have, what is missing, and the command that mends it.

    Exit status 1 if something is missing that the settings ask for.
    """
    from jobs.command import load_settings, write_result
    from jobs.doctor import State, diagnose, look, show

    settings = load_settings(config, overrides)
    findings = diagnose(look(settings))
    show(findings)
    write_result("doctor", settings, settings.seed, {"findings": findings}, json)
    if any(finding.state is State.MISSING for finding in findings):
        raise SystemExit(1)
