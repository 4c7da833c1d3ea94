"""Where text comes from: files, the hub, tasks and recorded solutions, all as streams of documents.

A source has *inputs* (a file, a hub data set, a range of problems) that can be read independently, each in one fixed
order. What is wrong with a single record is a :class:`Broken` in the stream; what is wrong with a whole input, a
``ValueError``.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crsm.data_config import (
    EvaluationFiles,
    EvaluationHub,
    EvaluationSet,
    EvaluationTask,
    FilesSource,
    HubSource,
    SourceConfig,
    TaskSource,
    TracesSource,
)
from crsm.tasks import build_task
from crsm.tasks.base import Split, keyed_rng

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "txt", ".md": "txt", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_PROBLEMS = 2000
"""Problems of a task that one input generates."""
_MAX_LINE = 1 << 30


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    origin: str
    """Where it stood: a file with its line, a record, a problem."""
    text: str
    verdict: bool | None = None
    """Whether the solution that it holds is right; None: it holds none."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that gives no text."""

    origin: str
    reason: str


@dataclass(frozen=True, slots=True)
class Input:
    """What is read in one go."""

    source: str
    number: int
    """Of the source's inputs, from 0."""
    name: str
    first: int = 0
    count: int | None = None
    """Records from ``first`` on; None: all."""
    size: int | None = None
    sha256: str | None = None
    """Of a file."""


def list_inputs(source: SourceConfig) -> list[Input]:
    """The inputs of a source, in their order; looks at files without reading their records.

    Raises:
        ValueError: there are none, or a file cannot be read.
    """
    if isinstance(source, FilesSource | TracesSource):
        wanted = "auto" if isinstance(source, TracesSource) else source.format
        return [
            Input(source.name, number, str(path), size=path.stat().st_size, sha256=_file_hash(path))
            for number, path in enumerate(find_files(source.path, wanted, f"sources.{source.name}.path"))
        ]
    if isinstance(source, HubSource):
        name = source.dataset if source.subset is None else f"{source.dataset}/{source.subset}"
        return [Input(source.name, 0, name, count=source.documents)]
    total = _task_size(source)
    return [
        Input(source.name, number, source.task.name, first=first, count=min(_PROBLEMS, total - first))
        for number, first in enumerate(range(0, total, _PROBLEMS))
    ]


def read_input(source: SourceConfig, given: Input, seed: int = 0) -> Iterator[Document | Broken]:
    """The documents of one input.

    Raises:
        ValueError: the input cannot be read, or is of another format.
    """
    if isinstance(source, FilesSource):
        if format_of(given.name, source.format) == "txt":
            yield Document(given.name, _read_text(given.name))
            return
        for origin, record in read_records(given.name, source.format):
            yield _document(origin, record, source.field)
    elif isinstance(source, TracesSource):
        for origin, record in read_records(given.name):
            yield _trace(origin, record, source)
    elif isinstance(source, HubSource):
        records = _hub_records(source.dataset, source.subset, source.hub_split, source.revision)
        for number, record in enumerate(records):
            if number == given.count:
                break
            yield _document(f"{given.name} record {number}", record, source.field)
    else:
        yield from _task_documents(source, given, seed)


def evaluation_texts(entry: EvaluationSet) -> Iterator[str]:
    """The texts of an evaluation set, one for every example.

    Raises:
        ValueError: it cannot be read, or a record lacks a field.
    """
    if isinstance(entry, EvaluationTask):
        task = build_task(entry.task)
        for split in entry.splits:
            size = task.size(split)
            for index in range(entry.problems if size is None else min(size, entry.problems)):
                problem = task.generate(0, split, index)
                yield f"{problem.prompt} {problem.solution}"
        return
    records: Iterable[tuple[str, Any]]
    if isinstance(entry, EvaluationHub):
        hub = _hub_records(entry.dataset, entry.subset, entry.hub_split, entry.revision)
        records = ((f"{entry.dataset} record {number}", record) for number, record in enumerate(hub))
    else:
        assert isinstance(entry, EvaluationFiles)
        paths = find_files(entry.path, entry.format, f"decontamination.sets.{entry.name}.path")
        if all(format_of(path, entry.format) == "txt" for path in paths):
            yield from (_read_text(path) for path in paths)
            return
        records = (pair for path in paths for pair in read_records(path, entry.format))
    for origin, record in records:
        if isinstance(record, Broken):
            raise ValueError(f"{origin}: {record.reason}; allowed: an evaluation set without broken records")
        missing = [field for field in entry.fields if not isinstance(record.get(field), str)]
        if missing:
            raise ValueError(
                f"{origin}: {missing[0]} = {str(record.get(missing[0]))[:40]!r}; allowed: the fields that "
                f"decontamination.sets.{entry.name} names, as text"
            )
        yield "\n\n".join(record[field] for field in entry.fields)


# ------------------------------------------------------------------------------------------------------------ files


