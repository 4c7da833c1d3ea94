"""A checkpoint as a message: settings and numpy arrays, put into the object store once and read by every actor.

Invariants:

* arrays are those of the checkpoint's tensors, under the same names; a tied matrix travels once;
* what is unpacked has the same bits, version and fingerprint as what was packed;
* unpacking copies: arrays in an object store are read-only and belong to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from crsm.config import Config
from crsm.data.tokenizer import Tokenizer
from crsm.model import Checkpoint, build_model, load_checkpoint, resolve_checkpoint

TIED = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that rebuilds a :class:`~crsm.model.Checkpoint`."""

    config: Config
    tokenizer: str
    """The ``tokenizers`` library's JSON."""
    state: dict[str, np.ndarray]
    trust_horizon: int | None
    model_version: int
    report: dict[str, Any]
    weights_hash: str


def pack(checkpoint: Checkpoint) -> Weights:
    """The message; its arrays share memory with the checkpoint until they are put into an object store."""
    state = {name: _as_array(tensor) for name, tensor in checkpoint.model.state_dict().items()}
    if checkpoint.config.model.backbone.tie_embeddings:
        del state[TIED]
    return Weights(
        checkpoint.config,
        checkpoint.tokenizer.to_json(),
        state,
        checkpoint.trust_horizon,
        checkpoint.model_version,
        checkpoint.report,
        checkpoint.weights_hash,
    )


def unpack(weights: Weights) -> Checkpoint:
    """The checkpoint, in evaluation mode, on the CPU.

    Raises:
        ValueError: tensors are missing, left over or of another shape; they are named.
    """
    tokenizer = Tokenizer.from_json(weights.tokenizer)
    model = build_model(weights.config, tokenizer)
    expected = set(model.state_dict())
    if weights.config.model.backbone.tie_embeddings:
        expected.remove(TIED)
    if expected != set(weights.state):
        differing = sorted(expected ^ set(weights.state))[0]
        raise ValueError(f"weights: tensor {differing!r} is missing or not one of the model's")
    try:
        model.load_state_dict({name: _as_tensor(array) for name, array in weights.state.items()}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights: {' '.join(str(error).split())}") from error
    return Checkpoint(
        model.eval(),
        tokenizer,
        trust_horizon=weights.trust_horizon,
        model_version=weights.model_version,
        report=weights.report,
        weights_hash=weights.weights_hash,
    )


def open_source(source: str | Weights) -> Checkpoint:
    """The checkpoint from its path (or shipped name), or from the message."""
    return unpack(source) if isinstance(source, Weights) else load_checkpoint(source)


def share(checkpoint: Checkpoint | str | Path | ray.ObjectRef) -> str | ray.ObjectRef:
    """What actors are handed: a reference to weights put once, or the path of a checkpoint that every node can read."""
    if isinstance(checkpoint, Checkpoint):
        return ray.put(pack(checkpoint))
    if isinstance(checkpoint, str | Path):
        return str(resolve_checkpoint(checkpoint).resolve())
    return checkpoint


def _as_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16: its bits travel as uint16, which no tensor of a model has.
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _as_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.tensor(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
