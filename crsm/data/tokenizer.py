"""Text to token ids and back: the closed vocabulary of the tasks, or a byte-level BPE.

Both are ``tokenizer.json`` files of the ``tokenizers`` library and share these conventions: ``<pad>`` is 0, ``<eos>``
is 1, and each verdict is one token. A closed vocabulary refuses words that it does not know instead of mapping them
all to one; a BPE has every byte, so it writes any text, and never reads a special token out of a user's text.

A byte-level BPE from elsewhere keeps its ids and its own end of text, and gets what it lacks after its last id. As it
came with imported weights, without verdicts, it serves to ask and to measure a model, not to train one.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from crsm.config import TokenizerConfig
from crsm.tasks.base import (
    EOS,
    PAD,
    TOKEN_RIGHT,
    TOKEN_WRONG,
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Task,
    problems,
)

Kind = Literal["closed", "bpe"]

FOREIGN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
"""What tokenizers from elsewhere call the end of a text."""

MIN_BPE_ENTRIES = 256 + 4
"""Every byte and the four special tokens."""

_SPECIALS: dict[Kind, tuple[str, ...]] = {"closed": (PAD, EOS), "bpe": (PAD, EOS, TOKEN_RIGHT, TOKEN_WRONG)}
_VERDICTS: dict[Kind, tuple[str, str]] = {
    "closed": (VERDICT_WRONG, VERDICT_RIGHT),
    "bpe": (TOKEN_WRONG, TOKEN_RIGHT),
}
_KIND_OF_MODEL: dict[str, Kind] = {"WordLevel": "closed", "BPE": "bpe"}

_FOREIGN_PADS = ("<|padding|>", "<|pad|>")
_NO_TEXT = "\N{REPLACEMENT CHARACTER}".encode()
"""What a token says that only pads a foreign model's embedding."""

# GPT-2's pattern, but for digits: each is a piece of its own, so that numbers are written the same way everywhere.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CORPUS_PROBLEMS = 10_000
"""Training problems of each task that a BPE is trained on."""