def find_files(path: str, wanted: str, what: str) -> list[Path]:
    """The files that a path means, sorted by name.

    Raises:
        ValueError: none, or one whose format is not known.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.is_file() and _known(file, wanted))
        if not found:
            raise ValueError(
                f"{what} = {path!r} holds no files to read; allowed: {', '.join(_FORMATS)}, also .gz, .zst"
            )
    else:
        found = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
        if not found:
            raise ValueError(f"{what} = {path!r}: no such file; allowed: a file, a folder, or a pattern")
        for file in found:
            format_of(file, wanted)
    return found


def format_of(path: str | Path, wanted: str = "auto") -> str:
    """
    Raises:
        ValueError: the name does not say.
    """
    if wanted != "auto":
        return wanted
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in _COMPRESSIONS]
    if suffixes and suffixes[-1] in _FORMATS:
        return _FORMATS[suffixes[-1]]
    raise ValueError(
        f"{str(path)!r}: format = 'auto' does not know this name; allowed: {', '.join(_FORMATS)}, also .gz and .zst, "
        "or format: jsonl, json, txt or parquet"
    )


def read_records(path: str | Path, wanted: str = "auto") -> Iterator[tuple[str, dict[str, Any] | Broken]]:
    """The objects of a file with their places; what is no object is a :class:`Broken`."""
    kind = format_of(path, wanted)
    if kind == "parquet":
        yield from _parquet(path)
    elif kind == "json":
        try:
            array = json.loads(_read_text(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
        if not isinstance(array, list):
            raise ValueError(f"{str(path)!r} holds a {type(array).__name__}; allowed: an array of objects")
        for number, record in enumerate(array):
            origin = f"{path}[{number}]"
            yield origin, record if isinstance(record, dict) else Broken(origin, f"holds a {type(record).__name__}")
    else:
        yield from _jsonl(path)


def _jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any] | Broken]]:
    with _opened(path) as file:
        number = 0
        while line := _line(file, path):
            number += 1
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield origin, Broken(origin, f"is not JSON: {error}")
                continue
            yield origin, record if isinstance(record, dict) else Broken(origin, f"holds a {type(record).__name__}")


def _parquet(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    yield f"{path}[{number}]", record
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as parquet: {' '.join(str(error).split())}") from error


def _opened(path: str | Path) -> Any:
    compression = _COMPRESSIONS.get(Path(path).suffix)
    try:
        if compression == "gzip":
            return gzip.open(path, "rb")
        if compression == "zstd":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 1 << 20)
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _line(file: Any, path: str | Path) -> bytes:
    try:
        return bytes(file.readline(_MAX_LINE))
    except Exception as error:  # each decompressor raises its own
        raise ValueError(f"{str(path)!r} cannot be decompressed, or is cut short: {error}") from error


def _read_text(path: str | Path) -> str:
    with _opened(path) as file:
        try:
            raw = file.read()
        except Exception as error:  # each decompressor raises its own
            raise ValueError(f"{str(path)!r} cannot be read or decompressed: {error}") from error
    try:
        return str(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 at byte {error.start}; allowed: UTF-8") from error


def _known(path: Path, wanted: str) -> bool:
    try:
        return not path.name.startswith(".") and bool(format_of(path, wanted))
    except ValueError:
        return False


def _file_hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------- records


def _document(origin: str, record: dict[str, Any] | Broken, field: str) -> Document | Broken:
    if isinstance(record, Broken):
        return record
    text = record.get(field)
    return (
        Document(origin, text) if isinstance(text, str) else Broken(origin, f"{field} = {str(text)[:40]!r} is no text")
    )


def _trace(origin: str, record: dict[str, Any] | Broken, source: TracesSource) -> Document | Broken:
    if isinstance(record, Broken):
        return record
    prompt, answer = record.get(source.prompt_field), record.get(source.answer_field)
    if not isinstance(prompt, str) or not isinstance(answer, str):
        field = source.prompt_field if not isinstance(prompt, str) else source.answer_field
        return Broken(origin, f"{field} = {str(record.get(field))[:40]!r} is no text")
    correct = True if source.correct_field is None else record.get(source.correct_field)
    if not isinstance(correct, bool):
        return Broken(origin, f"{source.correct_field} = {str(correct)[:40]!r} is neither true nor false")
    text = source.template.replace("{prompt}", prompt.strip()).replace("{answer}", answer.strip())
    return Document(origin, text, correct)


def _hub_records(dataset: str, subset: str | None, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"{dataset!r} of the hub needs the extra `hub` (pip install 'crsm[hub]')") from error
    try:
        yield from datasets.load_dataset(dataset, subset, split=split, revision=revision, streaming=True)
    except Exception as error:  # Each of the client's own dependencies raises its own errors.
        raise ValueError(f"{dataset!r} cannot be read from the hub: {' '.join(str(error).split())}") from error


def _task_size(source: TaskSource) -> int:
    size = build_task(source.task).size(source.split)
    return source.documents if size is None else min(size, source.documents)


def _task_documents(source: TaskSource, given: Input, seed: int) -> Iterator[Document]:
    task = build_task(source.task)
    split: Split = source.split
    assert given.count is not None
    for index in range(given.first, given.first + given.count):
        problem = task.generate(seed, split, index)
        # The running total of the share passes a whole number: an even spread.
        is_solution = int((index + 1) * source.solution_share) > int(index * source.solution_share)
        answer, verdict = problem.solution, True
        if not is_solution and (drawn := task.attempts(problem, keyed_rng("attempt", task.name, seed, index), 1)):
            answer, verdict = drawn[0].text, drawn[0].correct
        text = f"{problem.prompt}{answer if answer[:1].isspace() else f' {answer}'}"
        yield Document(f"{task.name} {split} {index}", text, verdict)
