"""The Mamba-2 recurrence in plain PyTorch: the definition that every faster kernel is tested against.

State-space duality, arXiv 2405.21060. Per head, with one decay ``a[t] = exp(dt[t]·A)`` for the whole head::

    h[t] = a[t]·h[t-1] + (dt[t]·x[t]) ⊗ B[t]        y[t] = h[t]·C[t] + D·x[t]

Letters: B batch, T time, H heads, P head dimension, N d_state, C convolution channels, K convolution width, S chunks,
Q tokens of a chunk. All functions are pure: states come in and go out, nothing is changed in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "reference"


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
    return (state_BHPN @ C_BN[:, None, :, None]).squeeze(-1), state_BHPN, decay_BH
