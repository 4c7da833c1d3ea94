"""The Mamba-2 recurrence behind one interface: modules with the functions of :mod:`crsm.kernels.reference`.

``reference`` is the definition in plain PyTorch, for every device and type; ``native`` is C++ for CPU; ``cuda`` wraps
``mamba-ssm`` and ``causal-conv1d``. The best that there is gets chosen; ``CRSM_KERNELS`` in the environment names
another one. All take tensors of every device and type, and hand what they cannot do to one another.
"""

from __future__ import annotations

import os
from typing import Protocol

from torch import Tensor

from crsm.kernels import cuda, native, reference
from crsm.native import MISSING, available


class Kernels(Protocol):
    """What a kernel module offers; :mod:`crsm.kernels.reference` holds the definitions and the shapes."""

    NAME: str

    def linear(self, x: Tensor, weight_OI: Tensor) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight_E: Tensor, eps: float) -> Tensor: ...

    def gated_rms_norm(self, y: Tensor, z: Tensor, weight_E: Tensor, eps: float) -> Tensor: ...

    def mixer(
        self,
        zxBCdt_BTI: Tensor,
        conv_weight_CK: Tensor,
        conv_bias_C: Tensor,
        dt_bias_H: Tensor,
        A_H: Tensor,
        D_H: Tensor,
        norm_weight_E: Tensor,
        norm_eps: float,
        conv_BCK: Tensor,
        ssm_BHPN: Tensor,
        chunk_size: int,
        segment_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def causal_conv(
        self,
        x_BTC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor,
        state_BCK: Tensor,
        segment_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def causal_conv_step(
        self, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor, state_BCK: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def chunk_scan(
        self,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        state_BHPN: Tensor,
        chunk_size: int,
        segment_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def state_step(
        self, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BN: Tensor, C_BN: Tensor, state_BHPN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


KERNELS: dict[str, Kernels] = {reference.NAME: reference, native.NAME: native, cuda.NAME: cuda}
"""All that this package has; what of it runs on this machine, :func:`select_kernels` knows."""

_PREFERENCE = (cuda.NAME, native.NAME, reference.NAME)
"""The best first."""


def _missing(name: str) -> str:
    """Why these kernels cannot be used; empty if they can."""
    if name == cuda.NAME:
        return cuda.missing()
    return f"no native core: {MISSING}" if name == native.NAME and not available() else ""


def cpu_kernels() -> Kernels:
    """The best kernels for tensors on the CPU."""
    return native if available() else reference


def restore_kernels(name: str) -> Kernels:
    """The kernels that a model was saved with, or the best of this machine if it lacks them."""
    return select_kernels(None if _missing(name) else name)


def select_kernels(name: str | None = None) -> Kernels:
    """The kernels to use; None: those that ``CRSM_KERNELS`` names, else the best that this machine has.

    Raises:
        ValueError: no kernels of that name, or not on this machine.
    """
    asked = "kernels"
    if name is None:
        name, asked = os.environ.get("CRSM_KERNELS") or None, "CRSM_KERNELS"
    if name is None:
        return next(KERNELS[best] for best in _PREFERENCE if not _missing(best))
    if name not in KERNELS:
        raise ValueError(f"{asked} = {name!r}; allowed: {', '.join(KERNELS)}")
    if why := _missing(name):
        raise ValueError(f"{asked} = {name!r}: {why}")
    return KERNELS[name]