class Tokenizer:
    """One vocabulary; build it with ``closed``, ``train_bpe``, ``load`` or ``build_tokenizer``.

    Args:
        backend: the tokenizer of the ``tokenizers`` library.
        source: what an error message calls it.

    Raises:
        ValueError: the tokenizer does not follow the conventions of this module.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer") -> None:
        model = type(backend.model).__name__
        if model not in _KIND_OF_MODEL:
            raise ValueError(f"{source} is a {model} model; allowed: {', '.join(_KIND_OF_MODEL)}")
        self.kind: Kind = _KIND_OF_MODEL[model]
        self._backend = backend
        # The text of a user must not be able to end a document or to pass a verdict.
        self._backend.encode_special_tokens = True
        self._ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._tokens = [token for token, _ in sorted(self._ids.items(), key=lambda item: item[1])]
        if sorted(self._ids.values()) != list(range(len(self._ids))):
            raise ValueError(f"{source} has gaps between its token ids; allowed: 0 to n - 1, each once")
        specials = _SPECIALS[self.kind]
        verdicts = _VERDICTS[self.kind]
        foreign = next((name for name in FOREIGN_EOS if name in self._ids), None) if self.kind == "bpe" else None
        self._eos = EOS if foreign is None or EOS in self._ids else foreign
        self.is_foreign = self._eos != EOS
        self.has_verdicts = all(token in self._ids for token in verdicts)
        self._pad = next((token for token in (PAD, *_FOREIGN_PADS) if token in self._ids), self._eos)
        for index, token in enumerate(() if self.is_foreign else specials):
            if self._ids.get(token) != index:
                raise ValueError(f"{source} has {token!r} at id {self._ids.get(token)}; allowed: id {index}")
        for token in () if self.is_foreign else verdicts:
            if token not in self._ids:
                raise ValueError(
                    f"{source} lacks the verdict token {token!r}; allowed: a vocabulary made by this project"
                )
        self._words = {token: i for token, i in self._ids.items() if token not in specials}
        self._bytes: list[bytes] = []
        if self.kind == "bpe":
            try:
                added = {str(token.content) for token in backend.get_added_tokens_decoder().values()}
                self._bytes = _token_bytes(self._tokens, added.union(specials))
            except KeyError as error:
                raise ValueError(f"{source} writes {error.args[0]!r} in a token; allowed: a byte-level BPE") from None

    @classmethod
    def closed(cls, words: Iterable[str]) -> Tokenizer:
        """A vocabulary of ``<pad>``, ``<eos>`` and these words, in this order, repetitions left out."""
        vocabulary = {token: i for i, token in enumerate(dict.fromkeys([PAD, EOS, *words]))}
        for word in vocabulary:
            if word.split() != [word]:
                raise ValueError(f"{word!r} cannot be a word of a closed vocabulary; allowed: text without white space")
        # No unknown token: its name is in no vocabulary, so that even the bare library refuses an unknown word.
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([PAD, EOS])
        return cls(backend)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE of at most ``vocab_size`` entries; the same texts give the same tokenizer.

        Raises:
            ValueError: ``vocab_size`` has no room for every byte and the special tokens.
        """
        if vocab_size < MIN_BPE_ENTRIES:
            raise ValueError(f"tokenizer.vocab_size = {vocab_size}; allowed: at least {MIN_BPE_ENTRIES} for a BPE")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIALS["bpe"]),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a ``tokenizer.json``.

        Raises:
            ValueError: the file is missing, cut short, or not one of this project's tokenizers.
        """
        source = f"tokenizer file {str(path)!r}"
        return cls.from_json(_read(path, source), source)

    @classmethod
    def adopt(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of any ``tokenizer.json`` that is a byte-level BPE; one of this project's as it is.

        Padding and verdicts are added after the last id, so that the ids of a public checkpoint keep their meaning.

        Raises:
            ValueError: the file cannot be read, is no byte-level BPE, or has no end of text.
        """
        source = f"tokenizer file {str(path)!r}"
        tree = _read_tree(_read(path, source), source)
        known = {entry["content"]: entry["id"] for entry in tree.get("added_tokens", ())}
        known.update(tree["model"].get("vocab", {}) if isinstance(tree["model"].get("vocab"), dict) else {})
        missing = [token for token in (PAD, TOKEN_RIGHT, TOKEN_WRONG) if token not in known]
        if missing and EOS not in known and not known.keys().isdisjoint(FOREIGN_EOS):
            backend = _backend(json.dumps(tree), source)
            backend.add_special_tokens(missing)
            return cls(backend, source)
        return cls(_backend(json.dumps(tree), source), source)

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer") -> Tokenizer:
        """The tokenizer that ``to_json`` wrote."""
        _read_tree(text, source)
        return cls(_backend(text, source), source)

    def to_json(self) -> str:
        """The content of a ``tokenizer.json``."""
        return str(self._backend.to_str(pretty=True))

    def save(self, path: str | Path) -> None:
        """Writes a ``tokenizer.json``, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer.from_json, (self.to_json(),)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def pad_id(self) -> int:
        return self._ids[self._pad]

    @property
    def eos_id(self) -> int:
        return self._ids[self._eos]

    @property
    def fingerprint(self) -> str:
        """Tells two tokenizers apart: sha256 of the JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def byte_counts(self) -> np.ndarray:
        """Bytes of text behind each token; none behind a special one. (V,) int64"""
        specials = {self.pad_id, *self.terminal_ids}
        pieces = self._bytes if self.kind == "bpe" else [f" {token}".encode() for token in self._tokens]
        return np.array([0 if i in specials else len(piece) for i, piece in enumerate(pieces)], np.int64)

    @property
    def terminal_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the verdicts, if there are any, and the end of text, ascending."""
        verdicts = (self.verdict_id(False), self.verdict_id(True)) if self.has_verdicts else ()
        return tuple(sorted((self.eos_id, *verdicts)))

    def verdict_id(self, correct: bool) -> int:
        """The token that claims an answer to be right, or wrong.

        Raises:
            ValueError: a foreign vocabulary has none.
        """
        if not self.has_verdicts:
            lacking = " and ".join(map(repr, _VERDICTS[self.kind]))
            raise ValueError(f"the tokenizer lacks the verdict tokens {lacking}; allowed: a vocabulary that has them")
        return self._ids[_VERDICTS[self.kind][bool(correct)]]

    def token(self, token_id: int) -> str:
        """One token for display; bytes that are no whole character show as a replacement character."""
        return self.decode([token_id])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the text is empty, or holds what the vocabulary cannot write (named, with what is allowed).
        """
        if self.kind == "closed":
            words = text.split()
            if not words:
                raise ValueError(f"the text is empty; allowed: words out of {self._allowed()}")
            try:
                return [self._words[word] for word in words]
            except KeyError:
                unknown = list(dict.fromkeys(word for word in words if word not in self._words))
                shown = ", ".join(repr(word[:40]) for word in unknown[:5]) + (", …" if len(unknown) > 5 else "")
                raise ValueError(
                    f"unknown word{'s' if len(unknown) > 1 else ''} {shown}; allowed: {self._allowed()}"
                ) from None
        if not text:
            raise ValueError("the text is empty; allowed: at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"character {text[error.start]!a} is half of a surrogate pair; allowed: Unicode") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the character of the text at which each begins (with white space or not).

        Raises:
            ValueError: as :meth:`encode`.
        """
        ids = self.encode(text)
        if self.kind == "closed":
            return ids, [match.start() for match in re.finditer(r"\S+", text)]
        return ids, [start for start, _ in self._backend.encode(text, add_special_tokens=False).offsets]

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts of an open vocabulary; they must be Unicode and may be empty."""
        return [list(entry.ids) for entry in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, special ones included; bytes that are not UTF-8 become replacement characters.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        stream = self.stream()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream(self) -> StreamDecoder:
        """A decoder that is fed one token at a time."""
        return StreamDecoder(self)

    def _piece(self, token_id: int) -> str | bytes:
        if self.is_foreign and token_id >= len(self._tokens):
            return _NO_TEXT
        if not 0 <= token_id < len(self._tokens):
            raise ValueError(f"token id {token_id}; allowed: 0 to {len(self._tokens) - 1}")
        return self._bytes[token_id] if self.kind == "bpe" else self._tokens[token_id]

    def _allowed(self) -> str:
        """The words of the vocabulary, runs of numbers drawn together."""
        names = [word for word in self._tokens if word in self._words and not word.isdecimal()]
        numbers = sorted(int(word) for word in self._words if word.isdecimal())
        runs: list[list[int]] = []
        for number in numbers:
            if runs and runs[-1][-1] == number - 1:
                runs[-1][-1] = number
            else:
                runs.append([number, number])
        return " ".join(names + [f"{low}" if low == high else f"{low}…{high}" for low, high in runs])


class StreamDecoder:
    """Turns tokens into text as they come; the pieces joined are what ``Tokenizer.decode`` gives.

    Bytes that may be the beginning of a character are held back until the character is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def push(self, token_id: int) -> str:
        """The text that one more token completes; may be empty."""
        piece = self._tokenizer._piece(int(token_id))
        if isinstance(piece, bytes):
            return self._utf8.decode(piece)
        text = piece if self._first else f" {piece}"
        self._first = False
        return text

    def flush(self) -> str:
        """What is still held back, at the end."""
        return self._utf8.decode(b"", final=True)


def build_tokenizer(config: TokenizerConfig, tasks: Sequence[Task], seed: int = 0) -> Tokenizer:
    """The tokenizer of a run: the words of its tasks, or a BPE trained on the text of their training problems.

    Raises:
        ValueError: a closed vocabulary is asked for a task whose text is open, or a file is no byte-level BPE.
    """
    if config.kind == "file":
        assert config.path is not None
        return Tokenizer.adopt(config.path)
    if config.kind == "closed":
        words: list[str] = []
        for task in tasks:
            if not task.words():
                raise ValueError(f"tokenizer.kind = 'closed' cannot write task {task.name!r} (open text); allowed: bpe")
            words += task.words()
        return Tokenizer.closed(words)
    texts = (
        f"{problem.prompt}{problem.solution}"
        if problem.solution[:1].isspace()
        else f"{problem.prompt} {problem.solution}"
        for task in tasks
        for problem in problems(task, seed, "train", _CORPUS_PROBLEMS)
    )
    return Tokenizer.train_bpe(texts, config.vocab_size)


def _read(path: str | Path, source: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not text; allowed: a tokenizer.json") from error


def _read_tree(text: str, source: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is cut short or not JSON; allowed: a whole tokenizer.json") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ValueError(f"{source} holds no tokenizer model; allowed: a tokenizer.json")
    return tree


def _backend(text: str, source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exception.
        raise ValueError(f"{source} is not a tokenizer.json: {error}") from error


def _token_bytes(tokens: Sequence[str], added: Collection[str]) -> list[bytes]:
    """The bytes behind each entry of a byte-level vocabulary, which writes every byte as a printable character; added
    tokens are written as they are."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return [token.encode() if token in added else bytes(byte_of[character] for character in token) for token in tokens]
