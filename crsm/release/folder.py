"""A folder that appears whole or not at all, and never over another one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into; it gets its name when the ``with`` block ends well, and is gone when it does not.

    Raises:
        ValueError: there is something of that name; it is left as it is.
        OSError: the disk is full or the place cannot be written.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        try:
            yield staging
        except SafetensorError as error:  # the library wraps the operating system's error
            raise OSError(f"{staging}: {error}") from error
        # The libraries make their files for the owner alone.
        os.chmod(staging, 0o755)
        for file in staging.iterdir():
            os.chmod(file, 0o644)
        refuse_existing(path)
        os.rename(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """
    Raises:
        ValueError: there is something of that name.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} exists; allowed: a folder that does not exist yet")
