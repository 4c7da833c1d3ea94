"""The kernels of :mod:`crsm.kernels.reference` in C++ for CPU, with their gradients: for training and for prompts.

Tensors that the C++ does not take (another device, bfloat16, mixed types) are passed to the reference, call by call, so
that a model may be moved or converted at any time; under autocast its products and convolutions are the reference's,
norms and scan stay here. Results do not depend on the number of threads, which is that of
PyTorch (``torch.set_num_threads``), nor on the other rows of a batch.

Gradients are of first order: they cannot be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from crsm.kernels import reference
from crsm.kernels.reference import causal_conv_step, state_step
from crsm.native import available, require

__all__ = [
    "NAME",
    "causal_conv",
    "causal_conv_step",
    "chunk_scan",
    "gated_rms_norm",
    "linear",
    "mixer",
    "rms_norm",
    "state_step",
]

NAME = "native"

_FEW_ROWS = 16
"""Up to so many rows, putting the weight into the product's order costs more than it gains."""


def _takes(*tensors: Tensor | None) -> bool:
    """Whether the C++ takes them: on the CPU, of one type, float32 or float64."""
    dtype = tensors[0].dtype if tensors[0] is not None else None
    return (
        dtype in (torch.float32, torch.float64)
        and available()
        and all(t is None or (t.device.type == "cpu" and t.dtype == dtype and t.numel() > 0) for t in tensors)
    )


def _differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _rows(x: Tensor) -> Tensor:
    """The same values with contiguous rows, in place where they are so already."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(x: Tensor) -> Tensor:
    return x.detach().contiguous()


def _maybe_dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else _dense(x)


def _documents(segment_BT: Tensor | None) -> Tensor | None:
    return None if segment_BT is None else segment_BT.to(torch.int64).contiguous()


def _three_axes(x: Tensor) -> Tensor:
    """(…, width) as (1, rows, width) or (B, T, width)."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


# ------------------------------------------------------------------------------------------------------------ linear


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """See :func:`crsm.kernels.reference.linear`; in C++ for float32 and more than a few rows."""
    few = x.numel() <= _FEW_ROWS * x.shape[-1]
    if x.dtype != torch.float32 or few or torch.is_autocast_enabled("cpu") or not _takes(x, weight_OI):
        return reference.linear(x, weight_OI)
    if _differentiates(x, weight_OI):
        y: Tensor = _Linear.apply(x, weight_OI)
        return y
    return _linear_forward(x, weight_OI)


