"""What a stopped run needs to go on, as one file that is whole or not there.

A state is the same whatever the number of workers that saved it and however weights were spread over them, and any
number of them goes on from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
STATE_FILE = "loop_state.safetensors"

Point = dict[str, float]
"""One point of the curve: ``step``, ``seconds`` and figures by name; evaluations are named ``valid/…``."""


@dataclass(frozen=True, slots=True)
class LoopState:
    """All that a stopped run needs to go on exactly."""

    stage: str
    step: int
    """Optimizer steps done; also the position in the data and in the random numbers, which are functions of it."""
    tensors: dict[str, Tensor]
    """Trained weights and buffers, the optimizer's moments, and the averaged weights if there are any, all in fp32. Not
    copies as long as they are ``borrowed``: save them before the next step."""
    seconds: float = 0.0
    """Spent so far, lost work not counted."""
    train_seconds: float = 0.0
    """The part of it that optimizer steps took."""
    tokens: int = 0
    curve: list[Point] = field(default_factory=list)
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sum and count of every figure since the last point of the curve."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """The settings that decide the run's course."""
    borrowed: bool = True
    """Whether the tensors are those that the next step changes; not saved."""

    def save(self, path: str | Path) -> None:
        """Writes one file, whole or not at all.

        Raises:
            OSError: the disk is full or the place cannot be written; what was there before is untouched.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        description = {
            "format": FORMAT,
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "tokens": self.tokens,
            "curve": self.curve,
            "window": self.window,
            "fingerprint": self.fingerprint,
        }
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        try:
            tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
            try:
                save_file(tensors, temporary, metadata={"loop": json.dumps(description)})
            except SafetensorError as error:  # the library wraps the operating system's error
                raise OSError(f"{path}: {error}") from error
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | Path, stage: str, fingerprint: Mapping[str, Any] | None = None) -> LoopState:
        """Reads what ``save`` wrote.

        Args:
            path: the file.
            stage: name of the stage that wants to go on.
            fingerprint: the settings it has now; None: they are not compared.

        Raises:
            ValueError: no such file, a truncated one, another format, stage or settings; both values are named.
        """
        path = Path(path)
        _check_length(path)
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {})["loop"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the state of a training run: {error}") from error
        if description.pop("format") != FORMAT:
            raise ValueError(f"{path}: another format; allowed: {FORMAT}")
        if description["stage"] != stage:
            raise ValueError(f"{path}: stage = {description['stage']!r}; this run is of {stage!r}")
        if fingerprint is not None:
            check_fingerprint(description["fingerprint"], fingerprint, str(path))
        return cls(tensors=tensors, **description)


def _check_length(path: Path) -> None:
    try:
        found = path.stat().st_size
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes)) if header_bytes < found else {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: {found} bytes that are not the state of a training run") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    wanted = 8 + header_bytes + max(ends, default=0)
    if found != wanted:
        raise ValueError(f"{path}: {found} bytes; its header names {wanted}")


def check_fingerprint(found: Mapping[str, Any], asked: Mapping[str, Any], source: str) -> None:
    """
    Raises:
        ValueError: the two differ; the first difference is named with both values.
    """
    left, right = dict(_flat(found)), dict(_flat(asked))
    for key in [*right, *(key for key in left if key not in right)]:
        if left.get(key) != right.get(key):
            raise ValueError(f"{source} was made with {key} = {left.get(key)!r}; the settings ask {right.get(key)!r}")


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves by dotted name."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def take_tensor(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in tensors:
        raise ValueError(f"state tensor {name!r} is missing; the stage needs it with shape {tuple(like.shape)}")
    tensor = tensors.pop(name)
    if tensor.shape != like.shape:
        raise ValueError(f"state tensor {name!r} has shape {tuple(tensor.shape)}; the stage has {tuple(like.shape)}")
    return tensor
