"""Planners in another process of the same node, as the engine sees them.

Invariants:

* the caller's thread makes no Ray call, takes no lock and never waits, but in ``wait``; a request costs one copy into
  shared memory, a call of ``submit`` one system call per message, a ``poll`` that finds nothing none;
* every request comes back exactly once, as plans, lost or shed, whatever the other side does or fails to do;
* when the other side is gone, everything open is lost and there is no room, until a new one is attached;
* with shedding, what finds no free slot or no place in the socket is shed at once. Without (virtual clock) it waits its
  turn here, and goes out in the batches of :func:`crsm.planners.split_batch`, one message each;
* a message or a record that is none is counted, and costs at most the request that it stands for.

One thread submits, polls and waits. ``attach``, ``give_up``, ``close`` and ``stats`` may be called from any other.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.link import Link, new_buffer
from actors.records import (
    ANY_ROOM,
    MAX_ENTRIES,
    DoesNotFit,
    Kind,
    Malformed,
    Outcome,
    read_message,
    read_plans,
    read_soonest,
    write_message,
    write_request,
)
from crsm.planners import NOTHING, Arrivals, split_batch
from crsm.types import PlanRequest

logger = logging.getLogger(__name__)

LOOK_AFTER = 0.05
"""Seconds after which a poll asks the socket although nothing is announced: only so is it seen that the pool was killed
while nothing is sent to it."""
PATIENCE = 1.0
"""Seconds that ``wait`` sleeps at most before it looks again."""


@dataclass(slots=True)
class _Counts:
    requests: int = 0
    """Handed to ``submit``."""
    plans: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    request_bytes: int = 0
    plan_bytes: int = 0
    sent: int = 0
    """Requests that went out."""
    answered: int = 0
    """Requests that came back with plans."""
    shed: int = 0
    """Requests shed here: no free slot, or the socket was full."""
    shed_by_pool: int = 0
    lost_by_pool: int = 0
    refused: int = 0
    """Requests that do not fit a slot."""
    lost_with_peer: int = 0
    """Requests open when the pool's process was gone."""
    unattached: int = 0
    """Requests submitted while there was no pool."""
    malformed: int = 0
    """Messages, entries and records that are none."""
    attached: int = 0
    """Pools so far."""


