"""Files of one JSON object a line, read so that whatever is wrong with one is named with its file, line and field."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a jsonl file (``.gz``: compressed), each with its place for error messages; blank lines are passed
    over.

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        where = f"{str(path)!r} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} holds a {type(record).__name__}; allowed: an object")
        yield where, record


def read_bytes(path: str | Path) -> bytes:
    """A file's content, unpacked if its name ends in ``.gz``.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if str(path).endswith(".gz") else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def field(record: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """One field of a record.

    Raises:
        ValueError: it is missing or of another type.
    """
    if not isinstance(record.get(name), kind):
        raise ValueError(f"{where}: {name} = {str(record.get(name))[:40]!r}; allowed: a {kind.__name__}")
    return record[name]


def load_hub(dataset: str, subset: str | None, split: str, setting: str, allowed: str) -> Iterable[dict[str, Any]]:
    """A data set of the Hugging Face hub.

    Args:
        dataset: its name.
        subset: its configuration.
        split: its split.
        setting: what asked for the hub, for error messages.
        allowed: what could be asked for instead.

    Raises:
        ValueError: the extra is missing, or the hub cannot be reached.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{setting} = None loads {dataset} from the hub, which needs the extra `hub` "
            f"(pip install 'crsm[hub]'); allowed: {allowed}"
        ) from error
    try:
        records: Iterable[dict[str, Any]] = datasets.load_dataset(dataset, subset, split=split)
    except Exception as error:  # Each of the client's own dependencies raises its own errors.
        raise ValueError(f"{dataset} cannot be loaded from the hub: {error}; allowed: {allowed}") from error
    return records
