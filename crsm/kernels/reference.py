"""The Mamba-2 recurrence in plain PyTorch: the definition that every faster kernel is tested against.

State-space duality, arXiv 2405.21060. Per head, with one decay ``a[t] = exp(dt[t]·A)`` for the whole head::

    h[t] = a[t]·h[t-1] + (dt[t]·x[t]) ⊗ B[t]        y[t] = h[t]·C[t] + D·x[t]

Letters: B batch, T time, H heads, P head dimension, N d_state, C convolution channels, K convolution width, S chunks,
Q tokens of a chunk. All functions are pure: states come in and go out, nothing is changed in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "reference"


def at_least_fp32(x: Tensor) -> Tensor:
    """What the norms and the recurrence compute in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast on the device of ``x``: around products of the recurrence and around losses, which stay fp32 when
    everything else is computed in bfloat16."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """A dense layer without bias: (…, I) to (…, O)."""
    return F.linear(x, weight_OI)


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis, computed in fp32 (arXiv 1910.07467)."""
    return F.rms_norm(at_least_fp32(x), weight_E.shape, at_least_fp32(weight_E), eps).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm` of ``y · silu(z)``: the norm before Mamba-2's output projection."""
    return rms_norm(y * F.silu(z), weight_E, eps)


def split_projection(zxBCdt: Tensor, ssm_BHPN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input projection's output as gate z (…, E), convolution inputs xBC (…, C) and raw step sizes dt (…, H)."""
    _, heads, head_dim, d_state = ssm_BHPN.shape
    z, xBC, dt = zxBCdt.split([heads * head_dim, heads * head_dim + 2 * d_state, heads], dim=-1)
    return z, xBC, dt


def split_mixed(xBC: Tensor, ssm_BHPN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's output as x (…, E), B (…, N) and C (…, N)."""
    _, heads, head_dim, d_state = ssm_BHPN.shape
    x, B, C = xBC.split([heads * head_dim, d_state, d_state], dim=-1)
    return x, B, C


def mixer(
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
    *,
    conv: Callable[..., tuple[Tensor, Tensor]] | None = None,
    scan: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All of a Mamba-2 mixer that lies between its two projections.

    ``norm(scan(silu(conv(xBC)), softplus(dt + dt_bias)) + D·x, z)``. As one function, so that a kernel can work on the
    slices of one buffer; a module of kernels that has only the parts passes them as ``conv`` and ``scan``.

    Args:
        zxBCdt_BTI: output of the input projection, in the order z, x, B, C, dt; I = 2·E + 2·N + H, E = H·P.
        conv_weight_CK, conv_bias_C: the short convolution; C = E + 2·N.
        dt_bias_H: added to dt before the softplus.
        A_H: decay rates, negative.
        D_H: skip connection of every head.
        norm_weight_E, norm_eps: the gated norm.
        conv_BCK, ssm_BHPN: the state to start from.
        chunk_size, segment_BT: see :func:`chunk_scan`.
        conv, scan: in place of :func:`causal_conv` and :func:`chunk_scan`.

    Returns:
        The input of the output projection (B, T, E), and the new state: window (B, C, K-1) and (B, H, P, N).
    """
    z_BTE, xBC_BTC, dt_BTH = split_projection(zxBCdt_BTI, ssm_BHPN)
    xBC_BTC, conv_BCK = (conv or causal_conv)(xBC_BTC, conv_weight_CK, conv_bias_C, conv_BCK, segment_BT)
    x_BTE, B_BTN, C_BTN = split_mixed(at_least_fp32(F.silu(xBC_BTC)), ssm_BHPN)
    x_BTHP = x_BTE.unflatten(-1, ssm_BHPN.shape[1:3])
    dt_BTH = F.softplus(at_least_fp32(dt_BTH) + at_least_fp32(dt_bias_H))
    with full_precision(x_BTHP):
        y_BTHP, ssm_BHPN = (scan or chunk_scan)(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, ssm_BHPN, chunk_size, segment_BT)
    y_BTE = (y_BTHP + D_H[:, None] * x_BTHP).flatten(2).to(zxBCdt_BTI.dtype)
    return gated_rms_norm(y_BTE, z_BTE, norm_weight_E, norm_eps), conv_BCK, ssm_BHPN


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, state_BCK: Tensor, segment_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution that starts from, and returns, its window.

    Args:
        x_BTC: inputs.
        weight_CK: taps, the newest input last.
        bias_C: bias.
        state_BCK: the ``K-1`` inputs before ``x``, oldest first (B, C, K-1).
        segment_BT: document of each token, ascending; taps never reach over a change of document. The window that
            comes in belongs to the document of the first token.

    Returns:
        Outputs (B, T, C), before the activation, and the new window (B, C, K-1).
    """
    width = weight_CK.shape[1]
    padded_BCT = torch.cat([state_BCK.to(x_BTC.dtype), x_BTC.transpose(1, 2)], dim=2)
    new_state_BCK = padded_BCT[:, :, padded_BCT.shape[2] - (width - 1) :]
    if segment_BT is None:
        y_BCT = F.conv1d(padded_BCT, weight_CK[:, None], bias_C, groups=weight_CK.shape[0])
        return y_BCT.transpose(1, 2), new_state_BCK
    length = x_BTC.shape[1]
    document_BT = torch.cat([segment_BT[:, :1].expand(-1, width - 1), segment_BT], dim=1)
    y_BTC = bias_C + torch.zeros_like(x_BTC)
    for tap in range(width):
        same_BT = document_BT[:, tap : tap + length] == segment_BT
        y_BTC = y_BTC + weight_CK[:, tap] * padded_BCT[:, :, tap : tap + length].transpose(1, 2) * same_BT[..., None]
    last_BT = document_BT[:, -(width - 1) :] == segment_BT[:, -1:]
    return y_BTC, new_state_BCK * last_BT[:, None]


def causal_conv_step(x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor, state_BCK: Tensor) -> tuple[Tensor, Tensor]:
    """One token of :func:`causal_conv`: output (B, C) and the new window (B, C, K-1)."""
    window_BCK = torch.cat([state_BCK.to(x_BC.dtype), x_BC[:, :, None]], dim=2)
    return (window_BCK * weight_CK).sum(dim=2) + bias_C, window_BCK[:, :, 1:]


def chunk_scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BHPN: Tensor,
    chunk_size: int,
    segment_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over a whole sequence: quadratic inside a chunk, linear from chunk to chunk.

    Args:
        x_BTHP: inputs.
        dt_BTH: step sizes, positive.
        A_H: decay rates, negative.
        B_BTN, C_BTN: input and output projections, shared by all heads.
        state_BHPN: the state to start from; it belongs to the document of the first token.
        chunk_size: tokens per chunk; changes the result by rounding only.
        segment_BT: document of each token, ascending; the state is reset where it changes.

    Returns:
        ``h[t]·C[t]`` (B, T, H, P), without the D term, and the last state (B, H, P, N).
    """
    outputs = []
    carried_B = None if segment_BT is None else segment_BT[:, 0]
    for start in range(0, x_BTHP.shape[1], chunk_size):
        piece = slice(start, start + chunk_size)
        y_BQHP, state_BHPN = _chunk(
            x_BTHP[:, piece] * dt_BTH[:, piece, :, None],
            (dt_BTH[:, piece] * A_H).cumsum(dim=1),
            B_BTN[:, piece],
            C_BTN[:, piece],
            state_BHPN,
            None if segment_BT is None else segment_BT[:, piece],
            carried_B,
        )
        outputs.append(y_BQHP)
        if segment_BT is not None:
            carried_B = segment_BT[:, min(start + chunk_size, segment_BT.shape[1]) - 1]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state_BHPN


def _chunk(
    dtx_BQHP: Tensor,
    decay_BQH: Tensor,
    B_BQN: Tensor,
    C_BQN: Tensor,
    state_BHPN: Tensor,
    segment_BQ: Tensor | None,
    carried_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One chunk; ``decay`` is the logarithm of the decay product from the chunk's start up to each token."""
    length = dtx_BQHP.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=dtx_BQHP.device).triu(1)
    decay_BHQ = decay_BQH.transpose(1, 2)
    log_BHQQ = (decay_BHQ[..., :, None] - decay_BHQ[..., None, :]).masked_fill(later, -torch.inf)
    entering_BHQ = decay_BHQ.exp()
    leaving_BHQ = (decay_BHQ[..., -1:] - decay_BHQ).exp()
    if segment_BQ is not None and carried_B is not None:
        other_BQQ = segment_BQ[:, :, None] != segment_BQ[:, None, :]
        log_BHQQ = log_BHQQ.masked_fill(other_BQQ[:, None], -torch.inf)
        entering_BHQ = entering_BHQ * (segment_BQ == carried_B[:, None])[:, None]
        leaving_BHQ = leaving_BHQ * (segment_BQ == segment_BQ[:, -1:])[:, None]
    scores_BQQ = C_BQN @ B_BQN.transpose(1, 2)
    dtx_BHQP = dtx_BQHP.transpose(1, 2)
    inside_BHQP = (scores_BQQ[:, None] * log_BHQQ.exp()) @ dtx_BHQP
    before_BHQP = (C_BQN[:, None] @ state_BHPN.transpose(2, 3)) * entering_BHQ[..., None]
    added_BHPN = (dtx_BHQP * leaving_BHQ[..., None]).transpose(2, 3) @ B_BQN[:, None]
    state_BHPN = state_BHPN * entering_BHQ[..., -1, None, None] + added_BHPN
    return (inside_BHQP + before_BHQP).transpose(1, 2), state_BHPN


def state_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BN: Tensor, C_BN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of :func:`chunk_scan`.

    Returns:
        ``h·C`` (B, H, P), the new state (B, H, P, N), and this token's decay per head (B, H).
    """
    decay_BH = (dt_BH * A_H).exp()
    added_BHPN = (x_BHP * dt_BH[..., None])[..., None] * B_BN[:, None, None]
    state_BHPN = state_BHPN * decay_BH[..., None, None] + added_BHPN
    with full_precision(state_BHPN):
        return (state_BHPN @ C_BN[:, None, :, None]).squeeze(-1), state_BHPN, decay_BH
