"""The kernels for a GPU: what they hand to the libraries (with fakes of them, here), and what they compute (there)."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.config import BackboneConfig
from crsm.kernels import cuda, reference, restore_kernels, select_kernels
from crsm.mamba_ssm import Backbone

B, T, H, P, N, K = 2, 21, 3, 16, 24, 4
C = H * P + 2 * N


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def conv_inputs(length: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # As the backbone passes it: a slice of the projection, whose rows are longer than C.
    x_BTC = normal(B, length, C + 40)[..., 8 : C + 8]
    return x_BTC, normal(C, K), normal(C), normal(B, C, K - 1)


def scan_inputs(length: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        normal(B, length, H, P),
        normal(B, length, H).exp() * 0.1,
        -normal(H).exp(),
        normal(B, length, N),
        normal(B, length, N, seed=1),
        normal(B, H, P, N),
    )


def mixer_inputs(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    zxBCdt_BTI = normal(B, T, 2 * H * P + 2 * N + H + 5)[..., :-5].to(dtype)
    weights = (normal(C, K), normal(C), normal(H), -normal(H, seed=1).exp(), normal(H, seed=2), normal(H * P))
    return (zxBCdt_BTI, *weights, 1e-5, normal(B, C, K - 1).to(dtype), normal(B, H, P, N))


SEGMENTS = {
    "one document": torch.tensor([[5] * T, [0] * T]),
    "changes": torch.tensor([[7] * 2 + [8] * 12 + [9] * 7, [3] * 20 + [4]]),
    "a change after one token": torch.tensor([[0] + [1] * 20, [0] * 19 + [1, 2]]),
}


def cases() -> list[Any]:
    return [pytest.param(None, id="no documents"), *(pytest.param(s, id=name) for name, s in SEGMENTS.items())]


# With fakes ----------------------------------------------------------------------------------------------------------


class Fakes:
    """The libraries' functions, by the reference, with what their kernels demand of layout and types as assertions."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def causal_conv1d_fn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        activation: str | None = None,
    ) -> Tensor:
        self.calls.append("conv")
        batch, channels, length = x.shape
        width = weight.shape[1]
        assert x.stride(1) == 1 and x.stride(2) > 1 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
        assert channels % 8 == 0 and bias is not None and bias.dtype == weight.dtype
        assert not return_final_states and activation is None
        assert seq_idx is None or initial_states is None
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (batch, length)
            assert bool((seq_idx >= 0).all())
        state = torch.zeros(batch, channels, width - 1)
        if initial_states is not None:
            assert initial_states.shape == state.shape and initial_states.stride(1) == 1
            assert initial_states.dtype == x.dtype
            state = initial_states
        y, _ = reference.causal_conv(x.transpose(1, 2).float(), weight, bias, state, seq_idx)
        return y.transpose(1, 2).to(x.dtype)

    def causal_conv1d_update(
        self, x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        self.calls.append("conv step")
        assert x.shape == conv_state.shape[:2] and conv_state.dtype == x.dtype and bias is not None
        assert activation is None
        y, window = reference.causal_conv_step(x, weight, bias, conv_state)
        conv_state.copy_(window)
        return y

    def mamba_chunk_scan_combined(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_softplus: bool = False,
        return_final_states: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append(f"scan {chunk_size}")
        batch, length, heads, width = x.shape
        assert dt.shape == (batch, length, heads) and A.shape == (heads,)
        assert B.shape == C.shape == (batch, length, 1, B.shape[3])
        assert x.dtype == B.dtype == C.dtype and return_final_states
        assert seq_idx is None or initial_states is None
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, length)
        state = torch.zeros(batch, heads, width, B.shape[3])
        if initial_states is not None:
            assert initial_states.shape == state.shape and initial_states.is_contiguous()
            state = initial_states
        dt = dt.float() if dt_bias is None else dt.float() + dt_bias
        dt = F.softplus(dt) if dt_softplus else dt
        y, state = reference.chunk_scan(x.float(), dt, A, B[:, :, 0].float(), C[:, :, 0].float(), state, 8, seq_idx)
        return (y if D is None else y + D[:, None] * x).to(x.dtype), state

    def rmsnorm_fn(
        self, x: Tensor, weight: Tensor, bias: None, z: Tensor, eps: float, norm_before_gate: bool = True
    ) -> Tensor:
        self.calls.append("norm")
        assert bias is None and not norm_before_gate and x.shape == z.shape
        return reference.gated_rms_norm(x, z, weight, eps)

    def selective_state_update(
        self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
    ) -> Tensor:
        self.calls.append("step")
        batch, heads, width, states = state.shape
        assert x.shape == dt.shape == (batch, heads, width) and A.shape == (heads, width, states)
        assert B.shape == C.shape == (batch, 1, states) and D.shape == dt_bias.shape == (heads, width)
        # What makes the kernel's shortcut for one decay a head.
        assert A.stride()[1:] == (0, 0) and dt.stride(2) == 0 and dt_bias.stride(1) == 0
        assert not D.any() and not dt_bias.any()
        y, new, _ = reference.state_step(x, dt[..., 0], A[:, 0, 0], B[:, 0], C[:, 0], state)
        state.copy_(new)
        return y


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    """The two packages, importable, and every tensor taken for one on a GPU."""
    made = Fakes()
    contents: dict[str, dict[str, Any]] = {
        "causal_conv1d": {
            "causal_conv1d_fn": made.causal_conv1d_fn,
            "causal_conv1d_update": made.causal_conv1d_update,
        },
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": made.mamba_chunk_scan_combined},
        "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": made.rmsnorm_fn},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": made.selective_state_update},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, functions in contents.items():
        for key, function in functions.items():
            setattr(modules[name], key, function)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
        monkeypatch.setitem(sys.modules, name, modules[name])
    monkeypatch.setattr(cuda, "_on_gpu", lambda x: True)
    cuda.missing.cache_clear()
    yield made
    cuda.missing.cache_clear()


@pytest.mark.parametrize("segment_BT", cases())
def test_the_convolution_is_the_references(fakes: Fakes, segment_BT: Tensor | None) -> None:
    got = cuda.causal_conv(*conv_inputs(), segment_BT)
    want = reference.causal_conv(*conv_inputs(), segment_BT)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], want[1], atol=0, rtol=0)
    assert fakes.calls == ["conv"]


