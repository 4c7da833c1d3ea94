"""The output folder of a sweep or a search: where it lies, whether it may be used, and what has ended so far.

It is a folder, or a place in an object store. What has ended is kept at once, written by the driver alone, and is all
that ``--resume`` needs: a line of ``trials.jsonl`` each, or, in an object store, where nothing can be added to a file,
an object each in ``ended/``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.runs import storage_root
from jobs.storage import StoragePath

SWEEP_FILE = "sweep.json"
TRIALS_FILE = "trials.jsonl"
TRIALS_FOLDER = "ended"
TUNE_FOLDER = "tune"
"""What Ray Tune keeps of an experiment."""
_READERS = 16


def output_place(output: str | None, default: Path) -> StoragePath:
    """Where a job writes.

    Args:
        output: as the user gave it.
        default: where no place was given.

    Raises:
        ValueError: it is no place, or one that is deleted with a submitted job.
    """
    return storage_root(output or default)


def open_folder(folder: StoragePath, asked: Mapping[str, Any], resume: bool) -> None:
    """Makes the output folder ready.

    Args:
        folder: where to write.
        asked: what a start must have in common with an earlier one to go on with it.
        resume: go on; otherwise what is there is put aside.

    Raises:
        ValueError: there is nothing to resume, or it was made with other settings, or the folder holds something else.
        OSError: it cannot be written.
    """
    from crsm.training.loop import check_fingerprint

    saved = folder / SWEEP_FILE
    if folder.scheme:  # one that does not answer is to be known at once
        folder.check_writable()
    if resume:
        if not saved.is_file():
            raise ValueError(f"nothing to resume in {folder}; allowed: an output folder of this job")
        try:
            check_fingerprint(json.loads(saved.read_text()), dict(asked), str(folder))
        except ValueError as error:
            raise ValueError(f"{error}; allowed: the same settings, or another sweep without --resume") from error
    elif saved.is_file():
        folder.put_aside()
        print(f"{folder} held a sweep; it is put aside beside it (--resume goes on with one)", file=sys.stderr)
    elif folder.is_file() or folder.iterdir():
        raise ValueError(f"output '{folder}' holds something else; allowed: a new or empty folder, or a sweep's")
    folder.check_writable()
    if not resume:
        saved.write_text(json.dumps(asked, indent=1, ensure_ascii=False) + "\n")


def read_ended(folder: StoragePath) -> list[dict[str, Any]]:
    """What has ended; an entry that was cut short by a crash is none."""
    if folder.local is None:
        with ThreadPoolExecutor(_READERS) as readers:
            texts = list(readers.map(StoragePath.read_text, (folder / TRIALS_FOLDER).iterdir()))
    else:
        path = folder / TRIALS_FILE
        texts = path.read_text().splitlines() if path.exists() else []
    entries = []
    for text in texts:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(text))
    return [entry for entry in entries if isinstance(entry, dict) and "trial" in entry]


def add_ended(folder: StoragePath, entry: Mapping[str, Any]) -> None:
    """One more, by its ``trial``; it is kept when this returns."""
    text = json.dumps(entry)
    if folder.local is None:
        (folder / TRIALS_FOLDER / f"{entry['trial']:06d}.json").write_text(text)
        return
    with open(folder.local / TRIALS_FILE, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line before was cut short
                file.write(b"\n")
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def drawing_folder(folder: StoragePath) -> Iterator[Path]:
    """A folder of this machine for pictures; what lies in it afterwards lies in the output folder."""
    if folder.local is not None:
        yield folder.local
        return
    with tempfile.TemporaryDirectory(prefix="crsm-pictures-") as scratch:
        yield Path(scratch)
        folder.upload(Path(scratch))
