"""Saved generations by handle, for a time and within a number of bytes. No Ray, no threads.

A handle is a name; the state behind it is a value: it can be started from any number of times (fork), handed out to
another generator (migrate), and is gone when its time is over. A state may have an owner, whom alone it is found for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from crsm.saved_generation import SavedGeneration


@dataclass(frozen=True, slots=True)
class StateHandle:
    """What a caller is given."""

    handle: str
    generation_id: str
    position: int
    """Of the last token that was said."""
    num_bytes: int
    seconds: float
    """To live, from now on."""


@dataclass(frozen=True, slots=True)
class _Entry:
    saved: SavedGeneration
    until: float
    owner: str


class StateStore:
    """Of the states that do not fit, the owner's own go first, and of these the ones that end first."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._clock = max_bytes, clock
        self._entries: dict[str, _Entry] = {}

    @property
    def num_bytes(self) -> int:
        return sum(entry.saved.num_bytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, saved: SavedGeneration, seconds: float, owner: str = "") -> StateHandle:
        """Keeps a state, which only ``owner`` finds again.

        Raises:
            ValueError: ``seconds`` is not above 0, or the state alone is larger than the store.
        """
        if not seconds > 0:
            raise ValueError(f"seconds = {seconds}; allowed: above 0")
        if saved.num_bytes > self._max_bytes:
            raise ValueError(f"the state has {saved.num_bytes} bytes; allowed: at most {self._max_bytes}")
        self._expire()
        for handle in sorted(self._entries, key=lambda handle: self._rank(self._entries[handle], owner)):
            if self.num_bytes + saved.num_bytes <= self._max_bytes:
                break
            del self._entries[handle]
        handle = uuid.uuid4().hex
        self._entries[handle] = _Entry(saved, self._clock() + seconds, owner)
        return self.describe(handle, owner)

    def describe(self, handle: str, owner: str = "") -> StateHandle:
        """What a caller is told of a state.

        Raises:
            ValueError: as :meth:`get`.
        """
        saved = self.get(handle, owner)
        seconds = self._entries[handle].until - self._clock()
        return StateHandle(handle, saved.generation_id, saved.position, saved.num_bytes, seconds)

    def get(self, handle: str, owner: str = "") -> SavedGeneration:
        """The state behind a handle.

        Raises:
            ValueError: there is none, its time is over, or it is another owner's.
        """
        self._expire()
        if handle not in self._entries or self._entries[handle].owner != owner:
            raise ValueError(f"state {handle!r} is not known, or its time is over; allowed: a handle of this generator")
        return self._entries[handle].saved

    def drop(self, handle: str, owner: str = "") -> bool:
        """Forgets a state; whether there was one."""
        self._expire()
        if handle not in self._entries or self._entries[handle].owner != owner:
            return False
        del self._entries[handle]
        return True

    def resize(self, max_bytes: int) -> None:
        """Another bound from now on; what is there stays until there is more to keep."""
        self._max_bytes = max_bytes

    @staticmethod
    def _rank(entry: _Entry, owner: str) -> tuple[bool, float]:
        """Who goes first for a state of this owner's: nobody can push out others' while there are states of his own."""
        return entry.owner != owner, entry.until

    def _expire(self) -> None:
        now = self._clock()
        self._entries = {handle: entry for handle, entry in self._entries.items() if entry.until > now}
