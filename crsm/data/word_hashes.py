"""Words and word n-grams as 64-bit numbers: what near duplicates and contamination are looked for with.

A word is a run of letters, digits and underscores, case folded; punctuation and white space do not count. Hashes are
the same in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

import numpy as np

_WORD = re.compile(r"\w+")
_MAX_KEPT = 1 << 20
"""Words that are remembered; natural text has fewer."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class _Hashes(dict[str, int]):
    """Hash of each word, computed once."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if len(self) < _MAX_KEPT:
            self[word] = value
        return value


_HASHES = _Hashes()


def split_words(text: str) -> list[str]:
    """The words of a text, case folded."""
    return _WORD.findall(text.casefold())


def hash_words(words: list[str]) -> np.ndarray:
    """(W,) uint64"""
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def hash_ngrams(words_W: np.ndarray, lengths: Collection[int]) -> dict[int, np.ndarray]:
    """Hashes of all runs of so many words, in order, by their length; (W - length + 1,) uint64 each, or none."""
    found: dict[int, np.ndarray] = {}
    running = words_W.copy()
    for length in range(1, max(lengths, default=0) + 1):
        count = len(words_W) - length + 1
        if count <= 0:
            running = words_W[:0]
        elif length > 1:
            running = running[:count] * _MULTIPLIER
            running += words_W[length - 1 :]
        if length in lengths:
            found[length] = _mixed(running)
    return found


def _mixed(hashes: np.ndarray) -> np.ndarray:
    mixed = hashes ^ (hashes >> np.uint64(31))
    mixed *= _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    return mixed
