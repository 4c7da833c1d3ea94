"""The Mamba-2 recurrence behind one interface: modules with the functions of :mod:`crsm.kernels.reference`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from crsm.kernels import cuda, reference


class Kernels(Protocol):
    """What a kernel module offers; :mod:`crsm.kernels.reference` holds the definitions and the shapes."""

    NAME: str

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


KERNELS: dict[str, Kernels] = {reference.NAME: reference, cuda.NAME: cuda}


def cpu_kernels() -> Kernels:
    """The best kernels for tensors on the CPU."""
    return reference


def select_kernels(name: str | None = None) -> Kernels:
    """The kernels to use; None: the best that this machine has.

    Those for a GPU also take tensors on the CPU, and hand them to :func:`cpu_kernels`.

    Raises:
        ValueError: no kernels of that name.
    """
    if name is None:
        return cuda if cuda.available() else cpu_kernels()
    if name not in KERNELS:
        raise ValueError(f"kernels = {name!r}; allowed: {', '.join(KERNELS)}")
    return KERNELS[name]
