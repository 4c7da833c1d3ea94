"""Generator and pool in processes of their own, and either of them killed. No Ray."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import numpy as np

from actors.bridge import Bridge
from actors.link import Geometry, Listener, connect
from actors.mailbox import MailboxPlanners
from crsm.planners import Arrivals
from tests.actors.helpers import make_requests, until
from tests.actors.mailboxes import CHECKPOINT, SMALL, FakePool, ids, python, requests

SLOTS = Geometry(slots=8, slot_bytes=8000)

POOL_PROCESS = """
import sys
from actors.bridge import Bridge
from actors.link import connect
from crsm.planners import Arrivals
from tests.actors.mailboxes import FakePool
from tests.fixtures import make_plan, tiny_checkpoint

checkpoint = tiny_checkpoint()
answer = lambda batch: Arrivals([make_plan(r, checkpoint) for r in batch if not r.generation_id.startswith("slow")])
bridge = Bridge(connect((sys.argv[1], bytes.fromhex(sys.argv[2]))), FakePool(answer))
print("here", flush=True)
bridge.run()
print("ended", flush=True)
"""

GENERATOR_PROCESS = """
import sys, time
from actors.link import Listener
from actors.mailbox import MailboxPlanners
from tests.actors.mailboxes import SMALL
from tests.actors.mailboxes import requests

mailbox = MailboxPlanners(4)
with Listener() as listener:
    name, token = listener.invitation
    print(name, token.hex(), flush=True)
    mailbox.attach(listener.accept(SMALL, lambda: False))
mailbox.submit(requests(3))
print("asked", flush=True)
time.sleep(3600)
"""


def test_a_pool_process_killed_in_the_middle_costs_what_it_had_and_another_is_attached() -> None:
    mailbox = MailboxPlanners(4, shed=False)
    asked = make_requests(CHECKPOINT, 3)
    for turn in range(2):
        with Listener() as listener:
            name, token = listener.invitation
            with python(POOL_PROCESS, name, token.hex()) as process:
                link = listener.accept(SLOTS, lambda process=process: process.poll() is not None)
                assert link is not None
                mailbox.attach(link)
                first, second, third = (dataclasses.replace(r, request_id=10 * turn + r.request_id) for r in asked)
                slow = dataclasses.replace(third, generation_id="slow")
                mailbox.submit([first, second, slow])
                assert ids(mailbox.wait([second.request_id]).plans) == [first.request_id, second.request_id]
                os.kill(process.pid, signal.SIGKILL)
                assert ids(mailbox.wait([slow.request_id]).lost) == [slow.request_id]
    assert mailbox.stats()["lost_with_peer"] == 2
    mailbox.close()


def test_a_generator_process_killed_ends_the_bridge() -> None:
    with python(GENERATOR_PROCESS) as process:
        assert process.stdout is not None
        name, token = process.stdout.readline().split()
        pool = FakePool(lambda batch: Arrivals())
        bridge = Bridge(connect((name, bytes.fromhex(token))), pool)
        thread = threading.Thread(target=bridge.run)
        thread.start()
        assert process.stdout.readline() == "asked\n"
        until(lambda: len(pool.batches) == 1)
        os.kill(process.pid, signal.SIGKILL)
        thread.join(60)
        assert not thread.is_alive()
    # The views that the pool may still look at are good: the memory goes with the last of them.
    np.testing.assert_array_equal(pool.batches[0][2].hidden_LD, requests(3)[2].hidden_LD)


def test_a_pool_process_ends_with_its_generator() -> None:
    with Listener() as listener:
        name, token = listener.invitation
        with python(POOL_PROCESS, name, token.hex()) as process:
            link = listener.accept(SMALL, lambda: process.poll() is not None)
            assert link is not None and process.stdout is not None
            link.close()
            assert process.stdout.read().split() == ["here", "ended"]
            assert process.wait(60) == 0
