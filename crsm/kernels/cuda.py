"""The Mamba-2 recurrence on a GPU, by the kernels of ``mamba-ssm`` (Triton) and ``causal-conv1d`` (CUDA).

Same functions, shapes and meaning as :mod:`crsm.kernels.reference`. What those libraries cannot do goes elsewhere,
call by call: tensors on the CPU to the best kernels for it, everything else to the reference.

=========================== ===========================================================================================
convolution                 fp32, fp16, bf16; C a multiple of 8, K from 2 to 4, at least K tokens
scan                        fp32, fp16, bf16; P and N multiples of 8 from 16 (tiles of a tensor core) to 256
gated norm                  fp32, fp16, bf16; at most 64 KB a row
single steps                as convolution and scan, and no gradients
=========================== ===========================================================================================

Both libraries take either documents (``seq_idx``) or a state to start from. With documents the state's share is added
afterwards: convolution and recurrence are linear in it, and it reaches the first document only.

Inside the scan, matrix products of fp32 inputs run in TF32. The SSM state stays fp32, whatever the inputs are.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.kernels import reference
from crsm.kernels.reference import linear, rms_norm

if TYPE_CHECKING:
    from crsm.kernels import Kernels

__all__ = [
    "NAME",
    "available",
    "causal_conv",
    "causal_conv_step",
    "chunk_scan",
    "gated_rms_norm",
    "linear",
    "missing",
    "mixer",
    "rms_norm",
    "state_step",
]

NAME = "cuda"

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHUNKS = (64, 128, 256)
"""Chunk lengths that the scan's kernels are tuned for."""


@functools.cache
def missing() -> str:
    """Why these kernels cannot be used on this machine; empty: they can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        _convolution()
        _recurrence()
        _gated_norm()
    except Exception as error:  # compiled extensions fail to load in ways of their own
        return f"mamba-ssm and causal-conv1d (the extra `cuda`) cannot be imported: {type(error).__name__}: {error}"
    return ""


def available() -> bool:
    """Whether there is a GPU, and both packages can be imported."""
    return not missing()


def _convolution() -> Any:
    import causal_conv1d

    return causal_conv1d


def _recurrence() -> tuple[Any, Any]:
    from mamba_ssm.ops.triton import selective_state_update, ssd_combined

    return ssd_combined.mamba_chunk_scan_combined, selective_state_update.selective_state_update


def _gated_norm() -> Any:
    from mamba_ssm.ops.triton import layernorm_gated

    return layernorm_gated.rmsnorm_fn


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
    """As :func:`crsm.kernels.reference.mixer`, with step sizes and the D term inside the scan's kernels."""
    if not _fits_recurrence(zxBCdt_BTI, ssm_BHPN):
        return _elsewhere(zxBCdt_BTI).mixer(
            *(zxBCdt_BTI, conv_weight_CK, conv_bias_C, dt_bias_H, A_H, D_H, norm_weight_E, norm_eps),
            *(conv_BCK, ssm_BHPN, chunk_size, segment_BT),
        )
    z_BTE, xBC_BTC, dt_BTH = reference.split_projection(zxBCdt_BTI, ssm_BHPN)
    xBC_BTC, conv_BCK = causal_conv(xBC_BTC, conv_weight_CK, conv_bias_C, conv_BCK, segment_BT)
    x_BTE, B_BTN, C_BTN = reference.split_mixed(F.silu(xBC_BTC), ssm_BHPN)
    x_BTHP = x_BTE.unflatten(-1, ssm_BHPN.shape[1:3])
    if segment_BT is None:
        y_BTHP, ssm_BHPN = _scan(
            *(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, chunk_size),
            D=D_H.to(torch.float32),
            dt_bias=dt_bias_H.to(torch.float32),
            dt_softplus=True,
            initial_states=ssm_BHPN.contiguous(),
        )
    else:
        dt_BTH = F.softplus(dt_BTH.to(torch.float32) + dt_bias_H)
        y_BTHP, ssm_BHPN = chunk_scan(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, ssm_BHPN, chunk_size, segment_BT)
        y_BTHP = y_BTHP + D_H[:, None] * x_BTHP
    y_BTE = y_BTHP.flatten(2).to(zxBCdt_BTI.dtype)
    return gated_rms_norm(y_BTE, z_BTE, norm_weight_E, norm_eps), conv_BCK, ssm_BHPN


