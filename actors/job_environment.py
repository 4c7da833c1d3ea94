"""What a process can know of the job that it belongs to, if it was submitted with ``ray job submit``. No Ray here.

Ray copies the working directory of a job to every node that works for it, starts all its processes there, and deletes
the copies when the job has ended.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COPIES = "working_dir_files"
"""The folder of a node's session that holds working directories."""
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray describes a submitted job to its driver."""


def in_working_directory(folder: Path) -> bool:
    """Whether a folder belongs to the copy of a working directory that Ray made for a job."""
    return _COPIES in folder.parts


def working_directory() -> Path | None:
    """The copy of the job's working directory, in which its processes start; None: this is no such process."""
    here = Path.cwd()
    return here if in_working_directory(here) else None


@contextlib.contextmanager
def as_no_submitted_job() -> Iterator[None]:
    """For a cluster that a submitted job starts for itself: its workers start from the sources, and not from a package
    that only the job's own cluster has."""
    job = os.environ.pop(_JOB, None)
    try:
        yield
    finally:
        if job is not None:
            os.environ[_JOB] = job


def code_version() -> str | None:
    """What is known of the code of a submitted job: the ``commit`` of its metadata, or the hash that Ray gave it."""
    try:
        job = json.loads(os.environ.get(_JOB, "{}"))
    except ValueError:
        return None
    commit = (job.get("metadata") or {}).get("commit")
    if commit:
        return str(commit)
    package = _package(job)
    return None if package is None else f"package {package}"


def _package(job: dict[str, Any]) -> str | None:
    """``gcs://_ray_pkg_0123456789abcdef.zip`` → ``0123456789abcdef``: a hash of the files."""
    uri = str((job.get("runtime_env") or {}).get("working_dir") or "")
    stem = uri.rpartition("/")[2].removesuffix(".zip")
    return stem.removeprefix("_ray_pkg_") if stem.startswith("_ray_pkg_") else None


def check_imported_code(imported: Path, working: Path | None, packages: tuple[str, ...]) -> None:
    """Refuses to run other code than the job's.

    An editable install on a node wins over the working directory. That is no harm while both are the same.

    Args:
        imported: the folder that the packages were imported from.
        working: the job's working directory; None: nothing was submitted.

    Raises:
        ValueError: naming the first file that differs.
    """
    if working is None or imported == working or working in imported.parents:
        return
    for package in packages:
        for path in sorted((working / package).rglob("*.py")):
            other = imported / path.relative_to(working)
            if not other.is_file() or not filecmp.cmp(path, other, shallow=False):
                raise ValueError(
                    f"{other} is imported here and not the job's own {path.relative_to(working)}, which differs: the "
                    "node has an editable install; allowed: make setup EDITABLE= on the nodes of a cluster"
                )
