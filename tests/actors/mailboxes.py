"""Both ends of a mailbox in one process, a pool that does as it is told, and ends in processes of their own."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.bridge import Bridge
from actors.link import Geometry, Link, give_link, take_link
from actors.mailbox import MailboxPlanners
from crsm.planners import Arrivals
from crsm.types import PlanRequest

ROOT = Path(__file__).parents[2]
SMALL = Geometry(slots=4, slot_bytes=4000)


def link_pair(geometry: Geometry = SMALL) -> tuple[Link, Link]:
    """The generator's end and the pool's."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    generators = give_link(one, geometry)
    return generators, take_link(other)


class FakePool:
    """Answers with what a function makes of a batch, in a thread of its own as a real one."""

    def __init__(self, answer: Callable[[Sequence[PlanRequest]], Arrivals], room: int | None = None) -> None:
        self.batches: list[list[PlanRequest]] = []
        self.free = room
        self._answer = answer
        self._done: queue.SimpleQueue[Arrivals] = queue.SimpleQueue()

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self.batches.append(list(requests))
        self._done.put(self._answer(requests))

    def room(self) -> int | None:
        return self.free

    def take(self, timeout: float) -> Arrivals:
        try:
            return self._done.get(timeout=timeout)
        except queue.Empty:
            return Arrivals()


@contextmanager
def bridged(pool: FakePool, mailbox: MailboxPlanners, geometry: Geometry = SMALL) -> Iterator[Bridge]:
    """A bridge in a thread; afterwards it must have ended."""
    generators, pools = link_pair(geometry)
    bridge = Bridge(pools, pool)
    thread = threading.Thread(target=bridge.run)
    thread.start()
    mailbox.attach(generators)
    try:
        yield bridge
    finally:
        mailbox.close()
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, killed afterwards if it is still there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