def gated_rms_norm(y: Tensor, z: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """As :func:`crsm.kernels.reference.gated_rms_norm`."""
    small = y.shape[-1] * y.element_size() <= 1 << 16
    if not (_on_gpu(y) and y.dtype in _TYPES and z.dtype == y.dtype and small):
        return _elsewhere(y).gated_rms_norm(y, z, weight_E, eps)
    norm: Tensor = _gated_norm()(y, weight_E, None, z=z, eps=eps, norm_before_gate=False)
    return norm


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, state_BCK: Tensor, segment_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`crsm.kernels.reference.causal_conv`."""
    width = weight_CK.shape[1]
    if not _fits_convolution(x_BTC, weight_CK) or x_BTC.shape[1] < width:
        return _elsewhere(x_BTC).causal_conv(x_BTC, weight_CK, bias_C, state_BCK, segment_BT)
    convolve = _convolution().causal_conv1d_fn
    # The kernel wants channels side by side, and rows that start at multiples of 8.
    if x_BTC.stride(2) != 1 or x_BTC.stride(0) % 8 or x_BTC.stride(1) % 8:
        x_BTC = x_BTC.clone(memory_format=torch.contiguous_format)
    x_BCT = x_BTC.transpose(1, 2)
    state_BCK = state_BCK.to(x_BTC.dtype)
    window_BCK = torch.cat([state_BCK, x_BCT[:, :, -(width - 1) :]], dim=2)[:, :, -(width - 1) :]
    if segment_BT is None:
        # Channels side by side here too.
        start_BCK = state_BCK.transpose(1, 2).contiguous().transpose(1, 2)
        y_BCT = convolve(x_BCT, weight_CK, bias_C, initial_states=start_BCK)
        return y_BCT.transpose(1, 2), window_BCK
    y_BTC = convolve(x_BCT, weight_CK, bias_C, seq_idx=_documents(segment_BT)).transpose(1, 2)
    reach = width - 1
    # The taps of the first K-1 outputs that lie in the window that came in, the inputs after it being 0.
    before_BCK = F.conv1d(F.pad(state_BCK, (0, reach)), weight_CK[:, None].to(x_BTC.dtype), groups=weight_CK.shape[0])
    first_BK = segment_BT[:, :reach] == segment_BT[:, :1]
    head_BKC = y_BTC[:, :reach] + before_BCK.transpose(1, 2) * first_BK[..., None]
    last_BK = segment_BT[:, -reach:] == segment_BT[:, -1:]
    return torch.cat([head_BKC, y_BTC[:, reach:]], dim=1), window_BCK * last_BK[:, None]


def causal_conv_step(x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor, state_BCK: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`crsm.kernels.reference.causal_conv_step`."""
    if not _fits_convolution(x_BC, weight_CK) or _needs_gradient(x_BC, weight_CK, bias_C, state_BCK):
        return _elsewhere(x_BC).causal_conv_step(x_BC, weight_CK, bias_C, state_BCK)
    window_BCK = state_BCK.to(x_BC.dtype, copy=True)  # the kernel shifts it in place
    y_BC = _convolution().causal_conv1d_update(x_BC, window_BCK, weight_CK, bias_C)
    return y_BC, window_BCK


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
    """As :func:`crsm.kernels.reference.chunk_scan`; lengths of chunks that are not tuned for become 256."""
    if not _fits_recurrence(x_BTHP, state_BHPN):
        return _elsewhere(x_BTHP).chunk_scan(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, state_BHPN, chunk_size, segment_BT)
    if segment_BT is None:
        return _scan(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, chunk_size, initial_states=state_BHPN.contiguous())
    y_BTHP, last_BHPN = _scan(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, chunk_size, seq_idx=_documents(segment_BT))
    first_BT = segment_BT == segment_BT[:, :1]
    # What is left of the state that came in, at every token of the first document.
    left_BTH = (dt_BTH * A_H).cumsum(dim=1).exp() * first_BT[..., None]
    read_BTHP = torch.einsum("btn,bhpn->bthp", C_BTN, state_BHPN.to(C_BTN.dtype))
    y_BTHP = (y_BTHP + read_BTHP * left_BTH[..., None]).to(x_BTHP.dtype)
    return y_BTHP, last_BHPN + state_BHPN * left_BTH[:, -1, :, None, None]


def _scan(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTN: Tensor, C_BTN: Tensor, chunk_size: int, **options: Any
) -> tuple[Tensor, Tensor]:
    scan, _ = _recurrence()
    chunk = chunk_size if chunk_size in _CHUNKS else _CHUNKS[-1]
    # One group: B and C are shared by all heads.
    y_BTHP, last_BHPN = scan(
        x_BTHP, dt_BTH, A_H, B_BTN[:, :, None], C_BTN[:, :, None], chunk, return_final_states=True, **options
    )
    return y_BTHP, last_BHPN


def state_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BN: Tensor, C_BN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`crsm.kernels.reference.state_step`."""
    if not _fits_recurrence(x_BHP, state_BHPN) or _needs_gradient(x_BHP, dt_BH, A_H, B_BN, C_BN, state_BHPN):
        return _elsewhere(x_BHP).state_step(x_BHP, dt_BH, A_H, B_BN, C_BN, state_BHPN)
    _, update = _recurrence()
    state_BHPN = state_BHPN.clone(memory_format=torch.contiguous_format)  # the kernel advances it in place
    width, states = state_BHPN.shape[2:]
    # Strides of 0 tell the kernel that a head has one decay and one step size. It cannot do without D and dt_bias.
    zero_HP = dt_BH.new_zeros(()).expand(len(A_H), width)
    y_BHP = update(
        state_BHPN,
        x_BHP,
        dt_BH[..., None].expand(-1, -1, width),
        A_H[:, None, None].expand(-1, width, states),
        B_BN[:, None],
        C_BN[:, None],
        D=zero_HP,
        dt_bias=zero_HP,
    )
    return y_BHP, state_BHPN, (dt_BH * A_H).exp()


def _fits_convolution(x: Tensor, weight_CK: Tensor) -> bool:
    channels, width = weight_CK.shape
    types = x.dtype in _TYPES and weight_CK.dtype in _TYPES
    return _on_gpu(x) and types and channels % 8 == 0 and 2 <= width <= 4


def _fits_recurrence(x: Tensor, state_BHPN: Tensor) -> bool:
    sizes = state_BHPN.shape[2:]
    return _on_gpu(x) and x.dtype in _TYPES and all(16 <= size <= 256 and size % 8 == 0 for size in sizes)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _documents(segment_BT: Tensor) -> Tensor:
    """Documents as the kernels want them: int32 and from 0 on, since they take negative ones for padding."""
    return (segment_BT - segment_BT[:, :1]).to(torch.int32).contiguous()


def _elsewhere(x: Tensor) -> Kernels:
    """The kernels for what these cannot do."""
    from crsm import kernels

    return reference if _on_gpu(x) else kernels.cpu_kernels()
