"""How many threads this process computes with: one number for PyTorch and for the native core."""

from __future__ import annotations

import torch

from crsm import native


def use_threads(count: int) -> None:
    """Bounds the threads of every computation from now on.

    Raises:
        ValueError: ``count`` is below 1.
    """
    native.set_num_threads(count)
    torch.set_num_threads(count)