class MailboxPlanners:
    """The generator's side of the mailbox."""

    def __init__(self, max_batch: int = 128, *, shed: bool = True) -> None:
        """
        Args:
            max_batch: requests of one search.
            shed: drop what finds no place; False for the virtual clock, which waits.
        """
        if not 1 <= max_batch <= MAX_ENTRIES:
            raise ValueError(f"planners.max_batch = {max_batch}; allowed: 1 to {MAX_ENTRIES}")
        self._max_batch, self._shed = max_batch, shed
        self._link: Link | None = None
        self._offered: Link | None = None
        self._expecting = True
        """The first pool has not come yet: without shedding, requests wait for it."""
        self._closed = False
        self._open: dict[int, PlanRequest] = {}
        """Everything that is not settled, by request id."""
        self._out: list[int | None] = []
        """Per slot, the request that it belongs to."""
        self._free: list[int] = []
        """Free slots; the last one given back is the next to be used, since its memory is in the cache."""
        self._queue: deque[list[PlanRequest]] = deque()
        """Batches that wait for slots."""
        self._settled = Arrivals()
        self._room, self._seen, self._sent_requests = 0, 0, 0
        self._soonest = 0.0
        self._heard, self._look_at = 0, 0.0
        self._buffer = new_buffer()
        self._view = memoryview(self._buffer)
        self._counts = _Counts()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._bell)

    # ---------------------------------------------------------------- the engine's side

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        link = self._current()
        self._counts.requests += len(requests)
        for request in requests:
            self._open[request.request_id] = request
        if link is None and (self._closed or self._shed or not self._expecting):
            self._counts.unattached += len(requests)
            self._lose(requests)
        elif self._shed:
            assert link is not None
            for start in range(0, len(requests), MAX_ENTRIES):
                self._send_or_shed(link, requests[start : start + MAX_ENTRIES])
        else:
            self._queue += split_batch(requests, self._max_batch)
            self._send_queued()

    def room(self) -> int | None:
        link = self._current()
        if link is None:
            return 0 if self._shed or not self._expecting else None
        if not self._shed:
            return None
        if self._room == ANY_ROOM:
            return len(self._free)
        # What the pool had not seen when it said so takes up room as well.
        return max(0, min(self._room - (self._sent_requests - self._seen), len(self._free)))

    def soonest(self) -> float:
        return self._soonest

    def poll(self) -> Arrivals:
        link = self._current()
        if link is not None:
            now = time.monotonic()
            if link.sent[0] != self._heard or now > self._look_at:
                self._look_at = now + LOOK_AFTER
                self._receive(link)
        if self._queue:
            self._send_queued()
        found = self._settled
        if not (found.plans or found.lost or found.shed):
            return NOTHING
        self._settled = Arrivals()
        return found

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        missing = set(request_ids)
        found = Arrivals()
        while True:
            if (link := self._current()) is not None:
                self._receive(link)
            found.add(self.poll())
            # What was never submitted, or was settled before, will not come.
            missing.intersection_update(self._open)
            if not missing:
                return found
            self._sleep()

    def close(self) -> None:
        """Everything open is lost, and so is what comes after. From any thread."""
        self._closed = True
        for link in (self._link, self._offered):
            if link is not None:
                link.hang_up()
        self._ring()

    # ---------------------------------------------------------------- the operator's side

    def attach(self, link: Link) -> None:
        """From now on requests go to this pool; those that another one had are lost. From any thread."""
        if not self._shed and link.geometry.slots < self._max_batch:
            raise ValueError(f"slots = {link.geometry.slots}; allowed: at least planners.max_batch = {self._max_batch}")
        displaced, self._offered = self._offered, link
        if displaced is not None:
            displaced.hang_up()
        if self._closed:
            link.hang_up()
        self._ring()

    def give_up(self) -> None:
        """No pool is about to come: who waits for the first one is told. From any thread."""
        self._expecting = False
        self._ring()

    def stats(self) -> dict[str, Any]:
        """Counters, and mean bytes of a request and of a request's plans. Never blocks."""
        counts = self._counts
        return {
            **asdict(counts),
            "open": len(self._open),
            "bytes_per_request": counts.request_bytes / counts.sent if counts.sent else 0.0,
            "bytes_per_plan": counts.plan_bytes / counts.plans if counts.plans else 0.0,
        }

    # ---------------------------------------------------------------- the link

    def _current(self) -> Link | None:
        """The pool that requests go to; takes notice of one that was attached, given up or closed meanwhile."""
        if self._offered is not None:
            offered, self._offered = self._offered, None
            self._drop_link()
            self._link, self._expecting = offered, False
            self._out = [None] * offered.geometry.slots
            self._free = list(range(offered.geometry.slots))[::-1]
            self._room, self._seen, self._sent_requests, self._heard = 0, 0, 0, 0
            self._counts.attached += 1
        if self._closed and (self._link is not None or self._open):
            self._expecting = False
            self._drop_link()
        if self._link is None and self._open and not self._expecting:
            self._lose_open()
        return self._link

    def _drop_link(self) -> None:
        """The pool is gone: what it had is lost. What waits here for the first pool goes on waiting."""
        if self._link is not None:
            self._link.close()
            self._link, self._out, self._free = None, [], []
            self._lose_open()

    def _lose_open(self) -> None:
        self._counts.lost_with_peer += len(self._open)
        self._queue.clear()
        self._lose(list(self._open.values()))

    # ---------------------------------------------------------------- what goes out

    def _send_or_shed(self, link: Link, requests: Sequence[PlanRequest]) -> None:
        if len(requests) > len(self._free):
            self._shed_here(requests[len(self._free) :])
            requests = requests[: len(self._free)]
        if not self._send(link, requests):
            self._shed_here([request for request in requests if request.request_id in self._open])

    def _send_queued(self) -> None:
        while self._queue and self._link is not None and len(self._queue[0]) <= len(self._free):
            if not self._send(self._link, self._queue[0]):
                return
            if self._queue:
                self._queue.popleft()

    def _send(self, link: Link, requests: Sequence[PlanRequest]) -> bool:
        """Writes requests into free slots and names them in one message. False: the socket has no place for it, and
        nothing has happened. Requests that fit no slot are lost."""
        entries: list[tuple[int, int, int, int]] = []
        total = 0
        for request in requests:
            if request.request_id not in self._open:
                continue  # found too large when the socket was full
            slot = self._free[-1]
            try:
                size = write_request(link.slots[slot], request)
            except DoesNotFit as error:
                logger.warning("not asked: %s", error)
                self._counts.refused += 1
                self._lose((request,))
                continue
            self._free.pop()
            self._out[slot] = request.request_id
            entries.append((slot, Outcome.ASKED, request.request_id, size))
            total += size
        if not entries:
            return True
        try:
            link.connection.send(write_message(Kind.REQUESTS, entries), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            for slot, *_ in reversed(entries):
                self._give_back(slot)
            return False
        except OSError:  # the pool is gone
            self._drop_link()
            return True
        self._sent_requests += len(entries)
        self._counts.messages_sent += 1
        self._counts.sent += len(entries)
        self._counts.request_bytes += total
        return True

    def _give_back(self, slot: int) -> None:
        self._out[slot] = None
        self._free.append(slot)

    def _shed_here(self, requests: Sequence[PlanRequest]) -> None:
        self._counts.shed += len(requests)
        for request in requests:
            del self._open[request.request_id]
        self._settled.shed += requests

    def _lose(self, requests: Sequence[PlanRequest]) -> None:
        for request in requests:
            del self._open[request.request_id]
        self._settled.lost += requests

    # ---------------------------------------------------------------- what comes in

    def _receive(self, link: Link) -> None:
        """Takes every message that is there."""
        while True:
            try:
                size = link.connection.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if size == 0:
                self._drop_link()
                return
            self._heard += 1
            self._counts.messages_received += 1
            try:
                self._room, self._seen, entries = read_message(self._view[:size], Kind.NEWS)
                self._soonest = read_soonest(self._view)
                for slot, outcome, request_id, length in entries:
                    self._settle(link, slot, outcome, request_id, length)
            except Malformed as error:
                self._counts.malformed += 1
                logger.warning("from the pool: %s", error)
            if link.sent[0] == self._heard:
                return

    def _settle(self, link: Link, slot: int, outcome: int, request_id: int, size: int) -> None:
        counts = self._counts
        if slot >= len(self._out) or self._out[slot] != request_id:
            counts.malformed += 1  # another request's slot, or an answer that was given before
            return
        request = self._open.pop(request_id)
        self._give_back(slot)
        if outcome == Outcome.PLANNED:
            try:
                plans = read_plans(link.slots[slot], size)
            except Malformed as error:
                logger.warning("request %d: %s", request_id, error)
                plans = []
            if plans and all(plan.request_id == request_id for plan in plans):
                counts.answered += 1
                counts.plans += len(plans)
                counts.plan_bytes += size
                self._settled.plans += plans
                return
            counts.malformed += 1
        elif outcome == Outcome.SHED:
            counts.shed_by_pool += 1
            self._settled.shed.append(request)
            return
        elif outcome == Outcome.LOST:
            counts.lost_by_pool += 1
        else:
            counts.malformed += 1
        self._settled.lost.append(request)

    # ---------------------------------------------------------------- waiting

    def _sleep(self) -> None:
        """Until there is a message, a pool, the end, or room in the socket for what waits."""
        link = self._link
        events = select.poll()
        events.register(self._bell, select.POLLIN)
        if link is not None:
            stuck = self._queue and len(self._queue[0]) <= len(self._free)
            events.register(link.connection, select.POLLIN | (select.POLLOUT if stuck else 0))
        if any(descriptor == self._bell for descriptor, _ in events.poll(1000 * PATIENCE)):
            os.eventfd_read(self._bell)

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)
