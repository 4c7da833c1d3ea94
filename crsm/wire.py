"""How numbers travel in messages: as fp32, or rounded to bf16.

numpy has no bf16: its bits travel as ``uint16``, a kind that no other array of a message has. Invariants:

* rounding is to nearest, ties to even; what bf16 can hold comes back bit for bit; NaN stays NaN, infinity infinity;
* an fp32 array passes through both ways without a copy, if it is contiguous;
* what leaves here is contiguous numpy on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crsm.config import ModelConfig

Wire = Literal["fp32", "bf16"]
WIRES: tuple[Wire, ...] = ("fp32", "bf16")

_EXPONENT = np.uint16(0x7F80)


def to_wire(numbers: np.ndarray | Tensor, wire: Wire = "fp32") -> np.ndarray:
    """Numbers as they travel: float32, or the bits of bf16 in uint16.

    Raises:
        ValueError: ``wire`` is neither.
    """
    if wire not in WIRES:
        raise ValueError(f"wire = {wire!r}; allowed: {', '.join(WIRES)}")
    if isinstance(numbers, np.ndarray):
        if wire == "fp32":
            return np.ascontiguousarray(numbers, np.float32)
        # torch warns of arrays that it may not write to, which messages are.
        numbers = torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())
    numbers = numbers.detach()
    if wire == "fp32":
        return numbers.to("cpu", torch.float32).contiguous().numpy()
    return numbers.to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()


def from_wire(array: np.ndarray) -> np.ndarray:
    """What travelled, as float32; an fp32 array itself, uncopied."""
    if array.dtype != np.uint16:
        return array
    return np.left_shift(array, 16, dtype=np.uint32).view(np.float32)


def wire_of(array: np.ndarray) -> Wire:
    """The kind that an array of a message has."""
    return "bf16" if array.dtype == np.uint16 else "fp32"


def is_wire(array: np.ndarray) -> bool:
    """Whether an array has one of the two kinds."""
    return array.dtype == np.float32 or array.dtype == np.uint16


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of an array of either kind are finite."""
    if array.dtype != np.uint16:
        # NaN and infinity survive a sum: where it is finite all is, and only an overflow needs the second look.
        with np.errstate(over="ignore", invalid="ignore"):
            return math.isfinite(np.add.reduce(array, axis=None)) or bool(np.isfinite(array).all())
    return bool(((array & _EXPONENT) != _EXPONENT).all())


class Shape(NamedTuple):
    """One array of a message."""

    shape: tuple[int, ...]
    dtype: str
    """``wire``: as the message's numbers travel; else numpy's name."""

    def num_bytes(self, wire: Wire) -> int:
        size = (2 if wire == "bf16" else 4) if self.dtype == "wire" else np.dtype(self.dtype).itemsize
        return size * int(np.prod(self.shape, dtype=np.int64))


def request_shapes(
    model: ModelConfig, read_layers: Sequence[int] | None = None, *, conv: bool = False
) -> dict[str, Shape]:
    """The arrays of a request: a snapshot of one generation.

    Args:
        model: sizes.
        read_layers: layers whose SSM state is sent; None: those that the settings name.
        conv: with convolution states, as the exact world model needs them.
    """
    sizes = model.backbone
    layers = model.world_model.read_layers if read_layers is None else read_layers
    read = sizes.n_layer if layers is None else len(layers)
    shapes = {
        "hidden_LD": Shape((sizes.n_layer, sizes.d_model), "wire"),
        "ssm_LHPN": Shape((read, sizes.n_heads, sizes.headdim, sizes.d_state), "wire"),
    }
    if conv:
        shapes["conv_LCK"] = Shape((sizes.n_layer, sizes.conv_channels, sizes.d_conv - 1), "wire")
    return shapes


def plan_shapes(model: ModelConfig, num_actions: int) -> dict[str, Shape]:
    """The arrays of a plan; ``num_actions``: root actions of the search."""
    sizes, rank = model.backbone, model.writer.rank
    per_layer = Shape((sizes.n_layer,), "float32")
    return {
        "value_root_L": per_layer,
        "value_plan_L": per_layer,
        "confidence_L": per_layer,
        "write_u_LRE": Shape((sizes.n_layer, rank, sizes.d_inner), "wire"),
        "write_b_LRN": Shape((sizes.n_layer, rank, sizes.d_state), "wire"),
        "policy_tokens_A": Shape((num_actions,), "int64"),
        "policy_probs_A": Shape((num_actions,), "float32"),
    }
