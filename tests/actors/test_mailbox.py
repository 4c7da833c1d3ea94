"""The generator's side of the mailbox, against a pool that answers, lies, is slow, or is gone. No Ray."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from actors.link import Geometry
from actors.mailbox import MailboxPlanners
from actors.records import (
    ANY_ROOM,
    Kind,
    Outcome,
    write_message,
    write_plans,
)
from crsm.config import EngineConfig
from crsm.engine import Engine
from crsm.planners import Arrivals, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.types import Reason
from tests.actors.helpers import WALL, generations, run, until
from tests.actors.mailboxes import CHECKPOINT, FakePool, Peer, attached, bridged, ids, link_pair, requests
from tests.fixtures import make_plan

SLOTS = Geometry(slots=8, slot_bytes=8000)


# ------------------------------------------------------------------------------------------------------ out and in


def test_requests_arrive_as_they_were_and_plans_come_back() -> None:
    mailbox, peer = attached()
    asked = requests(3)
    mailbox.submit(asked)
    peer.look()
    assert [dataclasses.astuple(request)[:5] for request in peer.messages[0]] == [
        dataclasses.astuple(request)[:5] for request in asked
    ]
    np.testing.assert_array_equal(peer.messages[0][2].hidden_LD, asked[2].hidden_LD)
    assert mailbox.poll() == Arrivals()
    peer.settle(Outcome.PLANNED, 2)
    found = mailbox.poll()
    assert ids(found.plans) == [0, 1] and not found.lost and not found.shed
    np.testing.assert_array_equal(found.plans[1].write_u_LRE, make_plan(asked[1], CHECKPOINT).write_u_LRE)
    peer.settle(Outcome.SHED)
    assert mailbox.poll() == Arrivals(shed=[asked[2]])
    stats = mailbox.stats()
    assert (stats["messages_sent"], stats["messages_received"], stats["sent"], stats["answered"]) == (1, 2, 3, 2)
    assert stats["shed_by_pool"] == 1 and stats["open"] == stats["malformed"] == 0
    assert stats["bytes_per_request"] > 64 and stats["bytes_per_plan"] > peer_plan_bytes()
    mailbox.close()


def peer_plan_bytes() -> int:
    return make_plan(requests(1)[0], CHECKPOINT).num_bytes


def test_what_finds_no_slot_is_shed_at_once_and_slots_come_back() -> None:
    mailbox, peer = attached()
    mailbox.submit(requests(6))
    assert ids(mailbox.poll().shed) == [4, 5] and mailbox.room() == 0
    mailbox.submit(requests(1, 10))
    assert ids(mailbox.poll().shed) == [10]
    peer.look()
    peer.settle(Outcome.PLANNED, 4)
    assert len(mailbox.poll().plans) == 4
    mailbox.submit(requests(4, 20))
    peer.look()
    assert ids(peer.messages[-1]) == [20, 21, 22, 23] and mailbox.stats()["shed"] == 3
    mailbox.close()


def test_without_shedding_batches_wait_for_slots_and_go_out_whole() -> None:
    mailbox, peer = attached(shed=False, max_batch=3)
    mailbox.submit(requests(7))
    assert mailbox.room() is None
    peer.look()
    assert [ids(message) for message in peer.messages] == [[0, 1, 2]]
    peer.settle(Outcome.PLANNED, 1)
    assert ids(mailbox.poll().plans) == [0]
    peer.look()
    assert len(peer.messages) == 1  # two slots are free, and three are asked for
    peer.settle(Outcome.LOST, 2)
    assert ids(mailbox.wait([1, 2]).lost) == [1, 2]
    peer.look()
    assert [ids(message) for message in peer.messages[1:]] == [[3, 4, 5], [6]]
    mailbox.close()


def test_a_request_larger_than_a_slot_is_lost_and_the_others_go_out() -> None:
    for shed in (True, False):
        mailbox, peer = attached(shed=shed)
        first, large, last = requests(3)
        large = dataclasses.replace(large, hidden_LD=np.zeros((100, 100), np.float32))
        mailbox.submit([first, large, last])
        assert mailbox.poll() == Arrivals(lost=[large])
        peer.look()
        assert ids(peer.messages[0]) == [0, 2] and mailbox.stats()["refused"] == 1
        mailbox.close()


@pytest.mark.parametrize("shed", [True, False])
def test_a_full_socket_sheds_or_makes_wait(shed: bool) -> None:
    mailbox, peer = attached(shed=shed, geometry=Geometry(slots=2000, slot_bytes=1000), max_batch=1)
    for i in range(2000):
        mailbox.submit(requests(1, i))
    arrived = mailbox.poll()
    if shed:
        assert arrived.shed and arrived.shed[-1].request_id == 1999
        assert mailbox.stats()["sent"] == 2000 - len(arrived.shed)
    else:
        assert arrived == Arrivals() and mailbox.stats()["sent"] < 2000
        while len(peer.asked) < 2000:
            peer.look()
            assert mailbox.poll() == Arrivals()
        assert [request_id for _, request_id in peer.asked] == list(range(2000))
    mailbox.close()


# ------------------------------------------------------------------------------------------------------------- room


def test_room_is_what_the_pool_said_less_what_it_had_not_seen_and_never_more_than_the_slots() -> None:
    mailbox, peer = attached()
    assert mailbox.room() == 0  # nothing was said yet
    peer.settle(Outcome.LOST, 0, room=3, seen=0)
    mailbox.poll()
    assert mailbox.room() == 3
    mailbox.submit(requests(2))
    assert mailbox.room() == 1
    peer.settle(Outcome.LOST, 0, room=3, seen=2)
    mailbox.poll()
    assert mailbox.room() == 2  # slots
    peer.settle(Outcome.LOST, 0, room=0, seen=2)
    mailbox.poll()
    assert mailbox.room() == 0
    peer.settle(Outcome.LOST, 0, room=ANY_ROOM)
    mailbox.poll()
    assert mailbox.room() == 2
    mailbox.close()
    assert mailbox.room() == 0


# ------------------------------------------------------------------------------------------------------ a lying pool


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"noise",
        b"x" * 40_000,
        write_message(Kind.REQUESTS, [(0, 1, 0, 0)]),
        write_message(Kind.NEWS, [(0, Outcome.PLANNED, 0, 0)])[:-1],
        write_message(Kind.NEWS, [(99, Outcome.LOST, 0, 0)]),
        write_message(Kind.NEWS, [(2**32 - 1, Outcome.LOST, 0, 0)]),
        write_message(Kind.NEWS, [(0, Outcome.LOST, 77, 0)]),
        write_message(Kind.NEWS, [(3, Outcome.LOST, 0, 0)]),
    ],
)
def test_a_message_that_is_none_is_counted_and_settles_nothing(message: bytes) -> None:
    mailbox, peer = attached()
    mailbox.submit(requests(1))
    peer.look()
    if message:
        peer.say(message)
        assert mailbox.poll() == Arrivals() and mailbox.stats()["malformed"] == 1
    peer.settle(Outcome.PLANNED)
    assert ids(mailbox.poll().plans) == [0]
    mailbox.close()


@pytest.mark.parametrize(("outcome", "size"), [(1, 0), (1, 50), (1, 4001), (1, 2**63), (0, 0), (9, 0)])
def test_an_answer_that_cannot_be_read_costs_its_request_and_nothing_else(outcome: int, size: int) -> None:
    mailbox, peer = attached()
    first, second = requests(2)
    mailbox.submit([first, second])
    peer.look()
    peer.link.slots[0][:100] = b"\xff" * 100
    (slot, request_id), *rest = peer.asked
    peer.asked = rest
    peer.link.slots[slot][:100] = b"\xff" * 100
    peer.say(write_message(Kind.NEWS, [(slot, outcome, request_id, size)]))
    assert mailbox.poll() == Arrivals(lost=[first]) and mailbox.stats()["malformed"] == 1
    peer.settle(Outcome.PLANNED)
    assert ids(mailbox.poll().plans) == [1]
    mailbox.close()


def test_a_plan_for_another_request_is_no_answer() -> None:
    mailbox, peer = attached()
    mailbox.submit(requests(1))
    peer.look()
    ((slot, request_id),) = peer.asked
    size = write_plans(peer.link.slots[slot], [make_plan(requests(1, 5)[0], CHECKPOINT)])
    for _ in range(2):  # the second time it is settled already
        peer.say(write_message(Kind.NEWS, [(slot, Outcome.PLANNED, request_id, size)]))
    assert ids(mailbox.poll().lost) == [0] and mailbox.stats()["malformed"] == 2
    assert mailbox.stats()["open"] == 0
    mailbox.close()


# ------------------------------------------------------------------------------------------------------- a pool gone


def test_a_pool_that_is_gone_loses_everything_open_and_another_takes_its_place() -> None:
    mailbox, peer = attached()
    mailbox.submit(requests(3))
    peer.look()
    peer.settle(Outcome.PLANNED)  # said before it died, and heard after
    peer.link.close()
    found = Arrivals()

    def told() -> bool:
        found.add(mailbox.poll())
        return len(found.lost) == 2

    until(told)
    assert ids(found.plans) == [0] and ids(found.lost) == [1, 2] and mailbox.room() == 0
    mailbox.submit(requests(2, 10))
    assert ids(mailbox.poll().lost) == [10, 11]
    stats = mailbox.stats()
    assert (stats["lost_with_peer"], stats["unattached"], stats["attached"], stats["open"]) == (2, 2, 1, 0)
    generators, pools = link_pair()
    mailbox.attach(generators)
    peer = Peer(pools)
    mailbox.submit(requests(1, 20))
    peer.look()
    peer.settle(Outcome.PLANNED, room=5, seen=1)
    assert ids(mailbox.wait([20]).plans) == [20] and mailbox.room() == 4
    mailbox.close()


def test_attaching_another_pool_loses_what_the_first_one_has() -> None:
    mailbox, first = attached()
    mailbox.submit(requests(2))
    first.look()
    another = link_pair()
    mailbox.attach(another[0])
    assert ids(mailbox.poll().lost) == [0, 1]
    with pytest.raises(OSError):
        first.settle(Outcome.PLANNED)
    mailbox.close()


@pytest.mark.parametrize("how", ["hang up", "close", "never comes", "closed before it came"])
def test_who_waits_is_told_when_nothing_will_come(how: str) -> None:
    mailbox = MailboxPlanners(4, shed=False)
    generators, pools = link_pair()
    if how in ("hang up", "close"):
        mailbox.attach(generators)
    mailbox.submit(requests(6))
    found: list[Arrivals] = []
    waiter = threading.Thread(target=lambda: found.append(mailbox.wait([1, 5])))
    waiter.start()
    if how == "hang up":
        pools.close()
    elif how == "never comes":
        mailbox.give_up()
    else:
        mailbox.close()
    waiter.join(60)
    assert ids(found[0].lost) == [0, 1, 2, 3, 4, 5]
    mailbox.submit(requests(1, 10))
    assert ids(mailbox.wait([10]).lost) == [10]
    assert mailbox.wait([1, 99]) == Arrivals()  # settled before, and never submitted


def test_requests_wait_for_the_first_pool_under_the_virtual_clock_only() -> None:
    virtual, wall = MailboxPlanners(4, shed=False), MailboxPlanners(4, shed=True)
    for mailbox in (virtual, wall):
        mailbox.submit(requests(2))
    assert ids(wall.poll().lost) == [0, 1] and wall.room() == 0
    assert virtual.poll() == Arrivals() and virtual.room() is None
    generators, pools = link_pair()
    virtual.attach(generators)
    peer = Peer(pools)
    assert virtual.poll() == Arrivals()
    peer.look()
    assert [ids(message) for message in peer.messages] == [[0, 1]]
    virtual.close()


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"planners.max_batch = 5000; allowed: 1 to 1024"):
        MailboxPlanners(5000)
    mailbox = MailboxPlanners(5, shed=False)
    generators, pools = link_pair()
    with pytest.raises(ValueError, match=r"slots = 4; allowed: at least planners.max_batch = 5"):
        mailbox.attach(generators)
    generators.close()
    pools.close()


# ------------------------------------------------------------------------------------------------------ with a bridge


def deliberating(max_batch: int) -> FakePool:
    deliberator = Deliberator.from_checkpoint(CHECKPOINT)
    return FakePool(lambda batch: Arrivals(deliberator(batch)))


@pytest.mark.parametrize("slots", [3, 8])
def test_virtual_clock_the_bits_are_those_of_threads(slots: int) -> None:
    threads = ThreadPlanners(Deliberator.from_checkpoint(CHECKPOINT), count=1, max_batch=3)
    expected = run(Engine(CHECKPOINT, threads), generations(lag=0))
    threads.close()
    mailbox, pool = MailboxPlanners(3, shed=False), deliberating(3)
    with bridged(pool, mailbox, Geometry(slots, 8000)):
        engine = Engine(CHECKPOINT, mailbox)
        assert run(engine, generations(lag=0)) == expected
    assert engine.metrics.injections > 0 and not engine.metrics.outcomes[Reason.LOST]
    assert max(map(len, pool.batches)) == 3


def test_wall_clock_every_request_of_an_engine_is_settled_once() -> None:
    def answer(batch: Any) -> Arrivals:
        found = Arrivals()
        for request in batch:
            kind = request.request_id % 3
            if kind == 0:
                found.plans.append(make_plan(request, CHECKPOINT, assumed=(21,)))
            else:
                (found.lost if kind == 1 else found.shed).append(request)
        return found

    mailbox, pool = MailboxPlanners(3, shed=True), FakePool(answer, room=8)
    with bridged(pool, mailbox, SLOTS) as bridge:
        until(lambda: len(mailbox.poll().plans) == 0 and mailbox.room() == 8)
        engine = Engine(CHECKPOINT, mailbox, WALL)
        run(engine, generations(tokens=40))
        asked = engine.metrics.requests
        assert asked and sum(engine.metrics.outcomes.values()) == asked
        until(lambda: mailbox.poll() is not None and mailbox.stats()["open"] == 0)
    stats = mailbox.stats()
    declined = engine.metrics.outcomes[Reason.DECLINED]
    assert asked - declined == stats["answered"] + stats["shed"] + stats["shed_by_pool"] + stats["lost_by_pool"]
    assert bridge.stats()["requests"] == bridge.stats()["settled"] == stats["sent"]


def test_the_decode_thread_is_never_stopped_by_a_pool_that_does_nothing() -> None:
    expected = run(Engine(CHECKPOINT), generations(tokens=40))
    mailbox, pool = MailboxPlanners(3, shed=True), FakePool(lambda batch: Arrivals())
    with bridged(pool, mailbox, SLOTS):
        engine = Engine(CHECKPOINT, mailbox, EngineConfig(clock="wall"))
        assert run(engine, generations(tokens=40)) == expected
    assert mailbox.stats()["sent"] <= SLOTS.slots
