"""Long documents in sections: the unit of near duplicates and of decontamination.

A cut lies before a paragraph and is decided by that paragraph alone (its hash and its length), within bounds on the
length of a section. So a chapter is cut the same way inside a book and on its own, and a change of one paragraph moves
the cuts beside it at most.
"""

from __future__ import annotations

import re
import zlib
from itertools import pairwise

_PARAGRAPH = re.compile(r"\n{2,}")
_SHORTEST, _LONGEST = 0.25, 4.0
"""A section's least and greatest length as shares of the mean one."""


def section_ends(text: str, mean_chars: int) -> list[int]:
    """Where the sections of a document end, the end of the text included; one for a document of up to two sections."""
    if len(text) <= 2 * mean_chars:
        return [len(text)]
    starts = [match.end() for match in _PARAGRAPH.finditer(text)]
    if len(starts) < len(text) / (_LONGEST * mean_chars):  # no blank lines: every line is a paragraph
        starts = [match.end() for match in re.finditer(r"\n+", text)]
    ends: list[int] = []
    last = 0
    for start, end in pairwise([*starts, len(text)]):
        length = start - last
        if length < _SHORTEST * mean_chars:
            continue
        # A paragraph begins a section with a probability in proportion to its length: about one cut every mean_chars.
        chance = zlib.crc32(text[start:end].encode("utf-8", "surrogatepass")) / 2**32
        if chance < (end - start) / mean_chars or length > _LONGEST * mean_chars:
            ends.append(start)
            last = start
    if ends and len(text) - ends[-1] < _SHORTEST * mean_chars:
        ends.pop()
    return [*ends, len(text)]


def runs_of(kept: list[bool], ends: list[int]) -> list[tuple[int, int]]:
    """The stretches (start, end) of a text whose sections are kept, neighbours drawn together."""
    stretches: list[tuple[int, int]] = []
    for keep, start, end in zip(kept, [0, *ends[:-1]], ends, strict=True):
        if keep and stretches and stretches[-1][1] == start:
            stretches[-1] = (stretches[-1][0], end)
        elif keep:
            stretches.append((start, end))
    return stretches
