"""The parts of a corpus: stretches of an input that one task works on, and what it leaves of each.

A part is cut out of its input by the amount of text alone, so that it is the same in every run. Cleaning leaves one
parquet file for each part, whole or not at all: the clean documents, where their sections end, what is wrong with each
section, hashes, signatures and counts.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from crsm.data.cleaning import broken_rule, normalise
from crsm.data.decontamination import Contamination
from crsm.data.duplicates import signatures
from crsm.data.sections import section_ends
from crsm.data.shards import write_whole
from crsm.data.sources import Broken, Document
from crsm.data.word_hashes import hash_ngrams, hash_words, split_words
from crsm.data_config import DataConfig, SourceConfig

_NAMED = 20
"""Broken records of a part, and contaminated sections, that are named; all are counted."""
DIGEST = 16
"""Bytes of the hash that tells texts apart."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some documents of an input."""

    source: str
    input: int
    number: int
    """Of the input's parts, from 0."""
    documents: tuple[Document, ...]
    broken: tuple[Broken, ...]
    last: bool
    """Whether the input ends with it."""

    @property
    def key(self) -> str:
        return part_key(self.source, self.input, self.number)


def part_key(source: str, given: int, number: int) -> str:
    """Name of a part; parts sort by it."""
    return f"{source}-{given:05d}-{number:06d}"


def cut_parts(records: Iterable[Document | Broken], source: str, given: int, size: int) -> Iterator[Part]:
    """An input's records in parts of at least ``size`` characters but for the last one, which there always is."""
    documents: list[Document] = []
    broken: list[Broken] = []
    number = total = 0
    for record in records:
        if isinstance(record, Broken):
            broken.append(record)
            continue
        if total >= size:
            yield Part(source, given, number, tuple(documents), tuple(broken), last=False)
            documents, broken, total, number = [], [], 0, number + 1
        documents.append(record)
        total += len(record.text)
    yield Part(source, given, number, tuple(documents), tuple(broken), last=True)


