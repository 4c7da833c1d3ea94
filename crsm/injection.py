"""Gated injection: how a plan enters System 1's recurrent state, and how it leaves again.

    target = clip(h + Σ_r u_r ⊗ b_r  to the ball ‖·‖ ≤ ‖h‖, per head)        h ← h + α · (target − h)

``h`` and ``target`` lie in the ball, and a ball is convex: no number of injections makes a head's norm grow. α = 0
leaves the very same bits.

What was written is remembered as the difference it made. One plan is in force at a time: before a newer one is
written, and when it is spent, the difference, carried to now by the product of the state's own decays, is withdrawn.
In Mamba-2 the decay is one scalar per head and step, so this transport is exact within the layer.

Letters: B batch, H heads, P head dimension, N d_state, R rank, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crsm import native
from crsm.kernels.reference import full_precision

LARGEST_WRITE = 1e15
"""Entries of a write beyond this are cut: squares of larger ones would overflow in the norms."""


def outer_write(u_BRE: Tensor, b_BRN: Tensor, n_heads: int) -> Tensor:
    """``Σ_r u_r ⊗ b_r`` as a state: (B, R, H·P) and (B, R, N) to (B, H, P, N)."""
    with full_precision(u_BRE):
        return (u_BRE.transpose(1, 2) @ b_BRN).unflatten(1, (n_heads, -1))


def clip_to_norm(x_BHPN: Tensor, limit_BH: Tensor) -> Tensor:
    """Scales every head down to at most its limit; heads within it keep their bits."""
    norm_BH = head_norms(x_BHPN)
    # A hair inside the ball, so that rounding cannot add up to growth over thousands of injections.
    inside_BH = limit_BH * (1 - 2**-20) / norm_BH.clamp_min(1e-30)
    scale_BH = torch.where(norm_BH > limit_BH, inside_BH, torch.ones_like(norm_BH))
    return x_BHPN * scale_BH[..., None, None]


def head_norms(x_BHPN: Tensor) -> Tensor:
    """Frobenius norm of every head, (B, H)."""
    return x_BHPN.flatten(2).norm(dim=2)


def inject(ssm_BHPN: Tensor, write_BHPN: Tensor, alpha_B: Tensor) -> Tensor:
    """Blends a write into one layer's states.

    Args:
        ssm_BHPN: the states.
        write_BHPN: what to add before clipping.
        alpha_B: gate of every row, in [0, 1].

    Returns:
        The new states; a row with α = 0 is bit-identical.
    """
    limit_BH = head_norms(ssm_BHPN)
    # The factors of a plan are finite; products of large ones may still meet as ∞ − ∞. No number counts as the largest.
    cut_BHPN = write_BHPN.nan_to_num(nan=LARGEST_WRITE).clamp(-LARGEST_WRITE, LARGEST_WRITE)
    target_BHPN = clip_to_norm(ssm_BHPN + cut_BHPN, limit_BH)
    alpha = alpha_B[:, None, None, None]
    blended_BHPN = clip_to_norm(ssm_BHPN + alpha * (target_BHPN - ssm_BHPN), limit_BH)
    return torch.where(alpha > 0, blended_BHPN, ssm_BHPN)


def inject_low_rank(ssm_BHPN: Tensor, u_BRE: Tensor, b_BRN: Tensor, alpha_B: Tensor) -> Tensor:
    """:func:`inject` of :func:`outer_write`, in one pass over the states where the native core is there.

    It differs from the two by rounding only. Gradients flow to the write; where the states or α want one, the two
    functions themselves are used.
    """
    plain = ssm_BHPN.device.type == "cpu" and ssm_BHPN.dtype in (torch.float32, torch.float64)
    wanted = torch.is_grad_enabled() and (ssm_BHPN.requires_grad or alpha_B.requires_grad)
    if native.core is None or not plain or wanted:
        return inject(ssm_BHPN, outer_write(u_BRE, b_BRN, ssm_BHPN.shape[1]), alpha_B)
    result: Tensor = _NativeInject.apply(ssm_BHPN, u_BRE, b_BRN, alpha_B.to(ssm_BHPN.dtype))
    return result


class _NativeInject(torch.autograd.Function):
    """``inject_low_rank`` by the native core; differentiable once."""

    @staticmethod
    def forward(ctx: Any, ssm_BHPN: Tensor, u_BRE: Tensor, b_BRN: Tensor, alpha_B: Tensor) -> Tensor:
        arrays = tuple(tensor.detach().contiguous() for tensor in (ssm_BHPN, u_BRE, b_BRN, alpha_B))
        out_BHPN = torch.empty_like(arrays[0])
        native.require().inject(*arrays, LARGEST_WRITE, out_BHPN, torch.get_num_threads())
        ctx.save_for_backward(*arrays)
        return out_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        ssm_BHPN, u_BRE, b_BRN, alpha_B = ctx.saved_tensors
        du_BRE, db_BRN = torch.empty_like(u_BRE), torch.empty_like(b_BRN)
        native.require().inject_backward(
            ssm_BHPN,
            u_BRE,
            b_BRN,
            alpha_B,
            LARGEST_WRITE,
            grad_BHPN.contiguous(),
            du_BRE,
            db_BRN,
            torch.get_num_threads(),
        )
        return None, du_BRE, db_BRN, None


def withdraw(ssm_BHPN: Tensor, delta_BHPN: Tensor) -> Tensor:
    """Takes a former write, already carried to now, out of one layer's states; no head's norm grows.

    A row whose delta is all zero is bit-identical.
    """
    taken_BHPN = clip_to_norm(ssm_BHPN - delta_BHPN, head_norms(ssm_BHPN))
    return torch.where((delta_BHPN != 0).flatten(1).any(dim=1)[:, None, None, None], taken_BHPN, ssm_BHPN)


def carry(delta_BHPN: Tensor, decay_BH: Tensor) -> Tensor:
    """Carries a difference of states over one consumed token, or several (``decay`` their product)."""
    return delta_BHPN * decay_BH[..., None, None]
