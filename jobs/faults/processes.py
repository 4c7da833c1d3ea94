"""The processes of a local Ray, from ``/proc``: whose they are, what they hold, and whether they are gone.

A worker's title names its actor's class (``ray::GeneratorActor.generate``): nobody need be asked for its process id,
not even a planner that is still starting, and a process that was forgotten is found as well.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = "/dev/shm/"
_TITLE = re.compile(r"ray::(\w+)")
_RAYS_OWN = re.compile(r"IDLE|SpillWorker|RestoreWorker|DashboardAgent|RuntimeEnvAgent")
"""Processes that live as long as the cluster."""


@dataclass(frozen=True, slots=True)
class Process:
    """An actor's process; the time of its start tells it from a later one of the same id."""

    pid: int
    started: int
    actor: str
    """Its class."""

    @property
    def role(self) -> str:
        """``generator``, ``pool`` or ``planner``; the class for any other."""
        for role, word in (("pool", "Pool"), ("generator", "Generator"), ("planner", "Planner")):
            if word in self.actor:
                return role
        return self.actor


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in bytes."""

    resident: int
    anonymous: int
    """Without files and what it shares, such as the object store, whose pages are everybody's once touched."""


def actors_of(driver: int) -> list[Process]:
    """The actors' processes of the Ray that a process started."""
    parents: dict[int, int] = {}
    started: dict[int, int] = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))) is not None:
            parents[int(entry.name)], started[int(entry.name)] = int(fields[1]), int(fields[19])
    found = []
    for pid in parents:
        if _descends(pid, driver, parents) and (match := _TITLE.match(_title(pid))):
            if not _RAYS_OWN.search(match[1]):
                found.append(Process(pid, started[pid], match[1]))
    return sorted(found, key=lambda process: (process.role, process.started, process.pid))


def children_of(parent: int, program: str) -> list[int]:
    """A process's children that run a program: the daemons of a Ray that it started."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))) is not None and int(fields[1]) == parent:
            if os.path.basename(_title(int(entry.name)).partition(" ")[0]) == program:
                found.append(int(entry.name))
    return sorted(found)


def is_running(process: Process) -> bool:
    """Whether it lives; one that is dead and not yet buried does not."""
    fields = _stat(process.pid)
    return fields is not None and int(fields[19]) == process.started and fields[0] not in ("Z", "X")


def wait_until_gone(processes: Iterable[Process], seconds: float) -> list[Process]:
    """Waits for the end of processes; those that are left."""
    left, until = list(processes), time.monotonic() + seconds
    while (left := [process for process in left if is_running(process)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def signal_all(processes: Iterable[Process], number: signal.Signals) -> int:
    """Sends a signal to each that lives; how many."""
    sent = 0
    for process in processes:
        if is_running(process):
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
                sent += 1
    return sent


def memory_of(process: Process) -> Memory | None:
    """None: it is gone."""
    try:
        text = (PROC / str(process.pid) / "status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "VmRSS" not in fields or not is_running(process):
        return None
    return Memory(*(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")))


def shared_memory_of(process: Process) -> set[str]:
    """Files in ``/dev/shm`` that it has open or mapped, by name; those that are unlinked already are not among them."""
    names: set[str] = set()
    folder = PROC / str(process.pid)
    with suppress(OSError):
        for descriptor in (folder / "fd").iterdir():
            with suppress(OSError):
                names.add(os.readlink(descriptor))
    with suppress(OSError):
        for line in (folder / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
            names.add(line.split(None, 5)[-1])
    return {name for name in names if name.startswith(SHARED_MEMORY) and not name.endswith("(deleted)")}


def left_in_shared_memory(names: Iterable[str]) -> list[str]:
    """Those of the files that still exist."""
    return sorted(name for name in names if os.path.exists(name))


def _stat(pid: int) -> list[str] | None:
    """The fields after the name, which may hold anything: state, parent, …"""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def _title(pid: int) -> str:
    try:
        raw = (PROC / str(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace")


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    seen: set[int] = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False
