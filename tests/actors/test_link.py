"""What the two sides share: who is let in, and that nothing can be cut off or left behind."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from pathlib import Path

import pytest

from actors.link import Geometry, Link, Listener, connect, give_link, take_link
from actors.records import Malformed
from tests.actors.mailboxes import SMALL, link_pair


def meet(invitation: tuple[str, bytes], listener: Listener, timeout: float) -> tuple[Link | None, list[object]]:
    """The generator's end, and the pool's or its error."""
    found: list[object] = []

    def come() -> None:
        try:
            found.append(connect(invitation))
        except (OSError, Malformed) as error:
            found.append(error)

    thread = threading.Thread(target=come)
    thread.start()
    link = listener.accept(SMALL, lambda: False, timeout)
    thread.join()
    return link, found


def test_both_ends_see_the_same_slots_and_the_same_counter() -> None:
    with Listener() as listener:
        generators, (pools,) = meet(listener.invitation, listener, 30)
    assert generators is not None and isinstance(pools, Link)
    assert generators.geometry == pools.geometry == SMALL
    generators.slots[3][:5] = b"hello"
    pools.sent[0] += 2
    assert bytes(pools.slots[3][:5]) == b"hello" and generators.sent[0] == 2
    assert [len(slot) for slot in pools.slots] == [SMALL.slot_bytes] * SMALL.slots
    assert not bytes(pools.slots[2]).strip(b"\0")
    generators.close()
    assert pools.connection.recv(1) == b""
    pools.close()
    pools.close()


def test_who_does_not_know_the_token_is_sent_away_and_the_invited_one_still_comes() -> None:
    with Listener() as listener:
        name, token = listener.invitation
        link, (error,) = meet((name, b"x" * 32), listener, 0.5)
        assert link is None and isinstance(error, Malformed | OSError)
        link, (pools,) = meet((name, token), listener, 30)
        assert link is not None and isinstance(pools, Link)
        link.close()
        pools.close()


def test_waiting_ends_when_it_is_given_up() -> None:
    with Listener() as listener:
        assert listener.accept(SMALL, lambda: True, 3600) is None


def test_nothing_has_a_name_and_nothing_is_left(tmp_path: Path) -> None:
    before, descriptors = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    generators, pools = link_pair(Geometry(slots=64, slot_bytes=10**9))  # 60 GB that nobody writes to
    pools.slots[63][0] = 1
    assert set(os.listdir("/dev/shm")) <= before
    for link in (generators, pools):
        link.close()
    del generators, pools, link
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_segment_cannot_be_cut_off_under_the_other_side() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    generators = give_link(one, SMALL)
    _, (descriptor,), _, _ = socket.recv_fds(other, 100, 1)
    for size in (0, 10 * mmap.PAGESIZE * SMALL.num_bytes):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
    generators.close()
    other.close()


def test_a_welcome_that_is_none_is_named() -> None:
    for welcome in (b"", b"short", b"x" * 24):
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.send(welcome)
        one.close()
        with pytest.raises(Malformed, match="welcome of"):
            take_link(other)
        other.close()


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="slots = 0, slot_bytes = 5; allowed: at least 1 each"):
        Geometry(0, 5)
