"""Reads of a state-space memory with a query: ``h·q`` for every head's channels, as the SSM reads itself with C.

Letters: B batch, M layers that are read, H heads, P head dimension, N d_state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crsm import native
from crsm.kernels.reference import full_precision


def read_memory(memory_BMHPN: Tensor, query_BMN: Tensor) -> Tensor:
    """``Σ_n memory[..., n] · query[n]``, one query for all heads of a layer; (B, M, H·P).

    By the native core on the CPU, where the memory wants no gradient; by PyTorch elsewhere, equal to rounding.
    """
    plain = memory_BMHPN.device.type == "cpu" and memory_BMHPN.dtype in (torch.float32, torch.float64)
    wanted = torch.is_grad_enabled() and memory_BMHPN.requires_grad
    if native.core is None or not plain or wanted or query_BMN.dtype != memory_BMHPN.dtype:
        with full_precision(memory_BMHPN):
            return torch.matmul(memory_BMHPN.flatten(2, 3), query_BMN[..., None]).squeeze(-1)
    result: Tensor = _NativeRead.apply(memory_BMHPN.flatten(2, 3), query_BMN)
    return result


class _NativeRead(torch.autograd.Function):
    """``read_memory`` by the native core, with the query's gradient; differentiable once."""

    @staticmethod
    def forward(ctx: Any, memory_BMEN: Tensor, query_BMN: Tensor) -> Tensor:
        memory_BMEN = memory_BMEN.detach().contiguous()
        read_BME = query_BMN.new_empty(memory_BMEN.shape[:3])
        native.require().memory_read(
            memory_BMEN.flatten(0, 1),
            query_BMN.detach().contiguous().flatten(0, 1),
            read_BME.view(-1, read_BME.shape[-1]),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(memory_BMEN)
        return read_BME

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BME: Tensor) -> tuple[Tensor | None, ...]:
        (memory_BMEN,) = ctx.saved_tensors
        dquery_BMN = grad_BME.new_empty(*memory_BMEN.shape[:2], memory_BMEN.shape[3])
        native.require().memory_read_backward(
            memory_BMEN.flatten(0, 1),
            grad_BME.contiguous().flatten(0, 1),
            dquery_BMN.flatten(0, 1),
            torch.get_num_threads(),
        )
        return None, dquery_BMN
