"""Modules that compute on chosen kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crsm.kernels import Kernels, restore_kernels, select_kernels


class KernelModule(nn.Module):
    """A module with ``kernels``, which travel by name: a Python module can be neither copied nor pickled."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        """
        Args:
            kernels: None: the best that this machine has.
        """
        super().__init__()
        self.kernels = kernels or select_kernels()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kernels": self.kernels.NAME}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"kernels": restore_kernels(state["kernels"])})

    def dense(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """``layer(x)`` on the kernels; (…, I) to (…, O)."""
        y = self.kernels.linear(x, layer.weight)
        return y if layer.bias is None else y + layer.bias
