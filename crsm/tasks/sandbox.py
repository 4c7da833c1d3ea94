"""Foreign scorers in child processes: what they can do to this machine, and for how long, is limited by the kernel.

A scorer of another library may run the text that it scores. So it runs in a process of its own, forked for one answer
from a *nursery* that has imported it and has never seen an answer (``sandbox_child``). Guaranteed on Linux (x86-64 and
arm64), root or not; anywhere else nothing is scored:

* no socket, no new program or process, no signal to another process, no file opened for writing, renamed or removed:
  a seccomp filter lets through only the system calls of a computation;
* time and memory: a process that is not done in time is killed, one that asks for more memory is refused it;
* one answer cannot touch the scoring of another: its process is gone with it.

Not guaranteed: files can be read (what is read can go nowhere), and text that a scorer runs can claim any score. So a
scorer that runs text belongs on no list of allowed ones.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MAX_PAYLOAD = 1 << 20
"""Bytes of a request; an answer that makes it longer is not scored."""
_START_SECONDS = 120.0
_GRACE_SECONDS = 10.0
"""For the nursery beyond the time of the scorer, before it is given up."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of scoring one answer."""

    score: float
    error: str | None = None
    """Why there is no score; the score is 0 then."""


class Sandbox:
    """A scorer behind limits. Starts with the first answer; may be used from several threads, and pickled.

    Args:
        target: the scorer as ``module:function``; it takes the payload and returns a float.
        seconds: for one answer, by the wall clock and of processor time.
        memory_mb: what one answer may add to the address space.
    """

    def __init__(self, target: str, seconds: float, memory_mb: int) -> None:
        self._arguments = (target, seconds, memory_mb)
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._rest = b""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return Sandbox, self._arguments

    def score(self, payload: dict[str, Any]) -> Verdict:
        """Scores one answer.

        Args:
            payload: what the scorer is called with; plain data.

        Raises:
            ValueError: scorers cannot be run on this machine, or the scorer cannot be imported.
        """
        request = json.dumps(payload).encode() + b"\n"
        if len(request) > MAX_PAYLOAD:
            return Verdict(0.0, f"the answer is longer than {MAX_PAYLOAD} bytes")
        with self._lock:
            process = self._nursery()
            assert process.stdin is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                reply = json.loads(self._line(self._arguments[1] + _GRACE_SECONDS))
            except (OSError, ValueError):
                self._stop()
                return Verdict(0.0, "the scorer's process is gone")
            return Verdict(float(reply["score"]), reply["error"])

    def close(self) -> None:
        """Ends the nursery."""
        with self._lock:
            self._stop()

    def _nursery(self) -> subprocess.Popen[bytes]:
        # After a fork the pipes belong to the process that opened them.
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        if self._owner == os.getpid():
            self._stop()
        target, seconds, memory_mb = self._arguments
        # No secret of this process's environment is passed on, and no thread is started by a library.
        environment = {
            "PATH": os.defpath,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "crsm.tasks.sandbox_child", target, str(seconds), str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._owner, self._rest = os.getpid(), b""
        try:
            ready = json.loads(self._line(_START_SECONDS))
        except (OSError, ValueError):
            ready = {"error": "its process ended at once"}
        if ready["error"] is not None:
            self._stop()
            raise ValueError(f"scorer {target!r} cannot be run: {ready['error']}")
        return self._process

    def _line(self, seconds: float) -> bytes:
        """The next line of the nursery; an OSError if there is none in time."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poller = select.poll()  # select() knows no descriptor above 1023
        poller.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise OSError("no reply in time")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise OSError("no reply")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        process.wait()
