"""Mixed precision: fp32 weights, bfloat16 products.

With ``bf16``, ``torch.autocast`` casts what goes into products of matrices and into convolutions; their outputs are
bfloat16 until something wider meets them. All else is fp32:

* the weights themselves, the optimizer's moments, and gradients, also while they are summed over micro-batches and
  workers: a checkpoint holds the same kind of numbers as without it;
* the residual stream, norms, and everything that is made of logits: losses, divergences, values;
* the recurrence: ``A_log``, ``dt_bias``, step sizes, decays, the state, and the products inside the scan. (The kernels
  of ``mamba-ssm`` take bfloat16 inputs on a GPU; they carry the state in fp32 and round what a chunk reads of it.)

On CPU and on CUDA alike. bfloat16 has the exponent of fp32, so no loss is scaled.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where a stage computes; gradients are computed outside of it."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
