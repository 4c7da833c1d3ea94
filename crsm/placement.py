"""A checkpoint's model on the device that the settings name: copied there once, whole, and kept as long as it lives."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from crsm.devices import CPU, device_of, pick_device
from crsm.model import CRSM, Checkpoint

Marks = tuple[Any, ...]


class _Copy(NamedTuple):
    model: CRSM
    source: Marks
    """Of what was copied, when it was."""
    marks: Marks
    """Of the copy, then."""


_copies: WeakKeyDictionary[CRSM, dict[torch.device, _Copy]] = WeakKeyDictionary()
_lock = threading.Lock()


def placed(checkpoint: Checkpoint, device: torch.device) -> Checkpoint:
    """The checkpoint with its model on a device: itself if that is where it lies, else a copy, which all who ask share.

    Who changes the weights of the one changes nothing of the other; whoever asks then gets a new copy.
    """
    model = checkpoint.model
    if device_of(model) == device:
        return checkpoint
    with _lock:
        copies = _copies.setdefault(model, {})
        found = copies.get(device)
        if found is None or found.source != _marks(model) or found.marks != _marks(found.model):
            there = _copied(model, device)
            found = copies[device] = _Copy(there, _marks(model), _marks(there))
    return replace(checkpoint, model=found.model)


def _copied(model: CRSM, device: torch.device) -> CRSM:
    there = copy.deepcopy(model).to(device)
    if there.config.model.backbone.tie_embeddings:
        there.lm_head.weight = there.backbone.embedding.weight
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # planners read the weights on streams of their own
    return there


def _marks(model: CRSM) -> Marks:
    """What differs as soon as weights or settings are others."""
    return id(model.config), *((id(tensor), tensor._version) for tensor in (*model.parameters(), *model.buffers()))


def settled(checkpoint: Checkpoint, name: str, setting: str) -> Checkpoint:
    """The checkpoint on the device that a setting names. One that was put somewhere already stays there.

    Raises:
        ValueError: no such name, or no such device here.
    """
    device = pick_device(name, setting)
    return checkpoint if device_of(checkpoint.model) != CPU else placed(checkpoint, device)
