"""Stop strings in a text that comes in pieces.

The text ends before the stop string that is complete first (of several that are complete with the same character, the
one that began first). How the text is cut into pieces changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through that cannot belong to a stop string any more. A character costs a step or two per stop string,
    however long they are (Knuth, Morris and Pratt)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops if stop]
        self._matched = [0] * len(self._stops)
        """Characters of each stop string that the text ends with."""
        self._held = ""
        self.stopped = False
        """A stop string came; nothing is let through any more."""

    def push(self, text: str) -> str:
        """What one more piece lets through."""
        if self.stopped:
            return ""
        buffer, matched = self._held + text, self._matched
        for end, character in enumerate(text, len(self._held) + 1):
            complete = 0
            for index, (stop, borders) in enumerate(self._stops):
                length = matched[index]
                while length and stop[length] != character:
                    length = borders[length - 1]
                length += stop[length] == character
                matched[index] = length
                if length == len(stop):
                    complete = max(complete, length)
            if complete:
                self.stopped, self._held = True, ""
                return buffer[: end - complete]
        keep = len(buffer) - max(matched, default=0)
        self._held = buffer[keep:]
        return buffer[:keep]

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For every beginning, the length of its longest proper beginning that it also ends with."""
    borders, length = [0], 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = borders[length - 1]
        length += stop[length] == character
        borders.append(length)
    return borders
