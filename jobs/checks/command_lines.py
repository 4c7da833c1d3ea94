"""Finds mistakes in the command lines of configurations: shell, Ray's own commands, and the jobs.

Nothing is run. A shell parses the text; the options of ``ray ...`` are held against those of the installed Ray, those
of ``python -m jobs.X`` against the job's.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any

_OPERATORS = {"&&", "||", ";", "|", "&", "(", ")", ";;", "|&", "<", ">", ">>", ">&", "<<"}
_SYMMETRIC = "symmetric-run"


@cache
def command_line_problems(text: str) -> tuple[str, ...]:
    """What is wrong with a shell command or script, in one line each."""
    return tuple(_problems(text))


def _problems(text: str) -> Iterator[str]:
    shell = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False, timeout=30)
    if shell.returncode:
        yield f"no shell command: {' '.join(shell.stderr.split())}"
        return
    for words in _commands(text):
        for index, word in enumerate(words):
            if PurePosixPath(word).name == "ray" and (index == 0 or _may_precede(words[index - 1])):
                yield from _ray_problems(words[index + 1 :])
            if word == "-m" and index + 1 < len(words) and words[index + 1].partition(".")[0] == "jobs":
                yield from _job_problems(words[index + 1], words[index + 2 :])


def _may_precede(word: str) -> bool:
    """Whether a command may follow: after an assignment, a wrapper, or a wrapper's option."""
    return "=" in word or word.startswith("-") or word in ("srun", "exec", "sudo", "nohup", "env", "then", "do", "else")


def _commands(text: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in _OPERATORS:
                yield words
                words = []
            else:
                words.append(word)
        yield words


def _options(words: Sequence[str]) -> list[str]:
    """The long options before ``--``."""
    before = words[: words.index("--")] if "--" in words else words
    return [word.partition("=")[0] for word in before if word.startswith("--")]


@cache
def _ray() -> Any:
    from ray.scripts.scripts import cli

    return cli


def _known(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def _ray_problems(words: Sequence[str]) -> Iterator[str]:
    command, named = _ray(), ["ray"]
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            yield f"{' '.join(named)} {rest[0] if rest else ''}: no such command of the installed Ray"
            return
        named.append(rest[0])
        command = command.commands[rest.pop(0)]
    known = _known(command) | {"--help"}
    if named[-1] == _SYMMETRIC:
        known |= _known(_ray().commands["start"]) - {"--head", "--node-ip-address", "--port", "--block"}
    for option in _options(rest):
        if option not in known:
            yield f"{' '.join(named)} {option}: no such option of the installed Ray"


def _job_problems(module: str, words: Sequence[str]) -> Iterator[str]:
    import typer

    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        yield f"python -m {module}: no such job"
        return
    job = importlib.import_module(module)
    target = getattr(job, "app", None)
    if not isinstance(target, typer.Typer):
        target = typer.Typer(add_completion=False)
        target.command()(job.main)
    command = typer.main.get_command(target)
    known = _known(command) | {"--help"}
    for inner in getattr(command, "commands", {}).values():
        known |= _known(inner)
    for option in _options(words):
        if option not in known:
            yield f"python -m {module} {option}: no such option"
