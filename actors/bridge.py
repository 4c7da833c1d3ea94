"""The pool's side of the mailbox: hands requests from shared memory to the planners, and what becomes of them back.

Invariants:

* two threads, both asleep while there is nothing to do: one waits for the socket, one for the planners;
* requests are not copied: their arrays are read-only views of a slot, which is the pool's until the request is settled.
  Ray copies them when a batch is sent, and a settled request is not sent any more;
* every request that was understood is settled once; of one that was not the generator hears that it is lost;
* the bridge ends with the generator, and never because of what it was sent.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from actors.link import Link, new_buffer
from actors.records import (
    ANY_ROOM,
    MAX_ENTRIES,
    DoesNotFit,
    Kind,
    Malformed,
    Outcome,
    read_message,
    read_request,
    write_message,
    write_plans,
)
from crsm.planners import Arrivals
from crsm.types import Plan, PlanRequest

logger = logging.getLogger(__name__)

SETTLING = 0.002
"""Seconds after an answer in which the room may still change because of it."""
IDLE = 0.05
"""Seconds between looks at the room while nothing comes back: planners start and die."""

_Entry = tuple[int, int, int, int]


class Pool(Protocol):
    """The part of a planner pool that a bridge uses."""

    def submit(self, requests: Sequence[PlanRequest]) -> None: ...

    def room(self) -> int | None: ...
    def soonest(self) -> float: ...

    def take(self, timeout: float) -> Arrivals:
        """What comes back next; nothing, if nothing does within ``timeout`` seconds."""


class Bridge:
    """Serves one generator until it is gone."""

    def __init__(self, link: Link, pool: Pool) -> None:
        self._link, self._pool = link, pool
        self._slots = [slot.toreadonly() for slot in link.slots]
        self._open: dict[int, int] = {}
        """Slot of every request that is not settled."""
        self._seen = 0
        self._ended = threading.Event()
        self._said: tuple[int, int] | None = None
        self._sending = threading.Lock()
        self._counts: Counter[str] = Counter()

    def run(self) -> None:
        """Returns when the generator has hung up or died, or after :meth:`stop`."""
        sender = threading.Thread(target=self._send_back, name="bridge-sender", daemon=True)
        sender.start()
        try:
            self._receive()
        finally:
            self.stop()
            sender.join()
            self._link.close()

    def stop(self) -> None:
        """From any thread."""
        self._ended.set()
        self._link.hang_up()

    def stats(self) -> dict[str, int]:
        """Counters: ``requests``, ``settled``, ``malformed``, ``oversized`` (plans that fit no slot), ``unknown``."""
        return dict(self._counts)

    # ---------------------------------------------------------------- from the generator

    def _receive(self) -> None:
        buffer = new_buffer()
        view = memoryview(buffer)
        while not self._ended.is_set():
            try:
                size = self._link.connection.recv_into(buffer)
            except OSError:
                return
            if size == 0:
                return
            try:
                _, _, entries = read_message(view[:size], Kind.REQUESTS)
                self._take(list(entries))
            except Malformed as error:
                self._malformed(error)

    def _take(self, entries: list[_Entry]) -> None:
        requests: list[PlanRequest] = []
        refused: list[_Entry] = []
        for slot, _, request_id, size in entries:
            try:
                requests.append(self._read(slot, request_id, size))
            except Malformed as error:
                self._malformed(error)
                if slot < len(self._slots) and request_id not in self._open:
                    refused.append((slot, Outcome.LOST, request_id, 0))
            else:
                self._open[request_id] = slot
        self._counts["requests"] += len(requests)
        if requests:
            self._pool.submit(requests)
        # After they were handed over: a room that was looked up later takes account of them.
        self._seen += len(entries)
        if refused:
            self._send(refused)

    def _read(self, slot: int, request_id: int, size: int) -> PlanRequest:
        if slot >= len(self._slots):
            raise Malformed(f"slot {slot} of {len(self._slots)}")
        request = read_request(self._slots[slot], size)
        if request.request_id != request_id or request_id in self._open:
            raise Malformed(f"request {request_id} in slot {slot}, which holds request {request.request_id}")
        return request

    def _malformed(self, error: Malformed) -> None:
        self._counts["malformed"] += 1
        logger.warning("from the generator: %s", error)

    # ---------------------------------------------------------------- to the generator

    def _send_back(self) -> None:
        timeout = 0.0
        try:
            while not self._ended.is_set():
                entries = self._settle(self._pool.take(timeout))
                if entries or self._room_is_news():
                    self._send(entries)
                    timeout = SETTLING
                else:
                    timeout = IDLE
        finally:
            self.stop()  # also after a bug: the generator must not wait for who is not there

    def _room_is_news(self) -> bool:
        seen, room = self._seen, self._room()
        return self._said is None or room != self._said[1] or (room != ANY_ROOM and seen != self._said[0])

    def _room(self) -> int:
        room = self._pool.room()
        return ANY_ROOM if room is None else room

    def _settle(self, arrivals: Arrivals) -> list[_Entry]:
        plans: dict[int, list[Plan]] = {}
        for plan in arrivals.plans:
            plans.setdefault(plan.request_id, []).append(plan)
        entries = [self._answer(request_id, made) for request_id, made in plans.items()]
        entries += [self._close(request.request_id, Outcome.LOST) for request in arrivals.lost]
        entries += [self._close(request.request_id, Outcome.SHED) for request in arrivals.shed]
        return [entry for entry in entries if entry is not None]

    def _answer(self, request_id: int, plans: list[Plan]) -> _Entry | None:
        if request_id not in self._open:
            return self._close(request_id, Outcome.LOST)
        slot = self._open[request_id]
        try:
            size = write_plans(self._link.slots[slot], plans)
        except DoesNotFit as error:
            self._counts["oversized"] += 1
            logger.warning("request %d is lost: %s", request_id, error)
            return self._close(request_id, Outcome.LOST)
        return self._close(request_id, Outcome.PLANNED, size)

    def _close(self, request_id: int, outcome: Outcome, size: int = 0) -> _Entry | None:
        slot = self._open.pop(request_id, None)
        if slot is None:
            self._counts["unknown"] += 1
            return None
        self._counts["settled"] += 1
        return slot, outcome, request_id, size

    def _send(self, entries: list[_Entry]) -> None:
        """Blocks while the generator does not look; both threads send."""
        with self._sending:
            for start in range(0, max(1, len(entries)), MAX_ENTRIES):
                seen = self._seen
                room = self._room()
                message = write_message(
                    Kind.NEWS, entries[start : start + MAX_ENTRIES], room, seen, self._pool.soonest()
                )
                try:
                    self._link.connection.send(message)
                except OSError:  # the generator is gone
                    self._ended.set()
                    self._link.hang_up()
                    return
                self._said = seen, room
                self._link.sent[0] += 1
