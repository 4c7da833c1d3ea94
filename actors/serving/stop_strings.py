"""Stop strings in a text that comes in pieces.

The text ends before the stop string that is complete first (of several that are complete with the same character, the
one that began first). How the text is cut into pieces changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through that cannot belong to a stop string any more.

    Invariant: ``released`` is never ahead of what a whole-text search would keep.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False
        """A stop string came; nothing is let through any more."""

    def push(self, text: str) -> str:
        """What one more piece lets through."""
        if self.stopped:
            return ""
        buffer = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := buffer.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return buffer[: min(found)[1]]
        keep = self._beginning_at_end(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, buffer: str) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(buffer)), 0, -1):
            end = buffer[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
