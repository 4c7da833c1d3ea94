"""Overlap of training text with evaluation sets: a unit that holds an n-gram of an evaluation text is left out.

Words are compared case folded and without punctuation. An evaluation text shorter than an n-gram counts as a whole if
it is not too short to mean anything; how many are, is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from crsm.data.word_hashes import hash_ngrams, hash_words, split_words
from crsm.data_config import DecontaminationConfig

_BITS = 22
"""Of the first look-up: a table that stays in the cache and passes on the few n-grams that may be known."""


@dataclass(frozen=True, slots=True)
class Match:
    """An n-gram that a training text shares with an evaluation text."""

    word: int
    """Where it begins in the training text."""
    length: int
    evaluation: str
    """Name of the set."""
    example: int
    """Of the set, counted from 0."""


@dataclass
class _Table:
    hashes: np.ndarray
    """Sorted. (M,) uint64"""
    owners: np.ndarray
    """Set and example of each. (M, 2) int32"""
    seen: np.ndarray
    """Whether a hash that begins with these bits is in the table. (2 ** _BITS,) bool"""


@dataclass
class Contamination:
    """The n-grams of all evaluation sets, by their length."""

    names: list[str] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)
    too_short: dict[str, int] = field(default_factory=dict)
    """Texts that were left out of the comparison."""
    _tables: dict[int, _Table] = field(default_factory=dict)

    @classmethod
    def build(cls, sets: Iterable[tuple[str, Iterable[str]]], config: DecontaminationConfig) -> Contamination:
        """
        Args:
            sets: name and texts of every evaluation set; texts of one example are joined by a blank line.
            config: length of an n-gram.
        """
        self = cls()
        found: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for number, (name, texts) in enumerate(sets):
            self.names.append(name)
            self.examples[name] = self.too_short[name] = 0
            for example, text in enumerate(texts):
                self.examples[name] += 1
                words = split_words(text)
                length = min(config.ngram, len(words))
                if length < min(config.min_words, config.ngram):
                    self.too_short[name] += 1
                    continue
                hashes = hash_ngrams(hash_words(words), (length,))[length]
                owners = np.tile(np.array([number, example], np.int32), (len(hashes), 1))
                entry = found.setdefault(length, ([], []))
                entry[0].append(hashes)
                entry[1].append(owners)
        for length, (hash_lists, owner_lists) in found.items():
            hashes, first = np.unique(np.concatenate(hash_lists), return_index=True)
            seen = np.zeros(1 << _BITS, bool)
            seen[hashes >> np.uint64(64 - _BITS)] = True
            self._tables[length] = _Table(hashes, np.concatenate(owner_lists)[first], seen)
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the n-grams that ``find`` needs."""
        return tuple(sorted(self._tables))

    def find(self, ngrams: Mapping[int, np.ndarray]) -> list[Match]:
        """All places of a text where an n-gram of an evaluation text stands, the longest n-grams first.

        Args:
            ngrams: hashes of the text's n-grams, of all ``lengths``.
        """
        found: list[Match] = []
        for length in reversed(self.lengths):
            table, hashes = self._tables[length], ngrams[length]
            maybe = np.flatnonzero(table.seen[hashes >> np.uint64(64 - _BITS)])
            if not len(maybe):
                continue
            place = np.minimum(np.searchsorted(table.hashes, hashes[maybe]), len(table.hashes) - 1)
            for hit in np.flatnonzero(table.hashes[place] == hashes[maybe]).tolist():
                number, example = table.owners[place[hit]].tolist()
                found.append(Match(int(maybe[hit]), length, self.names[number], example))
        return found
