"""Whatever happens to a mailbox in whatever order, every request is settled exactly once."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.mailbox import MailboxPlanners
from actors.records import Kind, Outcome, write_message
from crsm.planners import Arrivals
from tests.actors.mailboxes import Peer, ids, link_pair, requests


class Interleavings(RuleBasedStateMachine):
    """Whatever happens in whatever order, every request is settled exactly once."""

    @initialize(shed=st.booleans())
    def begin(self, shed: bool) -> None:
        self.mailbox = MailboxPlanners(3, shed=shed)
        self.peer: Peer | None = None
        self.submitted: list[int] = []
        self.settled: list[int] = []

    @rule(count=st.integers(1, 7), large=st.booleans())
    def submit(self, count: int, large: bool) -> None:
        asked = requests(count, len(self.submitted))
        if large:
            asked[-1] = dataclasses.replace(asked[-1], hidden_LD=np.zeros((100, 100), np.float32))
        self.submitted += ids(asked)
        self.mailbox.submit(asked)

    @rule()
    def poll(self) -> None:
        self.note(self.mailbox.poll())

    @precondition(lambda self: self.peer)
    @rule(outcome=st.sampled_from([Outcome.PLANNED, Outcome.LOST, Outcome.SHED]), count=st.integers(0, 5))
    def answer(self, outcome: Outcome, count: int) -> None:
        self.peer.look()
        self.peer.settle(outcome, count)

    @precondition(lambda self: self.peer)
    @rule(noise=st.binary(min_size=1, max_size=60))
    def lie(self, noise: bytes) -> None:
        self.peer.say(noise)

    @precondition(lambda self: self.peer)
    @rule(slot=st.integers(0, 5), request_id=st.integers(0, 9), outcome=st.integers(0, 4))
    def repeat(self, slot: int, request_id: int, outcome: int) -> None:
        """An answer to a request that is not the pool's (any more)."""
        if (slot, request_id) not in self.peer.asked and self.holder(slot) != request_id:
            self.peer.say(write_message(Kind.NEWS, [(slot, outcome, request_id, 0)]))

    def holder(self, slot: int) -> int | None:
        self.peer.look()
        return dict(self.peer.asked).get(slot)

    @precondition(lambda self: self.peer)
    @rule()
    def die(self) -> None:
        self.peer.link.close()
        self.peer = None

    @rule()
    def replace(self) -> None:
        generators, pools = link_pair()
        self.mailbox.attach(generators)
        self.peer = Peer(pools)
        # The other end may be offered and offered again before it is looked at.
        if len(self.submitted) % 2:
            self.note(self.mailbox.poll())

    @rule()
    def give_up(self) -> None:
        self.mailbox.give_up()

    def note(self, arrivals: Arrivals) -> None:
        self.settled += ids(arrivals.plans) + ids(arrivals.lost) + ids(arrivals.shed)

    @invariant()
    def nothing_comes_twice_or_unasked(self) -> None:
        if hasattr(self, "mailbox"):
            assert len(set(self.settled)) == len(self.settled) and set(self.settled) <= set(self.submitted)
            assert self.mailbox.room() is None or self.mailbox.room() >= 0

    def teardown(self) -> None:
        if hasattr(self, "mailbox"):
            self.mailbox.close()
            self.note(self.mailbox.wait(self.submitted))
            assert sorted(self.settled) == self.submitted
            assert self.mailbox.stats()["open"] == 0


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=30)
