"""Tokens of much text, fast: natural text repeats its words, so each is encoded once.

Where a tokenizer splits text the way GPT-2 does, its pieces end before white space, and between a word and a mark of
punctuation. So a text may be cut there (but for ``'s`` and its like): the tokens of the chunks are the tokens of the
text. Chunks are looked up in a table, and only new ones go through the tokenizer. Other tokenizers encode whole texts.
"""

from __future__ import annotations

import itertools
import json
import re

import numpy as np

from crsm.data.tokenizer import PIECES, Tokenizer

# A word, or punctuation, with the white space before it. Letters after an apostrophe stay with it: it may be a
# contraction, and what comes before it decides.
_CHUNK = re.compile(r"\s*[^\W_]+|\s*(?:[^\w\s]|_)+(?:(?<=')[^\W_]+)?|\s+")
_MAX_KNOWN = 1 << 19
"""Chunks that are remembered; when there are more, the table begins anew."""


class TextEncoder:
    """Encodes texts with one tokenizer; the tokens are those of ``Tokenizer.encode``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cuts_words = cuts_words(tokenizer)
        self._forget()

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, none for an empty one. (T,) int64"""
        if not text:
            return np.zeros(0, np.int64)
        if not self.cuts_words:
            return np.array(self.tokenizer.encode(text), np.int64)
        chunks = _CHUNK.findall(text)
        new = [chunk for chunk in dict.fromkeys(chunks) if chunk not in self._places]
        if new:
            if len(self._places) + len(new) > _MAX_KNOWN:
                self._forget()
                new = list(dict.fromkeys(chunks))
            self._learn(new)
        places = np.fromiter(map(self._places.__getitem__, chunks), np.int64, len(chunks))
        lengths = self._lengths[places]
        ends = np.cumsum(lengths)
        tokens: np.ndarray = self._tokens[
            np.repeat(self._starts[places] - (ends - lengths), lengths) + np.arange(ends[-1])
        ]
        return tokens

    def _forget(self) -> None:
        self._places: dict[str, int] = {}
        self._tokens = np.zeros(0, np.int64)
        """Of all known chunks, one after the other."""
        self._starts = np.zeros(0, np.int64)
        self._lengths = np.zeros(0, np.int64)

    def _learn(self, chunks: list[str]) -> None:
        rows = self.tokenizer.encode_each(chunks)
        self._places.update(zip(chunks, range(len(self._places), len(self._places) + len(chunks)), strict=True))
        lengths = np.array([len(row) for row in rows], np.int64)
        starts = len(self._tokens) + np.cumsum(lengths) - lengths
        self._tokens = np.concatenate([self._tokens, np.fromiter(itertools.chain.from_iterable(rows), np.int64)])
        self._starts = np.concatenate([self._starts, starts])
        self._lengths = np.concatenate([self._lengths, lengths])


def cuts_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer may be given the chunks of a text one by one: known of the splitting rules of GPT-2 and of
    this project without a prefix space, and of no normaliser but Unicode's NFC."""
    tree = json.loads(tokenizer.to_json())
    steps = tree["pre_tokenizer"] or {}
    *splits, last = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if (tree["normalizer"] or {"type": "NFC"}).get("type") != "NFC":
        return False
    if any(entry["lstrip"] or entry["rstrip"] or _is_text(entry) for entry in tree["added_tokens"]):
        return False
    if last.get("use_regex"):
        return not splits
    return [split.get("pattern") for split in splits] == [{"Regex": PIECES}]


def _is_text(added: dict[str, object]) -> bool:
    """Whether an added token is looked for in texts and is more than white space."""
    return not added["special"] and bool(str(added["content"]).strip())