@pytest.mark.parametrize("segment_BT", cases())
def test_the_scan_is_the_references(fakes: Fakes, segment_BT: Tensor | None) -> None:
    got = cuda.chunk_scan(*scan_inputs(), 64, segment_BT)
    want = reference.chunk_scan(*scan_inputs(), 64, segment_BT)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert fakes.calls == ["scan 64"]


@pytest.mark.parametrize("segment_BT", cases())
def test_gradients_reach_every_input_through_either_path(fakes: Fakes, segment_BT: Tensor | None) -> None:
    def gradients(kernels: Any) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (*scan_inputs(), *conv_inputs())]
        y, h = kernels.chunk_scan(*inputs[:6], 64, segment_BT)
        z, window = kernels.causal_conv(*inputs[6:], segment_BT)
        return list(torch.autograd.grad(y.square().sum() + h.sum() + z.square().sum() + window.sum(), inputs))

    for mine, theirs in zip(gradients(cuda), gradients(reference), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segment_BT", cases())
def test_the_mixer_is_the_references(fakes: Fakes, segment_BT: Tensor | None, dtype: torch.dtype) -> None:
    got = cuda.mixer(*mixer_inputs(dtype), 64, segment_BT)
    want = reference.mixer(*mixer_inputs(), 64, segment_BT)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.float(), theirs, atol=tolerance, rtol=tolerance)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32]
    assert fakes.calls == ["conv", "scan 64", "norm"]


