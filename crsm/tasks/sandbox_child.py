"""The nursery of ``sandbox``: imports a scorer, then forks a process with limits for every answer.

Run as ``python -m crsm.tasks.sandbox_child MODULE:FUNCTION SECONDS MEMORY_MB``; a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn


class _Calls(NamedTuple):
    """System calls of one architecture, by the numbers of the kernel's own tables."""

    architecture: int
    seccomp: int
    openat: int
    """Allowed for reading."""
    allowed: tuple[int, ...]
    """read, write, close, stat and its kin, poll, lseek, memory, a process's own signals, identity, time, futex,
    getdents64, exit, readlink, access, getrandom: those of a computation that reads files."""


_CALLS = {
    "x86_64": _Calls(
        architecture=0xC000003E,
        seccomp=317,
        openat=257,
        allowed=(
            *(0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 21, 24, 25, 28, 35, 39, 60, 63, 72, 79, 89),
            *(96, 98, 99, 100, 102, 104, 107, 108, 131, 186, 202, 204, 217, 219, 228, 229, 230, 231, 262, 267, 269),
            *(270, 271, 273, 318, 332, 334, 439),
        ),
    ),
    "aarch64": _Calls(
        architecture=0xC00000B7,
        seccomp=277,
        openat=56,
        allowed=(
            *(17, 25, 48, 57, 61, 62, 63, 64, 67, 72, 73, 78, 79, 80, 93, 94, 98, 99, 101, 113, 114, 115, 123, 124),
            *(128, 132, 134, 135, 139, 153, 160, 165, 169, 172, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226),
            *(233, 278, 291, 293, 439),
        ),
    ),
}

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def main(target: str, seconds: str, memory_mb: str) -> None:
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # What a scorer prints is not a reply.
        os.dup2(null, descriptor)

    def reply(score: float, error: str | None) -> None:
        replies.write(json.dumps({"score": score, "error": error}).encode() + b"\n")
        replies.flush()

    try:
        if sys.platform != "linux" or platform.machine() not in _CALLS:
            raise OSError(f"{platform.system()} on {platform.machine()}; allowed: Linux on x86-64 or arm64")
        module, _, function = target.partition(":")
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:
        reply(0.0, f"{type(error).__name__}: {error}")
        return
    # A trial, so that a machine without the filter is known before anything is scored.
    score, reason = _in_child(lambda payload: 1.0, None, float(seconds), int(memory_mb))
    if score != 1.0:
        reply(0.0, reason or "no score")
        return
    reply(0.0, None)
    for line in requests:
        reply(*_in_child(scorer, json.loads(line), float(seconds), int(memory_mb)))


def _in_child(scorer: Callable[[Any], float], payload: Any, seconds: float, memory_mb: int) -> tuple[float, str | None]:
    """The score of one answer by a process of its own, or why there is none."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        _score(scorer, payload, seconds, memory_mb, into)
    os.close(into)
    deadline = time.monotonic() + seconds
    poller = select.poll()
    poller.register(out, select.POLLIN)
    said = b""
    while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        piece = os.read(out, 64)
        if not piece:
            break
        said += piece
        if len(said) > 64:
            break
    late = time.monotonic() >= deadline
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.close(out)
    os.waitpid(child, 0)
    if said[:1] == b"=":
        try:
            score = float(said[1:])
        except ValueError:
            score = math.nan
        return (score, None) if math.isfinite(score) else (0.0, "the score is no number")
    if late:
        return 0.0, f"not scored within {seconds:g} s"
    return 0.0, said[1:].decode("ascii", "replace") if said[:1] == b"!" else "its process ended without a score"


def _score(scorer: Callable[[Any], float], payload: Any, seconds: float, memory_mb: int, into: int) -> NoReturn:
    said = b"!"
    try:
        keep = os.dup2(into, 3)
        os.closerange(keep + 1, 1 << 16)  # The pipes to the parent among them.
        _limit(seconds, memory_mb)
        said = b"=%r" % float(scorer(payload))
    except BaseException as error:
        said = b"!" + type(error).__name__.encode("ascii", "replace")[:60]
    with suppress(BaseException):
        os.write(3, said[:64])
    os._exit(0)


def _limit(seconds: float, memory_mb: int) -> None:
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    space = pages * resource.getpagesize() + (memory_mb << 20)
    cpu = math.ceil(seconds) + 1
    for which, limit in (
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(which, (limit, limit))
    calls = _CALLS[platform.machine()]
    code = [
        (_LOAD, 0, 0, 4),  # architecture
        (_EQUAL, 1, 0, calls.architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # number of the call
        (_AT_LEAST, 0, 1, 0x40000000),  # another way to write the same calls on x86
        (_RETURN, 0, 0, _REFUSE),
        (_EQUAL, 0, 4, calls.openat),
        (_LOAD, 0, 0, 32),  # its flags
        (_ANY_BIT, 0, 1, _WRITING),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for number in calls.allowed:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _REFUSE))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    # No new privileges, then the filter for every thread.
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(calls.seccomp, 1, 1, header):
        raise OSError(ctypes.get_errno(), "seccomp is not to be had")


if __name__ == "__main__":
    main(*sys.argv[1:])
