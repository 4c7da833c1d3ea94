"""A peer in a process of its own, driven by lines of JSON: it may need another interpreter, and keeps its own threads.

A worker is a script that runs with the peer's interpreter, imports nothing of ours, and answers every line of its
standard input with one line on its standard output: a result, or ``{"error": ...}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import jobs


class PeerError(Exception):
    """The peer is not there or failed; the message says what to do or what happened. Its rows say so."""


def peer_environment() -> dict[str, str]:
    """The environment without what ``jobs/__init__.py`` sets: a peer runs as its users would run it."""
    return {name: value for name, value in os.environ.items() if name not in jobs.ENVIRONMENT}


class WorkerProcess:
    """Starts a worker; every :meth:`ask` is one question and its answer. Use it as a context manager."""

    def __init__(self, python: str, script: Path, *, threads: int, arguments: tuple[str, ...] = ()) -> None:
        """
        Raises:
            PeerError: the interpreter cannot be started.
        """
        self._errors = tempfile.TemporaryFile("w+")  # not a pipe, which could fill up
        environment = peer_environment() | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)  # ours is no business of another interpreter
        try:
            self._process = subprocess.Popen(
                [python, str(script), str(threads), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"{python}: {error.strerror}") from error

    def ask(self, **question: Any) -> dict[str, Any]:
        """
        Raises:
            PeerError: the worker answered with an error, or is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the peer's process ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._process.wait(timeout=30)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()