def test_one_step_is_the_references_and_leaves_the_state_as_it_was(fakes: Fakes) -> None:
    x, dt, A, Bs, Cs, state = scan_inputs()
    arguments = (x[:, 0], dt[:, 0], A, Bs[:, 0], Cs[:, 0])
    before = state.clone()
    for mine, theirs in zip(cuda.state_step(*arguments, state), reference.state_step(*arguments, state), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(state, before)
    x_BTC, weight, bias, window = conv_inputs()
    before = window.clone()
    got = cuda.causal_conv_step(x_BTC[:, 0], weight, bias, window)
    for mine, theirs in zip(got, reference.causal_conv_step(x_BTC[:, 0], weight, bias, window), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(window, before)
    assert fakes.calls == ["step", "conv step"]


def test_lengths_of_chunks_that_are_not_tuned_for_become_the_longest(fakes: Fakes) -> None:
    for asked in (64, 128, 256, 5, 100, 512):
        cuda.chunk_scan(*scan_inputs(), asked)
    assert fakes.calls == ["scan 64", "scan 128", "scan 256", "scan 256", "scan 256", "scan 256"]


def test_what_the_libraries_cannot_do_is_done_by_the_reference(fakes: Fakes) -> None:
    few_channels = (normal(B, T, 6), normal(6, K), normal(6), normal(B, 6, K - 1))
    wide = (normal(B, T, 8), normal(8, 5), normal(8), normal(B, 8, 4))
    short = conv_inputs(K - 1)
    double = tuple(tensor.double() for tensor in conv_inputs())
    for arguments in (few_channels, wide, short, double):
        for mine, theirs in zip(cuda.causal_conv(*arguments), reference.causal_conv(*arguments), strict=True):
            assert torch.equal(mine, theirs)
    x, dt, A, Bs, Cs, state = scan_inputs()
    narrow = (x[..., :8], dt, A, Bs, Cs, state[:, :, :8])
    for mine, theirs in zip(cuda.chunk_scan(*narrow, 64), reference.chunk_scan(*narrow, 64), strict=True):
        assert torch.equal(mine, theirs)
    learning = (x[:, 0].requires_grad_(), dt[:, 0], A, Bs[:, 0], Cs[:, 0], state)
    assert cuda.state_step(*learning)[0].requires_grad
    assert fakes.calls == []


def test_tensors_on_the_cpu_go_to_the_kernels_for_it() -> None:
    for mine, theirs in zip(cuda.chunk_scan(*scan_inputs(), 64), reference.chunk_scan(*scan_inputs(), 64), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_they_are_selected_where_they_can_run_and_nowhere_else(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in cuda.missing()
    assert select_kernels() is not cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda.missing.cache_clear()
    assert cuda.available()
    assert select_kernels() is cuda
    assert restore_kernels("cuda") is cuda
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    cuda.missing.cache_clear()
    assert "causal-conv1d" in cuda.missing()
    assert select_kernels() is not cuda
    assert restore_kernels("cuda") is select_kernels()
    with pytest.raises(ValueError, match=r"kernels = 'cuda': mamba-ssm and causal-conv1d .* cannot be imported"):
        select_kernels("cuda")


def test_a_backbone_runs_on_them(fakes: Fakes) -> None:
    """d_model 64: P = N = 32 and a projection whose rows are a multiple of 8."""
    config = BackboneConfig(vocab_size=20, d_model=64, n_layer=2, d_state=32, headdim=32)
    torch.manual_seed(0)
    backbone = Backbone(config, cuda).requires_grad_(False)
    plain = Backbone(config, reference).requires_grad_(False)
    plain.load_state_dict(backbone.state_dict())
    tokens_BT = torch.arange(26).reshape(2, 13) % 20
    hidden, state = backbone(tokens_BT)
    want, want_state = plain(tokens_BT)
    torch.testing.assert_close(hidden, want, atol=1e-4, rtol=1e-4)
    step, want_step = backbone.step(tokens_BT[:, 0], state), plain.step(tokens_BT[:, 0], want_state)
    torch.testing.assert_close(step.hidden_BLD, want_step.hidden_BLD, atol=1e-4, rtol=1e-4)
    assert fakes.calls == ["conv", "scan 64", "norm"] * 2 + ["conv step", "step"] * 2


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> None:
    cuda.missing.cache_clear()
    if cuda.missing():
        pytest.skip(cuda.missing())


def on_gpu(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.cuda() for tensor in tensors)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within a share of the largest value: the scan multiplies in TF32."""
    assert got.shape == want.shape
    assert float((got.cpu().double() - want.double()).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("segment_BT", cases())
def test_on_a_gpu_convolution_and_scan_are_the_references(real: None, segment_BT: Tensor | None) -> None:
    segment = None if segment_BT is None else segment_BT.cuda()
    got = cuda.causal_conv(*on_gpu(conv_inputs()), segment)
    for mine, theirs in zip(got, reference.causal_conv(*conv_inputs(), segment_BT), strict=True):
        close(mine, theirs, 1e-5)
    found = cuda.chunk_scan(*on_gpu(scan_inputs()), 64, segment)
    for mine, theirs in zip(found, reference.chunk_scan(*scan_inputs(), 64, segment_BT), strict=True):
        close(mine, theirs, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segment_BT", cases())
def test_on_a_gpu_the_mixer_is_the_references(real: None, segment_BT: Tensor | None, dtype: torch.dtype) -> None:
    arguments = [x.cuda() if isinstance(x, Tensor) else x for x in mixer_inputs(dtype)]
    got = cuda.mixer(*arguments, 64, None if segment_BT is None else segment_BT.cuda())
    for mine, theirs in zip(got, reference.mixer(*mixer_inputs(), 64, segment_BT), strict=True):
        close(mine.float(), theirs, 5e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3, 4, 64, 65, 300])
def test_on_a_gpu_every_length_works(real: None, length: int) -> None:
    got = cuda.causal_conv(*on_gpu(conv_inputs(length)))
    for mine, theirs in zip(got, reference.causal_conv(*conv_inputs(length)), strict=True):
        close(mine, theirs, 1e-5)
    found = cuda.chunk_scan(*on_gpu(scan_inputs(length)), 64)
    for mine, theirs in zip(found, reference.chunk_scan(*scan_inputs(length), 64), strict=True):
        close(mine, theirs, 5e-3)


@pytest.mark.gpu
def test_on_a_gpu_one_step_is_the_references(real: None) -> None:
    x, dt, A, Bs, Cs, state = scan_inputs()
    arguments = (x[:, 0], dt[:, 0], A, Bs[:, 0], Cs[:, 0], state)
    for mine, theirs in zip(cuda.state_step(*on_gpu(arguments)), reference.state_step(*arguments), strict=True):
        close(mine, theirs, 1e-5)
    x_BTC, weight, bias, window = conv_inputs()
    step = (x_BTC[:, 0], weight, bias, window)
    for mine, theirs in zip(cuda.causal_conv_step(*on_gpu(step)), reference.causal_conv_step(*step), strict=True):
        close(mine, theirs, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("segment_BT", cases())
def test_on_a_gpu_gradients_are_the_references(real: None, segment_BT: Tensor | None) -> None:
    def gradients(kernels: Any, device: str) -> list[Tensor]:
        inputs = [t.to(device).clone().requires_grad_() for t in (*scan_inputs(), *conv_inputs())]
        segment = None if segment_BT is None else segment_BT.to(device)
        y, h = kernels.chunk_scan(*inputs[:6], 64, segment)
        z, window = kernels.causal_conv(*inputs[6:], segment)
        return list(torch.autograd.grad(y.square().sum() + h.sum() + z.square().sum() + window.sum(), inputs))

    for mine, theirs in zip(gradients(cuda, "cuda"), gradients(reference, "cpu"), strict=True):
        close(mine, theirs, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_step_equals_forward(real: None, dtype: torch.dtype) -> None:
    config = BackboneConfig(vocab_size=20, d_model=64, n_layer=2, d_state=32, headdim=32)
    torch.manual_seed(0)
    backbone = Backbone(config, cuda).to("cuda", dtype).requires_grad_(False)
    tokens_BT = (torch.arange(26).reshape(2, 13) % 20).cuda()
    whole, _ = backbone(tokens_BT)
    state, stepped = backbone.initial_state(2), []
    for token_B in tokens_BT.unbind(1):
        out = backbone.step(token_B, state)
        state = out.state
        stepped.append(out.hidden_BLD)
    close(torch.stack(stepped, dim=1).float(), whole.float().cpu(), 5e-3 if dtype == torch.float32 else 5e-2)
