"""Tokens on disk: a folder of shards with an index that tells everything about them.

    index.json      written last: what it lists is whole
    tokenizer.json  that wrote the tokens
    card.md         the same for people
    shards/books-train-00000.bin

A shard is a plain little-endian array of ``uint16``, or of ``uint32`` for a vocabulary beyond 65,536. The shards of one
source and split, in their order, are one stream of documents, each closed by the end of text; all are of one size but
the last. A document may begin in one shard and end in the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "index.json"
TOKENIZER = "tokenizer.json"
CARD = "card.md"
FOLDER = "shards"
FORMAT = 1


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of a shard that holds every token."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file beside its place and renames it: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_stream(
    folder: Path, source: str, split: str, pieces: Iterable[np.ndarray], *, eos_id: int, shard_tokens: int, dtype: Any
) -> list[dict[str, Any]]:
    """Writes the shards of one source and split, and returns their entries in the index.

    Args:
        folder: of the index.
        source: name of the source.
        split: ``train`` or ``valid``.
        pieces: tokens, in order; however they are cut, the shards are the same.
        eos_id: closes a document.
        shard_tokens: of every shard but the last.
        dtype: of a shard.
    """
    entries: list[dict[str, Any]] = []
    waiting: list[np.ndarray] = []
    count = 0

    def flush(size: int) -> None:
        nonlocal waiting, count
        whole = np.concatenate(waiting).astype(dtype, copy=False)
        shard, rest = whole[:size], whole[size:]
        name = f"{FOLDER}/{source}-{split}-{len(entries):05d}.bin"
        data = memoryview(shard.tobytes())
        write_whole(folder / name, data)
        entries.append(
            {
                "file": name,
                "source": source,
                "split": split,
                "tokens": len(shard),
                "documents": int((shard == eos_id).sum()),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        waiting, count = [rest], len(rest)

    for piece in pieces:
        waiting.append(np.asarray(piece, dtype))
        count += len(piece)
        while count >= shard_tokens:
            flush(shard_tokens)
    if count:
        flush(count)
    return entries


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one source and split, over all their shards."""

    source: str
    split: str
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return sum(self.sizes)

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [
            np.memmap(path, self.dtype, mode="r", shape=(size,))
            for path, size in zip(self.paths, self.sizes, strict=True)
        ]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.sizes)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens from ``start`` on, fewer where the stream ends. (count,) int64"""
        stop = min(start + count, len(self))
        pieces = []
        while start < stop:
            shard = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[shard]) - self.sizes[shard]
            piece = self._maps[shard][start - first : stop - first]
            pieces.append(np.asarray(piece, np.int64))
            start += len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


@dataclass(frozen=True)
class TokenShards:
    """A folder of shards; open it with :func:`open_shards`."""

    folder: Path
    index: dict[str, Any]

    @property
    def eos_id(self) -> int:
        return int(self.index["tokenizer"]["eos_id"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.index["tokenizer"]["fingerprint"])

    @property
    def identity(self) -> str:
        """Tells two folders apart by their tokens: a hash of the shards' hashes."""
        listed = [(entry["file"], entry["sha256"]) for entry in self.index["shards"]]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def streams(self, split: str) -> dict[str, TokenStream]:
        """The sources that have tokens in a split, in the order of the index."""
        dtype = np.dtype(self.index["dtype"])
        found: dict[str, TokenStream] = {}
        for source in dict.fromkeys(entry["source"] for entry in self.index["shards"]):
            entries = [e for e in self.index["shards"] if e["source"] == source and e["split"] == split]
            if entries:
                paths = tuple(self.folder / entry["file"] for entry in entries)
                found[source] = TokenStream(source, split, paths, tuple(entry["tokens"] for entry in entries), dtype)
        return found


def open_shards(folder: str | Path, *, verify: bool = True) -> TokenShards:
    """Reads the index and checks the shards.

    Args:
        folder: that holds the index.
        verify: reads every shard and compares its hash; otherwise only its size.

    Raises:
        ValueError: no index, one of another format, or a shard that is missing, cut short or changed; it is named.
    """
    folder = Path(folder).expanduser()
    index = read_index(folder)
    width = np.dtype(index["dtype"]).itemsize
    for entry in index["shards"]:
        path = folder / entry["file"]
        try:
            found = path.stat().st_size
            if found != entry["tokens"] * width:
                raise ValueError(f"shard {str(path)!r} has {found} bytes; its index names {entry['tokens'] * width}")
            if verify:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != entry["sha256"]:
                    raise ValueError(
                        f"shard {str(path)!r} is corrupt: its sha256 is {digest[:16]}…; its index names "
                        f"{entry['sha256'][:16]}…"
                    )
        except OSError as error:
            raise ValueError(f"shard {str(path)!r} cannot be read: {error.strerror}") from error
    return TokenShards(folder, index)


def read_index(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is none, or it is not one of token shards.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be read: {error.strerror}; allowed: a folder that jobs.prepare_data has finished"
        ) from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(index, Mapping) or index.get("format") != FORMAT or "shards" not in index:
        raise ValueError(f"{str(path)!r} is not an index of token shards; allowed: format {FORMAT}")
    return dict(index)
