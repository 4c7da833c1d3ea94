"""From sources to shards, in steps that can be stopped anywhere.

    clean      every part on its own: normalise, filter, look for contamination, hash        work/clean/KEY.parquet
    compare    all sections together, in the order of the sources: who repeats whom          work/kept.npz
    tokenizer  trained on a sample of what is kept, or read                                  work/tokenizer.json
    encode     every part on its own                                                         work/tokens/KEY.npz
    write      shards, report, card, and at last the index; then ``work`` goes

What a step leaves is a file that appears whole, and is a function of the settings, the seed and the inputs alone. A
restart does what is missing. Who runs the parts, and how many at a time, is an :class:`Executor`'s business.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crsm.data.card import data_card
from crsm.data.decontamination import Contamination
from crsm.data.duplicates import find_duplicates
from crsm.data.encoding import TextEncoder
from crsm.data.parts import (
    Part,
    PartCounts,
    clean_part,
    cut_parts,
    part_key,
    read_counts,
    read_documents,
    read_sections,
    write_part,
)
from crsm.data.sections import runs_of
from crsm.data.shards import CARD, FORMAT, INDEX, TOKENIZER, dtype_for, read_index, write_stream, write_whole
from crsm.data.sources import Broken, Document, Input, evaluation_texts, list_inputs, read_input
from crsm.data.tokenizer import Tokenizer
from crsm.data_config import DataConfig, SourceConfig

WORK = "work"
REPORT = "report.json"
_EXAMPLES = 100
"""Duplicates that the report names."""
_SPLITS = ("train", "valid")


@dataclass(frozen=True, slots=True)
class Plan:
    """One preparation: everything that a worker has to know, as plain data."""

    config: DataConfig
    folder: str
    """Of the output."""
    inputs: tuple[Input, ...]

    @property
    def output(self) -> Path:
        return Path(self.folder)

    @property
    def work(self) -> Path:
        return self.output / WORK

    def source(self, name: str) -> SourceConfig:
        return next(source for source in self.config.sources if source.name == name)

    def clean_path(self, key: str) -> Path:
        return self.work / "clean" / f"{key}.parquet"

    def tokens_path(self, key: str) -> Path:
        return self.work / "tokens" / f"{key}.npz"

    def part_keys(self, given: Input) -> list[str]:
        """The parts of an input that are clean, from the first on without a gap; the last one is marked as such."""
        keys: list[str] = []
        while self.clean_path(key := part_key(given.source, given.number, len(keys))).is_file():
            keys.append(key)
        return keys

    def all_keys(self) -> list[str]:
        return [key for given in self.inputs for key in self.part_keys(given)]


class Executor(Protocol):
    """Runs the parts of the two steps that work on one part at a time."""

    def clean(self, plan: Plan, inputs: list[Input], contamination: Contamination) -> Iterator[PartCounts]:
        """Runs :func:`missing_parts` for every input and :func:`clean_and_write` for every part that it gives."""
        ...

    def encode(self, plan: Plan, keys: list[str]) -> Iterator[str]:
        """Runs :func:`encode_and_write` for every part."""
        ...


class SerialExecutor:
    """One part after the other in this process."""

    def clean(self, plan: Plan, inputs: list[Input], contamination: Contamination) -> Iterator[PartCounts]:
        for given in inputs:
            for part in missing_parts(plan, given):
                yield clean_and_write(plan, part, contamination)

    def encode(self, plan: Plan, keys: list[str]) -> Iterator[str]:
        encoder = make_encoder(plan)
        for key in keys:
            encode_and_write(plan, key, encoder)
            yield key


Tell = Callable[[str, int, int | None, Mapping[str, float]], None]
"""Step, how much of it is done, out of how much, figures."""


def prepare(config: DataConfig, output: str | Path, executor: Executor, tell: Tell | None = None) -> dict[str, Any]:
    """Prepares the data, going on where an earlier start stopped; returns what ``report.json`` holds.

    Raises:
        ValueError: an input is missing or broken, or the folder holds a preparation with other settings or inputs.
        OSError: the folder cannot be written.
    """
    tell = tell or (lambda step, done, total, figures: None)
    plan = make_plan(config, output)
    identity = _identity(plan)
    if (plan.output / INDEX).is_file():
        found = read_index(plan.output)
        _check_same(found["identity"], identity, str(plan.output))
        shutil.rmtree(plan.work, ignore_errors=True)
        return {**json.loads((plan.output / REPORT).read_text(encoding="utf-8")), "had_finished": True}
    begun = plan.work / "identity.json"
    if begun.is_file():
        _check_same(json.loads(begun.read_text(encoding="utf-8")), identity, str(plan.work))
    write_whole(begun, _json(identity))

    contamination = read_contamination(config)
    todo = [given for given in plan.inputs if not _is_clean(plan, given)]
    done = PartCounts()
    tell("clean", 0, None, {})
    for parts, counts in enumerate(executor.clean(plan, todo, contamination), start=1):
        done.add(counts)
        tell("clean", parts, None, {"MB": done.bytes / 1e6, "documents": done.documents})
    keys = plan.all_keys()
    tell("compare", 0, len(keys), {})
    repeated = compare(plan, keys)
    tell("compare", len(keys), len(keys), {})
    tell("tokenizer", 0, 1, {})
    tokenizer = make_tokenizer(plan, keys)
    tell("tokenizer", 1, 1, {"entries": tokenizer.vocab_size})
    missing = [key for key in keys if not plan.tokens_path(key).is_file()]
    for number, _ in enumerate(executor.encode(plan, missing), start=1):
        tell("encode", len(keys) - len(missing) + number, len(keys), {})
    tell("write", 0, 1, {})
    report = write_output(plan, keys, tokenizer, contamination, repeated, identity)
    shutil.rmtree(plan.work, ignore_errors=True)
    tell("write", 1, 1, {"shards": len(report["shards"])})
    return {**report, "had_finished": False}


def make_plan(config: DataConfig, output: str | Path) -> Plan:
    """
    Raises:
        ValueError: an input is missing.
    """
    inputs = [given for source in config.sources for given in list_inputs(source)]
    return Plan(config, str(Path(output).expanduser().resolve()), tuple(inputs))


def read_contamination(config: DataConfig) -> Contamination:
    """
    Raises:
        ValueError: an evaluation set cannot be read.
    """
    sets = ((entry.name, evaluation_texts(entry)) for entry in config.decontamination.sets)
    return Contamination.build(sets, config.decontamination)


# ------------------------------------------------------------------------------------------------------------ clean


def missing_parts(plan: Plan, given: Input) -> Iterator[Part]:
    """Reads an input and gives the parts that are not clean yet.

    Raises:
        ValueError: the input cannot be read, or has more broken records than its source allows.
    """
    source = plan.source(given.source)
    records = _watched(read_input(source, given, plan.config.seed), given, source)
    for part in cut_parts(records, given.source, given.number, max(1, int(plan.config.part_mb * 1e6))):
        if not plan.clean_path(part.key).is_file():
            yield part


def clean_and_write(plan: Plan, part: Part, contamination: Contamination) -> PartCounts:
    """Cleans one part and leaves its file."""
    clean = clean_part(part, plan.source(part.source), plan.config, contamination)
    write_part(plan.clean_path(part.key), clean)
    return clean.counts


def _watched(records: Iterable[Document | Broken], given: Input, source: SourceConfig) -> Iterator[Document | Broken]:
    count = 0
    for record in records:
        if isinstance(record, Broken):
            count += 1
            if count > source.max_bad:
                raise ValueError(
                    f"{record.origin} {record.reason}: broken record number {count} of {given.name!r}; allowed: "
                    f"sources.{source.name}.max_bad = {source.max_bad}"
                )
        yield record


def _is_clean(plan: Plan, given: Input) -> bool:
    keys = plan.part_keys(given)
    return bool(keys) and read_counts(plan.clean_path(keys[-1]))[1]


# ---------------------------------------------------------------------------------------------------------- compare


def compare(plan: Plan, keys: list[str]) -> dict[str, Any]:
    """Finds the sections that go, and leaves for every part which ones stay; returns what there is to report."""
    config = plan.config
    kept_path, told_path = plan.work / "kept.npz", plan.work / "repeated.json"
    if kept_path.is_file() and told_path.is_file():
        return dict(json.loads(told_path.read_text(encoding="utf-8")))
    read = [read_sections(plan.clean_path(key), config.duplicates.permutations) for key in keys]
    digests = np.concatenate([entry[0] for entry in read])
    contaminated = np.concatenate([entry[1] for entry in read])
    signatures_UP = np.concatenate([entry[2] for entry in read])
    bounds = np.cumsum([0, *(len(entry[0]) for entry in read)])
    del read
    clean = np.flatnonzero(~contaminated)
    verdicts = find_duplicates(digests[clean], signatures_UP[clean], np.ones(len(clean), bool), config.duplicates)
    kept = ~contaminated
    told: dict[str, Any] = {"exact": {}, "near": {}, "examples": []}
    for verdict in verdicts:
        unit, first = int(clean[verdict.unit]), int(clean[verdict.first])
        kept[unit] = False
        key, earlier = _place(unit, keys, bounds), _place(first, keys, bounds)
        counts = told["exact" if verdict.exact else "near"]
        source = key[0].rsplit("-", 2)[0]
        counts[source] = counts.get(source, 0) + 1
        if len(told["examples"]) < _EXAMPLES:
            told["examples"].append(
                {"section": key, "repeats": earlier, "similarity": verdict.similarity, "exact": verdict.exact}
            )
    origins: dict[str, list[str]] = {}
    for example in told["examples"]:
        for name in ("section", "repeats"):
            key, unit = example[name]
            if key not in origins:
                origins[key] = [o for o, _, _, ends in read_documents(plan.clean_path(key)) for _ in ends]
            example[name] = origins[key][unit]
    write_whole(told_path, _json(told))
    _write_arrays(kept_path, {key: kept[bounds[i] : bounds[i + 1]] for i, key in enumerate(keys)})
    return told


def _place(unit: int, keys: list[str], bounds: np.ndarray) -> tuple[str, int]:
    part = int(np.searchsorted(bounds, unit, side="right")) - 1
    return keys[part], unit - int(bounds[part])


# -------------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer(plan: Plan, keys: list[str]) -> Tokenizer:
    """The tokenizer of the shards; also leaves it as a file."""
    path = plan.work / TOKENIZER
    if not path.is_file():
        settings = plan.config.tokenizer
        if settings.kind == "file":
            assert settings.path is not None
            tokenizer = Tokenizer.adopt(settings.path)
        else:
            with one_thread():
                tokenizer = Tokenizer.train_bpe(_sample(plan, keys), settings.vocab_size)
        write_whole(path, tokenizer.to_json().encode())
    return Tokenizer.load(path)


def _sample(plan: Plan, keys: list[str]) -> Iterator[str]:
    """Sections of the training text, drawn by their hash."""
    total = sum(read_counts(plan.clean_path(key))[0].characters for key in keys)
    share = min(1.0, plan.config.tokenizer.sample_mb * 1e6 / max(1, total))
    with np.load(plan.work / "kept.npz") as kept:
        for key in keys:
            source, alive, unit = plan.source(key.rsplit("-", 2)[0]), kept[key].tolist(), 0
            for _, text, _, ends in read_documents(plan.clean_path(key)):
                for start, end in zip([0, *ends[:-1]], ends, strict=True):
                    keep, unit = alive[unit], unit + 1
                    if keep and source.split == "train" and _draw("sample", plan.config.seed, text[start:end]) < share:
                        yield text[start:end]


# ----------------------------------------------------------------------------------------------------------- encode


def make_encoder(plan: Plan) -> TextEncoder:
    return TextEncoder(Tokenizer.load(plan.work / TOKENIZER))


def encode_and_write(plan: Plan, key: str, encoder: TextEncoder) -> None:
    """Writes the tokens of a part: of every split one array of documents, each closed by the end of text."""
    source, tokenizer = plan.source(key.rsplit("-", 2)[0]), encoder.tokenizer
    dtype = dtype_for(tokenizer.vocab_size)
    pieces: dict[str, list[np.ndarray]] = {split: [] for split in _SPLITS}
    bytes_of = dict.fromkeys(_SPLITS, 0)
    with np.load(plan.work / "kept.npz") as kept:
        alive = kept[key].tolist()
    unit = 0
    for _, text, verdict, ends in read_documents(plan.clean_path(key)):
        stretches = runs_of(alive[unit : unit + len(ends)], ends)
        unit += len(ends)
        held_out = source.split == "train" and _draw("held out", plan.config.seed, text) < source.valid_share
        split = "valid" if held_out else source.split
        for start, end in stretches:
            piece = text[start:end].strip()
            closing = [] if verdict is None else [tokenizer.verdict_id(verdict)]
            pieces[split].append(encoder.encode(piece).astype(dtype))
            pieces[split].append(np.array([*closing, tokenizer.eos_id], dtype))
            bytes_of[split] += len(piece.encode())
    arrays = {split: np.concatenate([np.zeros(0, dtype), *pieces[split]]) for split in _SPLITS}
    arrays["bytes"] = np.array([bytes_of[split] for split in _SPLITS], np.int64)
    _write_arrays(plan.tokens_path(key), arrays)


# ------------------------------------------------------------------------------------------------------------ write


def write_output(
    plan: Plan,
    keys: list[str],
    tokenizer: Tokenizer,
    contamination: Contamination,
    repeated: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes shards, report, card and index, in this order; returns the report."""
    dtype = dtype_for(tokenizer.vocab_size)
    shards: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    for source in plan.config.sources:
        own = [key for key in keys if key.rsplit("-", 2)[0] == source.name]
        counts = PartCounts()
        for key in own:
            counts.add(read_counts(plan.clean_path(key))[0])
        text_bytes = sum((_load(plan, key, "bytes") for key in own), np.zeros(len(_SPLITS), np.int64)).tolist()
        splits = {}
        for split, size in zip(_SPLITS, text_bytes, strict=True):
            written = write_stream(
                plan.output,
                source.name,
                split,
                (_load(plan, key, split) for key in own),
                eos_id=tokenizer.eos_id,
                shard_tokens=plan.config.shard_tokens,
                dtype=dtype,
            )
            shards += written
            if written:
                tokens, documents = (sum(entry[name] for entry in written) for name in ("tokens", "documents"))
                splits[split] = {"tokens": tokens, "documents": documents, "bytes": size}
        inputs = [asdict(given) for given in plan.inputs if given.source == source.name]
        sources.append(
            {
                "name": source.name,
                "kind": source.kind,
                "licence": source.licence,
                "attribution": source.attribution,
                "inputs": [{k: v for k, v in given.items() if v is not None and k != "source"} for given in inputs],
                "counts": counts.__dict__,
                "duplicates": {kind: repeated[kind].get(source.name, 0) for kind in ("exact", "near")},
                "splits": splits,
            }
        )
    evaluation = [
        {"name": name, "examples": contamination.examples[name], "too_short": contamination.too_short[name]}
        for name in contamination.names
    ]
    report = {
        "name": plan.config.name,
        "seed": plan.config.seed,
        "sources": sources,
        "evaluation_sets": evaluation,
        "duplicates": list(repeated["examples"]),
        "tokenizer": {"kind": plan.config.tokenizer.kind, "entries": tokenizer.vocab_size},
        "shards": shards,
    }
    index = {
        "format": FORMAT,
        "name": plan.config.name,
        "seed": plan.config.seed,
        "dtype": dtype.str,
        "shard_tokens": plan.config.shard_tokens,
        "tokenizer": {
            "file": TOKENIZER,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "sources": [{name: entry[name] for name in ("name", "licence", "attribution", "splits")} for entry in sources],
        "shards": shards,
        "identity": identity,
    }
    write_whole(plan.output / TOKENIZER, tokenizer.to_json().encode())
    write_whole(plan.output / REPORT, _json(report))
    write_whole(plan.output / CARD, data_card(report, plan.config).encode())
    write_whole(plan.output / INDEX, _json(index))
    return report


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
    write_whole(path, buffer.getbuffer())


def _load(plan: Plan, key: str, name: str) -> np.ndarray:
    with np.load(plan.tokens_path(key)) as arrays:
        return np.asarray(arrays[name])


# --------------------------------------------------------------------------------------------------------- identity


def _identity(plan: Plan) -> dict[str, Any]:
    """What decides the shards: settings and inputs."""
    settings = plan.config.model_dump(mode="json", exclude={"output"})
    tokenizer = plan.config.tokenizer.path
    return {
        "settings": settings,
        "inputs": [asdict(given) for given in plan.inputs],
        "tokenizer": None if tokenizer is None else Tokenizer.adopt(tokenizer).fingerprint,
    }


def _check_same(found: Any, asked: Any, where: str) -> None:
    """
    Raises:
        ValueError: the two differ; the first difference is named.
    """
    difference = _difference(found, json.loads(json.dumps(asked)), "")
    if difference is not None:
        raise ValueError(
            f"{where} was begun with {difference[0]} = {difference[1]!r:.80}; now it is {difference[2]!r:.80}; "
            "allowed: the same settings and inputs, another output, or --fresh"
        )


def _difference(found: Any, asked: Any, place: str) -> tuple[str, Any, Any] | None:
    if isinstance(found, dict) and isinstance(asked, dict):
        pairs = [(str(key), found.get(key), asked.get(key)) for key in dict.fromkeys([*asked, *found])]
    elif isinstance(found, list) and isinstance(asked, list) and len(found) == len(asked):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(found, asked, strict=True))]
    else:
        return None if found == asked else (place, found, asked)
    for name, left, right in pairs:
        if left != right:
            return _difference(left, right, f"{place}.{name}" if place else name)
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """The ``tokenizers`` library without its own threads: they lose more than they gain beside other processes."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _draw(purpose: str, seed: int, text: str) -> float:
    """A number in [0, 1) that depends on the text."""
    digest = hashlib.blake2b(f"{purpose} {seed} {text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
