"""The pool's side of the mailbox: what it hands on, what it says by itself, and a generator that talks nonsense."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from actors.bridge import Bridge
from actors.link import Geometry, Link
from actors.records import (
    ANY_ROOM,
    MESSAGE_BYTES,
    Kind,
    Outcome,
    read_message,
    read_plans,
    write_message,
    write_request,
)
from crsm.planners import Arrivals
from crsm.types import PlanRequest
from tests.actors.helpers import until
from tests.actors.mailboxes import SMALL, FakePool, link_pair
from tests.fixtures import a_request, make_plan, tiny_checkpoint

CHECKPOINT = tiny_checkpoint()
News = tuple[int, int, list[tuple[int, ...]]]


@contextmanager
def served(pool: FakePool, geometry: Geometry = SMALL) -> Iterator[tuple[Link, Bridge]]:
    """The generator's end by hand, and a bridge in a thread that must end with it."""
    generators, pools = link_pair(geometry)
    generators.connection.settimeout(60)
    bridge = Bridge(pools, pool)
    thread = threading.Thread(target=bridge.run)
    thread.start()
    try:
        yield generators, bridge
    finally:
        generators.close()
        thread.join(60)
        assert not thread.is_alive()


def ask(link: Link, *requests: PlanRequest, first: int = 0) -> None:
    sizes = [write_request(link.slots[first + i], request) for i, request in enumerate(requests)]
    entries = [(first + i, Outcome.ASKED, r.request_id, sizes[i]) for i, r in enumerate(requests)]
    link.connection.send(write_message(Kind.REQUESTS, entries))


def hear(link: Link) -> News:
    room, seen, entries = read_message(memoryview(link.connection.recv(MESSAGE_BYTES)), Kind.NEWS)
    return room, seen, list(entries)


def settled(link: Link, count: int) -> list[tuple[int, ...]]:
    """(slot, outcome, request id) of this many settled requests, by slot."""
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        found += hear(link)[2]
    return sorted(entry[:3] for entry in found)


def all_planned(batch: Sequence[PlanRequest]) -> Arrivals:
    return Arrivals([make_plan(request, CHECKPOINT) for request in batch])


def test_every_message_is_a_batch_of_read_only_views_and_every_outcome_is_told() -> None:
    def answer(batch: Sequence[PlanRequest]) -> Arrivals:
        first, second, third = batch
        return Arrivals([make_plan(first, CHECKPOINT, seed=s) for s in (1, 2)], lost=[second], shed=[third])

    pool = FakePool(answer)
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    requests = [dataclasses.replace(a_request(request_id=i, generation_id="g"), hidden_LD=numbers) for i in range(3)]
    with served(pool) as (link, bridge):
        ask(link, *requests)
        assert settled(link, 3) == [(0, Outcome.PLANNED, 0), (1, Outcome.LOST, 1), (2, Outcome.SHED, 2)]
        view = pool.batches[0][0].hidden_LD
        assert [len(batch) for batch in pool.batches] == [3] and not view.flags.writeable
        assert link.sent[0] >= 1
        until(lambda: bridge.stats() == {"requests": 3, "settled": 3})


def test_all_hypotheses_of_a_request_lie_in_its_slot() -> None:
    with served(FakePool(lambda batch: Arrivals([make_plan(batch[0], CHECKPOINT, seed=s) for s in range(3)]))) as ends:
        link, _ = ends
        ask(link, a_request(request_id=7), first=2)
        while not (entries := hear(link)[2]):
            pass
        ((slot, _, _, size),) = entries
        plans = read_plans(link.slots[slot], size)
        expected = [make_plan(a_request(request_id=7), CHECKPOINT, seed=s).write_u_LRE for s in range(3)]
        np.testing.assert_array_equal([plan.write_u_LRE for plan in plans], expected)


def test_plans_that_fit_no_slot_are_lost_and_counted() -> None:
    def answer(batch: Sequence[PlanRequest]) -> Arrivals:
        return Arrivals([make_plan(request, CHECKPOINT, line=(1,) * 600 * request.request_id) for request in batch])

    with served(FakePool(answer)) as (link, bridge):
        ask(link, a_request(request_id=0), a_request(request_id=1))
        assert settled(link, 2) == [(0, Outcome.PLANNED, 0), (1, Outcome.LOST, 1)]
        assert bridge.stats()["oversized"] == 1


def test_the_room_is_told_by_itself_when_it_changes_and_says_what_it_takes_account_of() -> None:
    pool = FakePool(lambda batch: Arrivals(), room=5)
    with served(pool) as (link, _):
        assert hear(link) == (5, 0, [])
        pool.free = 9
        assert hear(link) == (9, 0, [])
        ask(link, a_request(request_id=0), a_request(request_id=1))
        assert hear(link) == (9, 2, [])
        pool.free = None
        assert hear(link) == (ANY_ROOM, 2, [])


@pytest.mark.parametrize(
    "message", [b"noise", b"x" * 30_000, write_message(Kind.NEWS, []), write_message(Kind.REQUESTS, [(4, 0, 1, 80)])]
)
def test_what_is_no_request_is_counted_and_the_next_one_is_served(message: bytes) -> None:
    with served(FakePool(all_planned)) as (link, bridge):
        link.connection.send(message)
        ask(link, a_request(request_id=3))
        assert settled(link, 1) == [(0, Outcome.PLANNED, 3)]
        assert bridge.stats()["malformed"] == 1


def test_who_asked_with_a_record_that_cannot_be_read_hears_that_it_is_lost() -> None:
    pool = FakePool(all_planned)
    with served(pool) as (link, bridge):
        size = write_request(link.slots[0], a_request(request_id=1))
        write_request(link.slots[1], a_request(request_id=2))
        link.slots[2][:] = b"\xff" * len(link.slots[2])
        # Request 9 is not what lies in slot 1, and nothing lies in slot 2; slot 9 does not exist.
        entries = [(0, 0, 1, size), (1, 0, 9, size), (2, 0, 5, size), (3, 0, 6, 10**9), (9, 0, 7, size)]
        link.connection.send(write_message(Kind.REQUESTS, entries))
        lost = [(slot, Outcome.LOST, request_id) for slot, request_id in ((1, 9), (2, 5), (3, 6))]
        assert settled(link, 4) == [(0, Outcome.PLANNED, 1), *lost]
        assert bridge.stats()["malformed"] == 4 and [len(batch) for batch in pool.batches] == [1]


def test_an_answer_to_a_request_that_nobody_asked_goes_nowhere() -> None:
    stranger = a_request(request_id=50)
    pool = FakePool(lambda batch: Arrivals([make_plan(r, CHECKPOINT) for r in (*batch, stranger)], lost=[batch[0]]))
    with served(pool) as (link, bridge):
        ask(link, a_request(request_id=3))
        assert settled(link, 1) == [(0, Outcome.PLANNED, 3)]
        until(lambda: bridge.stats()["unknown"] == 2)


def test_a_generator_that_does_not_look_stops_nobody_from_ending_the_bridge() -> None:
    """Answers until the socket is full and the sending thread stands still; then the generator hangs up."""
    pool = FakePool(all_planned, room=0)
    stuck = threading.Event()
    with served(pool) as (link, _):
        for i in range(3000):
            try:
                link.connection.settimeout(0.5)
                ask(link, a_request(request_id=i), first=i % SMALL.slots)
            except TimeoutError:
                break
            pool.free = i
        stuck.set()
    assert stuck.is_set()
