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
from typing import Any

import numpy as np

from actors.bridge import Bridge
from actors.link import Geometry, Link, give_link, take_link
from actors.mailbox import MailboxPlanners
from actors.records import ANY_ROOM, Kind, Outcome, read_message, read_request, write_message, write_plans
from crsm.planners import Arrivals
from crsm.types import PlanRequest
from tests.fixtures import make_plan, tiny_checkpoint

ROOT = Path(__file__).parents[2]
CHECKPOINT = tiny_checkpoint()
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

    def soonest(self) -> float:
        return 0.0

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


def requests(count: int, first: int = 0) -> list[PlanRequest]:
    """Requests with a snapshot small enough for any slot."""
    numbers = np.arange(8, dtype=np.float32).reshape(2, 4)
    return [
        PlanRequest(first + i, f"g{i % 2}", 6, 7, 3, numbers + i, numbers, model_version=3, value=float(i))
        for i in range(count)
    ]


def ids(settled: Any) -> list[int]:
    return [one.request_id for one in settled]


class Peer:
    """The pool's end by hand."""

    def __init__(self, link: Link) -> None:
        self.link = link
        link.connection.setblocking(False)
        self.asked: list[tuple[int, int]] = []
        """(slot, request id) of what is not settled."""
        self.messages: list[list[PlanRequest]] = []

    def look(self) -> None:
        while True:
            try:
                message = memoryview(self.link.connection.recv(100_000))
            except (BlockingIOError, OSError):
                return
            if not message:
                return
            _, _, entries = read_message(message, Kind.REQUESTS)
            found = []
            for slot, _, request_id, size in entries:
                found.append(read_request(self.link.slots[slot], size))
                assert found[-1].request_id == request_id
                self.asked.append((slot, request_id))
            self.messages.append(found)

    def say(self, message: bytes) -> None:
        self.link.connection.send(message)
        self.link.sent[0] += 1

    def settle(self, outcome: Outcome, count: int = 1, room: int = ANY_ROOM, seen: int = 0) -> list[int]:
        """Settles the oldest requests; returns their ids."""
        done, self.asked = self.asked[:count], self.asked[count:]
        entries = []
        for slot, request_id in done:
            size = 0
            if outcome is Outcome.PLANNED:
                plan = make_plan(requests(1, request_id)[0], CHECKPOINT)
                size = write_plans(self.link.slots[slot], [plan])
            entries.append((slot, outcome, request_id, size))
        self.say(write_message(Kind.NEWS, entries, room, seen))
        return [request_id for _, request_id in done]


def attached(shed: bool = True, geometry: Geometry = SMALL, max_batch: int = 4) -> tuple[MailboxPlanners, Peer]:
    mailbox = MailboxPlanners(max_batch, shed=shed)
    generators, pools = link_pair(geometry)
    mailbox.attach(generators)
    return mailbox, Peer(pools)