def _linear_forward(x: Tensor, weight_OI: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
    require().linear(_dense(x).flatten(0, -2), _dense(weight_OI), y.flatten(0, -2), torch.get_num_threads())
    return y


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _linear_forward(x, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        core, threads = require(), torch.get_num_threads()
        dy_MO = _dense(dy).flatten(0, -2)
        dx = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx = x.new_empty(x.shape)
            core.linear_input_grad(dy_MO, _dense(weight_OI), dx.flatten(0, -2), threads)
        if ctx.needs_input_grad[1]:
            dweight_OI = x.new_empty(weight_OI.shape)
            core.linear_weight_grad(dy_MO, _dense(x).flatten(0, -2), dweight_OI, threads)
        return dx, dweight_OI


# ------------------------------------------------------------------------------------------------------------- norms


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """See :func:`crsm.kernels.reference.rms_norm`."""
    if not _takes(x, weight_E):
        return reference.rms_norm(x, weight_E, eps)
    y: Tensor = _Norm.apply(x, None, weight_E, eps)
    return y


def gated_rms_norm(y: Tensor, z: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """See :func:`crsm.kernels.reference.gated_rms_norm`."""
    if not _takes(y, z, weight_E):
        return reference.gated_rms_norm(y, z, weight_E, eps)
    out: Tensor = _Norm.apply(y, z, weight_E, eps)
    return out


class _Norm(Function):
    """Saves its inputs; the norm and the gate are computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight_E)
        ctx.eps = eps
        out = y.new_empty(y.shape)
        gate = None if z is None else _three_axes(_rows(z))
        require().norm_forward(
            _three_axes(_rows(y)), gate, _dense(weight_E), eps, _three_axes(out), torch.get_num_threads()
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        y, z, weight_E = ctx.saved_tensors
        dy, dweight_E = y.new_empty(y.shape), y.new_empty(weight_E.shape)
        dz = None if z is None else y.new_empty(z.shape)
        require().norm_backward(
            _three_axes(_rows(y)),
            None if z is None else _three_axes(_rows(z)),
            _dense(weight_E),
            ctx.eps,
            _three_axes(_rows(dout)),
            _three_axes(dy),
            None if dz is None else _three_axes(dz),
            dweight_E,
            torch.get_num_threads(),
        )
        return dy, dz, dweight_E, None


# ------------------------------------------------------------------------------------------------------- convolution


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, state_BCK: Tensor, segment_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`crsm.kernels.reference.causal_conv`."""
    if not _takes(x_BTC, weight_CK, bias_C, state_BCK):
        return reference.causal_conv(x_BTC, weight_CK, bias_C, state_BCK, segment_BT)
    y_BTC, new_BCK = _Conv.apply(x_BTC, weight_CK, bias_C, state_BCK, segment_BT)
    return y_BTC, new_BCK


class _Conv(Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, state_BCK: Tensor, segment_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        segment_BT = _documents(segment_BT)
        ctx.save_for_backward(x_BTC, weight_CK, bias_C, state_BCK, segment_BT)
        y_BTC, new_BCK = x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty(state_BCK.shape)
        require().conv_forward(
            _rows(x_BTC),
            _dense(weight_CK),
            _dense(bias_C),
            _dense(state_BCK),
            segment_BT,
            False,
            y_BTC,
            new_BCK,
            torch.get_num_threads(),
        )
        return y_BTC, new_BCK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor | None, dnew_BCK: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BTC, weight_CK, bias_C, state_BCK, segment_BT = ctx.saved_tensors
        dx_BTC, dweight_CK, dbias_C = (x_BTC.new_empty(t.shape) for t in (x_BTC, weight_CK, bias_C))
        dstate_BCK = x_BTC.new_empty(state_BCK.shape) if ctx.needs_input_grad[3] else None
        require().conv_backward(
            _rows(x_BTC),
            _dense(weight_CK),
            _dense(bias_C),
            _dense(state_BCK),
            segment_BT,
            False,
            torch.zeros_like(dx_BTC) if dy_BTC is None else _rows(dy_BTC),
            _maybe_dense(dnew_BCK),
            dx_BTC,
            dweight_CK,
            dbias_C,
            dstate_BCK,
            torch.get_num_threads(),
        )
        return dx_BTC, dweight_CK, dbias_C, dstate_BCK, None


# -------------------------------------------------------------------------------------------------------------- scan


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
    """See :func:`crsm.kernels.reference.chunk_scan`; chunks are never longer than 64 tokens."""
    if not _takes(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, state_BHPN):
        return reference.chunk_scan(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, state_BHPN, chunk_size, segment_BT)
    y_BTI, last_BHPN = _Scan.apply(x_BTHP.flatten(2), dt_BTH, A_H, B_BTN, C_BTN, state_BHPN, chunk_size, segment_BT)
    return y_BTI.unflatten(2, x_BTHP.shape[2:]), last_BHPN


def _kept_states(x_BTI: Tensor, state_BHPN: Tensor, chunk_size: int) -> Tensor | None:
    """Memory for the state before every chunk, which the gradients need; None for a single chunk."""
    chunks = require().scan_chunks(x_BTI.shape[1], chunk_size)
    batch, heads, head_dim, d_state = state_BHPN.shape
    return x_BTI.new_empty(batch, heads, chunks, d_state, head_dim) if chunks > 1 else None


class _Scan(Function):
    """Saves its inputs and the states between chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        state_BHPN: Tensor,
        chunk_size: int,
        segment_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        segment_BT = _documents(segment_BT)
        y_BTI, last_BHPN = x_BTI.new_empty(x_BTI.shape), x_BTI.new_empty(state_BHPN.shape)
        kept = _kept_states(x_BTI, state_BHPN, chunk_size) if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(x_BTI, dt_BTH, A_H, B_BTN, C_BTN, state_BHPN, segment_BT, kept)
        ctx.chunk_size = chunk_size
        require().scan_forward(
            *(_rows(x_BTI), _rows(dt_BTH), _dense(A_H), _rows(B_BTN), _rows(C_BTN), None, None, _dense(state_BHPN)),
            *(segment_BT, chunk_size, y_BTI, last_BHPN, kept, torch.get_num_threads()),
        )
        return y_BTI, last_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTI: Tensor | None, dlast_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BTI, dt_BTH, A_H, B_BTN, C_BTN, state_BHPN, segment_BT, kept = ctx.saved_tensors
        dx, ddt, dA, dB, dC = (x_BTI.new_empty(t.shape) for t in (x_BTI, dt_BTH, A_H, B_BTN, C_BTN))
        dstate = x_BTI.new_empty(state_BHPN.shape) if ctx.needs_input_grad[5] else None
        dy_BTI = torch.zeros_like(dx) if dy_BTI is None else _rows(dy_BTI)
        require().scan_backward(
            *(_rows(x_BTI), _rows(dt_BTH), _dense(A_H), _rows(B_BTN), _rows(C_BTN), None, None, _dense(state_BHPN)),
            *(segment_BT, ctx.chunk_size, kept, dy_BTI, _maybe_dense(dlast_BHPN)),
            *(dx, ddt, dA, dB, dC, None, None, dstate, torch.get_num_threads()),
        )
        return dx, ddt, dA, dB, dC, dstate, None, None


# ------------------------------------------------------------------------------------------------------------- mixer


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`crsm.kernels.reference.mixer`."""
    tensors = (zxBCdt_BTI, conv_weight_CK, conv_bias_C, dt_bias_H, A_H, D_H, norm_weight_E, conv_BCK, ssm_BHPN)
    mixed = torch.is_autocast_enabled("cpu")
    if mixed or not _takes(*tensors):
        scan = chunk_scan if mixed else None
        return reference.mixer(*tensors[:7], norm_eps, conv_BCK, ssm_BHPN, chunk_size, segment_BT, scan=scan)
    y_BTE, new_BCK, last_BHPN = _Mixer.apply(*tensors, norm_eps, chunk_size, _documents(segment_BT))
    return y_BTE, new_BCK, last_BHPN


class _Mixer(Function):
    """Convolution, scan and norm on slices of one buffer. Saves it, and the outputs of convolution and scan."""

    @staticmethod
    def forward(
        ctx: Any,
        zxBCdt_BTI: Tensor,
        conv_weight_CK: Tensor,
        conv_bias_C: Tensor,
        dt_bias_H: Tensor,
        A_H: Tensor,
        D_H: Tensor,
        norm_weight_E: Tensor,
        conv_BCK: Tensor,
        ssm_BHPN: Tensor,
        norm_eps: float,
        chunk_size: int,
        segment_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        core, threads = require(), torch.get_num_threads()
        z, xBC, dt = reference.split_projection(_rows(zxBCdt_BTI), ssm_BHPN)
        weights = [_dense(t) for t in (conv_weight_CK, conv_bias_C, dt_bias_H, A_H, D_H, norm_weight_E)]
        state = _dense(ssm_BHPN)
        mixed, new_BCK = xBC.new_empty(xBC.shape), xBC.new_empty(conv_BCK.shape)
        core.conv_forward(xBC, *weights[:2], _dense(conv_BCK), segment_BT, True, mixed, new_BCK, threads)
        x, B, C = reference.split_mixed(mixed, ssm_BHPN)
        y_BTE, last_BHPN = z.new_empty(z.shape), torch.empty_like(state)
        kept = _kept_states(x, state, chunk_size) if any(ctx.needs_input_grad) else None
        core.scan_forward(
            *(x, dt, weights[3], B, C, weights[4], weights[2], state, segment_BT, chunk_size),
            *(y_BTE, last_BHPN, kept, threads),
        )
        out_BTE = torch.empty_like(y_BTE)
        core.norm_forward(y_BTE, z, weights[5], norm_eps, out_BTE, threads)
        ctx.save_for_backward(zxBCdt_BTI, *weights, _dense(conv_BCK), state, segment_BT, mixed, y_BTE, kept)
        ctx.norm_eps, ctx.chunk_size = norm_eps, chunk_size
        return out_BTE, new_BCK, last_BHPN

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout_BTE: Tensor | None, dnew_BCK: Tensor | None, dlast_BHPN: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        zxBCdt_BTI, *weights, window, state, segment_BT, mixed, y_BTE, kept = ctx.saved_tensors
        core, threads = require(), torch.get_num_threads()
        z, xBC, dt = reference.split_projection(_rows(zxBCdt_BTI), state)
        dzxBCdt_BTI = zxBCdt_BTI.new_empty(zxBCdt_BTI.shape)
        dz, dxBC, ddt = reference.split_projection(dzxBCdt_BTI, state)
        dweights = [torch.empty_like(t) for t in weights]
        dy, dmixed = torch.empty_like(y_BTE), torch.empty_like(mixed)
        dout_BTE = torch.zeros_like(y_BTE) if dout_BTE is None else _rows(dout_BTE)
        core.norm_backward(y_BTE, z, weights[5], ctx.norm_eps, dout_BTE, dy, dz, dweights[5], threads)
        dstate = torch.empty_like(state) if ctx.needs_input_grad[8] else None
        x, B, C = reference.split_mixed(mixed, state)
        dx, dB, dC = reference.split_mixed(dmixed, state)
        core.scan_backward(
            *(x, dt, weights[3], B, C, weights[4], weights[2], state, segment_BT, ctx.chunk_size, kept),
            *(dy, _maybe_dense(dlast_BHPN)),
            *(dx, ddt, dweights[3], dB, dC, dweights[4], dweights[2], dstate, threads),
        )
        dwindow = torch.empty_like(window) if ctx.needs_input_grad[7] else None
        core.conv_backward(
            *(xBC, *weights[:2], window, segment_BT, True, dmixed, _maybe_dense(dnew_BCK)),
            *(dxBC, *dweights[:2], dwindow, threads),
        )
        return dzxBCdt_BTI, *dweights, dwindow, dstate, None, None, None
