"""What every job and command shares: options, result file, progress, and errors in one line.

A job is a function with typed options::

    def main(
        config: ConfigOption = None, overrides: SetOption = None, seed: SeedOption = None, json: JsonOption = None
    ) -> None:
        \"\"\"The text of --help.\"\"\"
        settings = load_settings(config, overrides, seed)
        import torch  # only now: --help must not wait for it

        with Progress("stage 1", settings.stage_1.steps) as progress:
            progress.update(step, loss=loss)
        write_result("stage_1_backbone", settings, settings.seed, {"loss": loss}, json)

    if __name__ == "__main__":
        run(main)

Importing this module imports neither torch nor Ray. Standard output belongs to the result as soon as ``--json -`` is
parsed: whatever else writes to it, C code and child processes included, goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import json as jsonlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from actors.job_environment import code_version
from crsm import __version__

if TYPE_CHECKING:
    from pydantic import BaseModel

    from crsm.config import Config

ROOT = Path(__file__).resolve().parent.parent


def check_json(value: str | None) -> str | None:
    """Takes standard output for the result, or finds out now, not after an hour, that the file cannot be written."""
    if value == "-":
        _reserve_stdout()
    elif value is not None:
        path = Path(value)
        if path.is_dir():
            raise typer.BadParameter(f"{value!r} is a directory; allowed: a file, or - for standard output")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise typer.BadParameter(f"{value!r} cannot be written")
    return value


ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings (YAML); none: the defaults.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Changes one setting; repeatable, the last one wins."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="INTEGER", help="The settings' seed.")]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", callback=check_json, help="Writes the result; - for standard output."),
]


def load_settings(
    config: str | Path | None = None, overrides: Iterable[str] | None = None, seed: int | None = None
) -> Config:
    """The settings that ``--config``, ``--set`` and ``--seed`` describe; ``--seed`` has the last word on ``seed``."""
    from crsm.config import load_config

    commit()  # of the code that starts; it may be another by the time the result is written
    return load_config(config, [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])])


# ---------------------------------------------------------------------------------------------------------- running


def run(target: Callable[..., object] | typer.Typer, args: Sequence[str] | None = None) -> NoReturn:
    """Runs a job or a Typer application on the command line's arguments and exits with its status."""
    sys.exit(invoke(target, args))


