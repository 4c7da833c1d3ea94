"""The description of a checkpoint's folder: what it holds, with size and hash of every file.

It is ``config.json``; in a folder that ``crsm export`` wrote, whose ``config.json`` is for transformers, ``crsm.json``.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FORMAT = 1
FILES = ("model.safetensors", "tokenizer.json")
"""Files of a checkpoint whose size and hash ``config.json`` holds."""
EXPORTED = "crsm.json"
"""The description in an exported folder, whose ``config.json`` is for transformers."""


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as a description has them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_files(path: Path) -> dict[str, Any]:
    """The description of a checkpoint's folder whose files are those that it names.

    Raises:
        ValueError: it cannot be read, or a file is missing, truncated or altered.
    """
    description = _read_description(path)
    for file, want in description["files"].items():
        _check_file(path / file, want)
    return description


def description_file(path: Path) -> Path:
    """Where a folder's description lies, or would."""
    return path / EXPORTED if (path / EXPORTED).is_file() else path / "config.json"


def _read_description(path: Path) -> dict[str, Any]:
    file = description_file(path)
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a whole JSON file: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{file}: format = {found!r}; allowed: {FORMAT}")
    missing = {"files", "config", "trust_horizon", "model_version", "report"} - set(description)
    if missing:
        raise ValueError(f"{file}: key {sorted(missing)[0]!r} is missing")
    names = [*FILES, *description["files"]] if file.name != EXPORTED else ["tokenizer.json", *description["files"]]
    for name in names:
        if not {"bytes", "sha256"} <= set(description["files"].get(name, {})):
            raise ValueError(f"{file}: files.{name} is missing; allowed: its bytes and sha256")
        if Path(name).name != name:
            raise ValueError(f"{file}: files.{name} lies elsewhere; allowed: files of the folder")
    return description


def _check_file(path: Path, want: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing; the checkpoint names it with {want['bytes']} bytes")
    found = fingerprint(path)
    if found["bytes"] != want["bytes"]:
        raise ValueError(f"{path}: {found['bytes']} bytes; the checkpoint names {want['bytes']}")
    if found["sha256"] != want["sha256"]:
        raise ValueError(f"{path}: sha256 {found['sha256'][:16]}…; the checkpoint names {want['sha256'][:16]}…")