@dataclass
class PartCounts:
    """What happened to the records of a part; sums over parts are those of a source."""

    records: int = 0
    broken: int = 0
    broken_named: list[str] = field(default_factory=list)
    characters: int = 0
    """Of the documents as they were read."""
    bytes: int = 0
    """The same as UTF-8."""
    mended: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    """Documents that broke a rule, by its name."""
    documents: int = 0
    """That passed."""
    sections: int = 0
    contaminated: dict[str, int] = field(default_factory=dict)
    """Sections by the name of the evaluation set."""
    contaminated_named: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: PartCounts) -> None:
        """Sums; names up to a limit."""
        for name in ("records", "broken", "characters", "bytes", "mended", "documents", "sections"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rules = dict(Counter(self.rules) + Counter(other.rules))
        self.contaminated = dict(Counter(self.contaminated) + Counter(other.contaminated))
        self.broken_named = (self.broken_named + other.broken_named)[:_NAMED]
        self.contaminated_named = (self.contaminated_named + other.contaminated_named)[: 5 * _NAMED]


@dataclass
class CleanPart:
    """The clean documents of a part with what is known of their sections (letters: U sections, P permutations)."""

    origins: list[str]
    texts: list[str]
    verdicts: list[bool | None]
    ends: list[list[int]]
    """Of the sections of each document."""
    digests: list[bytes]
    """Of every section, over all documents. (U,)"""
    contaminated: np.ndarray
    """(U,) bool"""
    signatures_UP: np.ndarray
    counts: PartCounts
    last: bool


def clean_part(part: Part, source: SourceConfig, config: DataConfig, contamination: Contamination) -> CleanPart:
    """Normalises, filters and looks at every section of a part's documents. Pure."""
    counts = PartCounts(
        records=len(part.documents) + len(part.broken),
        broken=len(part.broken),
        broken_named=[f"{record.origin} {record.reason}" for record in part.broken[:_NAMED]],
    )
    result = CleanPart([], [], [], [], [], np.zeros(0, bool), np.zeros(0, np.uint32), counts, part.last)
    shingles: list[np.ndarray] = []
    flags: list[bool] = []
    shingle = config.duplicates.ngram
    compare = config.duplicates.enabled and source.near_duplicates
    lengths = {*(contamination.lengths if source.decontaminate else ()), *((shingle,) if compare else ())}
    for document in part.documents:
        counts.characters += len(document.text)
        counts.bytes += len(document.text.encode("utf-8", "surrogatepass"))
        text, mended = normalise(document.text, repair=config.cleaning.repair)
        counts.mended += mended
        ends = section_ends(text, config.duplicates.section_chars)
        words_of = [split_words(text[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        words = [word for section in words_of for word in section]
        rule = broken_rule(text, words, config.cleaning) if source.clean else None if text else "empty"
        if rule is not None:
            counts.rules[rule] = counts.rules.get(rule, 0) + 1
            continue
        starts = np.cumsum([0, *map(len, words_of)])
        ngrams = hash_ngrams(hash_words(words), lengths) if lengths else {}
        bad = [False] * len(ends)
        for match in contamination.find(ngrams) if source.decontaminate else ():
            section = int(np.searchsorted(starts, match.word, side="right")) - 1
            # An n-gram may reach over the end of its section.
            last = int(np.searchsorted(starts, match.word + match.length - 1, side="right")) - 1
            for touched in range(section, last + 1):
                if not bad[touched]:
                    bad[touched] = True
                    counts.contaminated[match.evaluation] = counts.contaminated.get(match.evaluation, 0) + 1
                    if len(counts.contaminated_named) < _NAMED:
                        counts.contaminated_named.append(
                            {
                                "origin": document.origin,
                                "section": touched,
                                "set": match.evaluation,
                                "example": match.example,
                                "words": " ".join(words[match.word : match.word + match.length]),
                            }
                        )
        if compare:
            for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                shingles.append(ngrams[shingle][start : max(start, end - shingle + 1)])
        else:
            shingles += [np.zeros(0, np.uint64)] * len(ends)
        flags += bad
        result.digests += [_digest(text[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        result.origins.append(document.origin)
        result.texts.append(text)
        result.verdicts.append(document.verdict)
        result.ends.append(ends)
    counts.documents, counts.sections = len(result.texts), len(flags)
    result.contaminated = np.array(flags, bool)
    result.signatures_UP = signatures(shingles, config.duplicates, config.seed & 0xFFFFFFFF)
    return result


def write_part(path: Path, part: CleanPart) -> None:
    """Writes what ``read_part`` reads, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bounds = np.cumsum([0, *map(len, part.ends)]).tolist()
    pairs = list(pairwise(bounds))
    table = pa.table(
        {
            "origin": pa.array(part.origins, pa.string()),
            "text": pa.array(part.texts, pa.large_string()),
            "verdict": pa.array(part.verdicts, pa.bool_()),
            "ends": pa.array(part.ends, pa.list_(pa.int64())),
            "digests": pa.array([b"".join(part.digests[a:b]) for a, b in pairs], pa.binary()),
            "contaminated": pa.array([part.contaminated[a:b].tobytes() for a, b in pairs], pa.binary()),
            "signatures": pa.array([part.signatures_UP[a:b].tobytes() for a, b in pairs], pa.large_binary()),
        }
    )
    about = {"counts": part.counts.__dict__, "last": part.last}
    table = table.replace_schema_metadata({"part": json.dumps(about, ensure_ascii=False)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=1, use_dictionary=False, write_statistics=False)
    write_whole(path, buffer.getbuffer())


def read_counts(path: Path) -> tuple[PartCounts, bool]:
    """The counts of a part, and whether it is its input's last."""
    import pyarrow.parquet as pq

    about = json.loads((pq.read_schema(path).metadata or {})[b"part"])
    return PartCounts(**about["counts"]), bool(about["last"])


def read_sections(path: Path, permutations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digests (U,) of bytes, contamination (U,) bool, and signatures (U, P) uint32 of a part's sections."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["digests", "contaminated", "signatures"])
    joined = [b"".join(table[name].to_pylist()) for name in ("digests", "contaminated", "signatures")]
    return (
        np.frombuffer(joined[0], np.dtype((np.void, DIGEST))),
        np.frombuffer(joined[1], bool),
        np.frombuffer(joined[2], np.uint32).reshape(-1, permutations),
    )


def read_documents(path: Path) -> Iterator[tuple[str, str, bool | None, list[int]]]:
    """Origin, text, verdict and section ends of a part's documents."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["origin", "text", "verdict", "ends"])
    yield from zip(*(table[name].to_pylist() for name in ("origin", "text", "verdict", "ends")), strict=True)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST).digest()