def invoke(target: Callable[..., object] | typer.Typer, args: Sequence[str] | None = None) -> int:
    """Like ``run``, but returns the exit status: 0, what the job returned (an ``int``) or raised, 2 for bad input."""
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False, rich_markup_mode=None)
        target.command(context_settings={"help_option_names": ["-h", "--help"]})(function)
    try:
        with one_line_errors():
            status = typer.main.get_command(target).main(args=args, standalone_mode=False)
            sys.stdout.flush()
    except typer.TyperException as error:
        message = error.format_message()
        # Of several lines is only the help page that a command group shows when it is called without a command.
        print(message if "\n" in message else f"error: {message} (--help lists what is allowed)", file=sys.stderr)
        return 2
    except typer.Abort:
        print("error: aborted", file=sys.stderr)
        return 1
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        print(exit_.code, file=sys.stderr)
        return 1
    finally:
        _release_stdout()
    return status if isinstance(status, int) and not isinstance(status, bool) else 0


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a user's mistake (``ValueError``) or the machine's refusal (``OSError``) into one line and exit status 2.

    Anything else is our mistake and keeps its traceback, and so do these two with ``CRSM_DEBUG=1``. Usable as a
    decorator.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("CRSM_DEBUG"):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def describe(error: BaseException) -> str:
    """An error in one line; of one that crossed a process (it has a ``cause``) the cause, not the far traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return describe(cause)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# ----------------------------------------------------------------------------------------------------------- result

_stdout: TextIO | None = None
"""The real standard output while everything else is sent to standard error."""
_restore_stdout: Callable[[], None] | None = None


def _reserve_stdout() -> None:
    global _stdout, _restore_stdout
    if _stdout is not None:
        return
    before = sys.stdout
    before.flush()
    try:
        descriptor = before.fileno()
    except (OSError, ValueError):  # a stream in memory
        _stdout, sys.stdout = before, sys.stderr

        def restore() -> None:
            sys.stdout = before

    else:
        saved = os.dup(descriptor)
        _stdout = open(saved, "w", encoding="utf-8", closefd=False)
        os.dup2(sys.stderr.fileno(), descriptor)

        def restore() -> None:
            before.flush()
            os.dup2(saved, descriptor)
            os.close(saved)

    _restore_stdout = restore


def _release_stdout() -> None:
    global _stdout, _restore_stdout
    if _stdout is not None and _restore_stdout is not None:
        with contextlib.suppress(OSError):  # reported when it was written
            _stdout.flush()
        _restore_stdout()
    _stdout = _restore_stdout = None


def write_result(
    job: str,
    config: BaseModel | Mapping[str, Any],
    seed: int,
    results: Mapping[str, Any],
    json_path: str | Path | None,
) -> dict[str, Any]:
    """Writes the one object that describes a run, and returns it.

    Args:
        json_path: a file, replaced as a whole or not at all; ``-`` for standard output; None to write nothing.

    Numbers may be NumPy's or torch's. NaN and infinity, which JSON lacks, become null.

    Raises:
        OSError: naming the file; what was there before is untouched.
    """
    record = {
        "job": job,
        "commit": commit(),
        "config": _plain(config),
        "seed": seed,
        "machine": machine(),
        "results": _plain(results),
    }
    if json_path is None:
        return record
    text = jsonlib.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(json_path) == "-":
        stream = _stdout or sys.stdout
        stream.write(text)
        stream.flush()
    else:
        write_atomically(json_path, text)
    return record


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a file so that a reader, also after a crash or on a full disk, finds the old or the new one whole."""
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file():  # a device or a pipe: there is nothing to replace
            path.write_text(text, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@functools.cache
def commit() -> str:
    """Commit of the running code (``-dirty`` if tracked files are changed); where it is no checkout, the version, with
    what a submitted job knows of its code.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        top, head = _output([*git, "rev-parse", "--show-toplevel", "HEAD"]).split()
        if Path(top).resolve() != ROOT:  # installed into somebody else's repository
            return __version__
        return head + ("-dirty" if _output([*git, "status", "--porcelain", "--untracked-files=no"]).strip() else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        submitted = code_version()
        return __version__ if submitted is None else f"{__version__} ({submitted})"


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


def machine() -> dict[str, Any]:
    """What the figures were measured on: ``cpu``, ``cores`` (that this process may use), ``gpu`` or None, ``torch``."""
    import torch

    from crsm.config import core_count

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": core_count(), "gpu": gpu, "torch": torch.__version__}


def _cpu_name() -> str:
    import platform

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """The value as JSON knows it."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return _plain(value.tolist())
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no place in a result")


# --------------------------------------------------------------------------------------------------------- progress


class Progress:
    """How far a long job is, on standard error: a live bar on a terminal, a line now and then elsewhere.

    Use it as a context manager, one at a time. ``done`` counts whatever ``total`` counts.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        begun: int = 0,
        stream: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total: None where the end is not known.
            begun: done before, by an earlier start: no measure of how fast this one is.
            stream: default: standard error.
            interval: seconds between plain lines; the first and the last state are always shown.
        """
        self.title, self.total, self.begun = title, total, begun
        self._stream, self._interval, self._clock = stream or sys.stderr, interval, clock
        self._started = self._shown_at = clock()
        self._line: str | None = None
        """A state that has not been shown yet."""
        self._any_shown = False
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._started = self._clock()
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[figures]}", markup=False),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.begun, figures="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._line is not None:
            self._print(self._line)

    def update(self, done: int, **figures: float | str) -> None:
        """Shows that ``done`` of ``total`` are done, and figures by name: ``update(step, loss=0.31)``."""
        text = ", ".join(f"{name} {_figure(value)}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=text)
            return
        now = self._clock()
        elapsed = now - self._started
        parts = [f"{self.title}: {done}" + ("" if self.total is None else f"/{self.total}"), f"{elapsed:.0f} s"]
        if self.total is not None and self.begun < done < self.total:
            parts.append(f"about {elapsed / (done - self.begun) * (self.total - done):.0f} s left")
        self._line = ", ".join([*parts, *([text] if text else [])])
        if not self._any_shown or now - self._shown_at >= self._interval:
            self._print(self._line)
            self._line, self._shown_at, self._any_shown = None, now, True

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _figure(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
