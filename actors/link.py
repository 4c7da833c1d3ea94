"""What generator and pool share: a segment of memory, cut into slots, and a socket.

Invariants:

* neither has a name that could be left behind: the segment is a ``memfd``, handed over through the socket, and the
  socket's address is an abstract one. Both are gone with the processes that hold them, however these end;
* the segment's size is sealed: neither side can cut it off under the other;
* only a process of the same user that knows the token is let in;
* a slot belongs to one side at a time: to the generator while it is free or being written, to the pool from the message
  that names it until the message that settles its request. No slot is waited for, and none needs a lock.

A packet socket keeps the bounds of messages and says at once when the other side is gone, killed or not.
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.records import MESSAGE_BYTES, Malformed

PAGE = mmap.PAGESIZE
_COUNTERS = PAGE
"""Bytes before the first slot."""
_HELLO = struct.Struct("<4sI32s")
_WELCOME = struct.Struct("<4sIQQ")
_MAGIC = b"CRSM"
_FORMAT = 1
"""Of handshake, messages and records."""
_HANDSHAKE_TIMEOUT = 10.0
_READY_BYTES = 2**25
"""So much of the segment has its pages from the start, and not when the decode thread first writes to them."""
_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and newer; Python has no name for it yet."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Size of a segment. Pages that nobody writes to take no memory."""

    slots: int
    slot_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.slots < 2**31 or not 1 <= self.slot_bytes < 2**48:
            raise ValueError(f"slots = {self.slots}, slot_bytes = {self.slot_bytes}; allowed: at least 1 each")

    @property
    def stride(self) -> int:
        return -(-self.slot_bytes // PAGE) * PAGE

    @property
    def num_bytes(self) -> int:
        return _COUNTERS + self.slots * self.stride


class Link:
    """One end: the socket, the slots as buffers, and a counter of the messages that the pool has sent.

    The counter tells the generator without a system call that nothing has come.
    """

    def __init__(self, connection: socket.socket, segment: mmap.mmap, geometry: Geometry) -> None:
        self.connection, self.geometry = connection, geometry
        whole = memoryview(segment)
        self.sent = whole[:8].cast("Q")
        stride, size = geometry.stride, geometry.slot_bytes
        places = range(_COUNTERS, _COUNTERS + geometry.slots * stride, stride)
        self.slots = [whole[place : place + size] for place in places]

    def hang_up(self) -> None:
        """Both sides hear that the link has ended. May be called from any thread, and again."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was quicker
            pass

    def close(self) -> None:
        """Hangs up and gives the socket back; the memory goes when nobody looks at it any more."""
        self.hang_up()
        self.connection.close()


class Listener:
    """Where the pool finds the generator, for one meeting."""

    def __init__(self) -> None:
        self._token = secrets.token_bytes(32)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = f"crsm-{secrets.token_hex(16)}"
        self._socket.bind(f"\0{name}")
        self._socket.listen(8)
        self.invitation = (name, self._token)
        """For :func:`connect`."""

    def accept(self, geometry: Geometry, give_up: Callable[[], bool], timeout: float = 60.0) -> Link | None:
        """Waits for whoever was invited; None: nobody came in time, or ``give_up`` said so."""
        until = time.monotonic() + timeout
        events = select.poll()
        events.register(self._socket, select.POLLIN)
        while not give_up() and time.monotonic() < until:
            if not events.poll(100):
                continue
            connection, _ = self._socket.accept()
            try:
                if (link := self._welcome(connection, geometry)) is not None:
                    return link
            except OSError:  # gone again
                pass
            connection.close()
        return None

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _welcome(self, connection: socket.socket, geometry: Geometry) -> Link | None:
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        connection.settimeout(_HANDSHAKE_TIMEOUT)
        hello = connection.recv(_HELLO.size + 1)
        if user != os.geteuid() or not hmac.compare_digest(hello, _HELLO.pack(_MAGIC, _FORMAT, self._token)):
            return None
        return give_link(connection, geometry)


def give_link(connection: socket.socket, geometry: Geometry) -> Link:
    """The generator's end over a socket whose other end :func:`take_link` has: makes the segment and hands it over."""
    descriptor = os.memfd_create("crsm-mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, geometry.num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        segment = _map(descriptor, geometry)
        welcome = _WELCOME.pack(_MAGIC, _FORMAT, geometry.slots, geometry.slot_bytes)
        socket.send_fds(connection, [welcome], [descriptor])
    finally:
        os.close(descriptor)
    connection.setblocking(False)
    return Link(connection, segment, geometry)


def _map(descriptor: int, geometry: Geometry) -> mmap.mmap:
    segment = mmap.mmap(descriptor, geometry.num_bytes)
    try:
        segment.madvise(_MADV_POPULATE_WRITE, 0, min(geometry.num_bytes, _READY_BYTES))
    except OSError:  # an older kernel: pages come when they are needed
        pass
    return segment


def take_link(connection: socket.socket) -> Link:
    """The pool's end.

    Raises:
        Malformed: the other side speaks something else.
        OSError: it is gone.
    """
    connection.settimeout(_HANDSHAKE_TIMEOUT)
    welcome, descriptors, _, _ = socket.recv_fds(connection, _WELCOME.size + 1, 1)
    try:
        if len(welcome) != _WELCOME.size or len(descriptors) != 1:
            raise Malformed(f"a welcome of {len(welcome)} bytes with {len(descriptors)} descriptors")
        magic, version, slots, slot_bytes = _WELCOME.unpack(welcome)
        if (magic, version) != (_MAGIC, _FORMAT):
            raise Malformed(f"magic {magic!r}, format {version}; allowed: {_MAGIC!r}, {_FORMAT}")
        try:
            geometry = Geometry(slots, slot_bytes)
            segment = _map(descriptors[0], geometry)
        except ValueError as error:
            raise Malformed(f"a segment of {slots} slots of {slot_bytes} bytes: {error}") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    connection.settimeout(None)
    return Link(connection, segment, geometry)


def connect(invitation: tuple[str, bytes]) -> Link:
    """The pool's end, by the generator's invitation.

    Raises:
        OSError, Malformed: nobody is there, or somebody else.
    """
    name, token = invitation
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_HANDSHAKE_TIMEOUT)
        connection.connect(f"\0{name}")
        connection.send(_HELLO.pack(_MAGIC, _FORMAT, token))
        return take_link(connection)
    except BaseException:
        connection.close()
        raise


def new_buffer() -> bytearray:
    """For receiving: larger than any message, so that one that is too long is seen to be."""
    return bytearray(MESSAGE_BYTES + 1)
