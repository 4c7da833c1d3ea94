"""The native kernels: against their definitions, against finite differences, and against themselves on more threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crsm import native as native_core
from crsm.config import BackboneConfig
from crsm.kernels import Kernels, native, reference
from crsm.mamba_ssm import Backbone

pytestmark = pytest.mark.skipif(not native_core.available(), reason=f"no native core: {native_core.MISSING}")

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest value, or of 1: inputs are of that size, and gradients may cancel."""
    assert got.shape == want.shape
    assert float((got.double() - want.double()).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def documents(generator: torch.Generator, batch: int, length: int) -> Tensor:
    return (torch.rand(batch, length, generator=generator) < 0.3).cumsum(dim=1)


def mixer_inputs(seed: int, batch: int, length: int, heads: int, width: int, state: int, taps: int) -> list[Tensor]:
    """In the order of ``mixer`` without its settings: weights, then state. float64"""
    generator = torch.Generator().manual_seed(seed)
    inner, channels = heads * width, heads * width + 2 * state
    return [
        normal(generator, batch, length, inner + channels + heads),
        normal(generator, channels, taps) * 0.5,
        normal(generator, channels),
        normal(generator, heads) - 2,
        -normal(generator, heads).exp(),
        normal(generator, heads),
        normal(generator, inner),
        normal(generator, batch, channels, taps - 1),
        normal(generator, batch, heads, width, state),
    ]


def run_mixer(kernels: Any, tensors: list[Tensor], chunk_size: int, segment_BT: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(kernels.mixer(*tensors[:7], 1e-5, *tensors[7:], chunk_size, segment_BT))


def with_gradients(function: Callable[..., Any], tensors: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Results, then the gradients of a random projection of all of them."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((result * normal(generator, *result.shape).to(result.dtype)).sum() for result in results)
    assert isinstance(loss, Tensor)
    return [*(result.detach() for result in results), *torch.autograd.grad(loss, inputs)]


def assert_same_as_reference(
    name: str, tensors: list[Tensor], dtype: torch.dtype, *settings: Any, slack: float = 1.0
) -> None:
    """The definition is computed in float64, whatever the kernel runs in."""
    got = with_gradients(lambda *t: getattr(native, name)(*t, *settings), [tensor.to(dtype) for tensor in tensors])
    want = with_gradients(lambda *t: getattr(reference, name)(*t, *settings), tensors)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype
        assert_close(mine, theirs, slack * TOLERANCE[dtype])


# Against the definitions ----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    *(seeds, dtypes, st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 19), st.integers(1, 19)),
    *(st.integers(2, 5), st.integers(1, 80), st.booleans()),
)
def test_the_mixer_and_its_gradients_are_those_of_the_definition(
    seed: int,
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    width: int,
    state: int,
    taps: int,
    chunk_size: int,
    packed: bool,
) -> None:
    tensors = mixer_inputs(seed, batch, length, heads, width, state, taps)
    segment_BT = documents(torch.Generator().manual_seed(seed), batch, length) if packed else None
    got = with_gradients(
        lambda *t: run_mixer(native, list(t), chunk_size, segment_BT), [tensor.to(dtype) for tensor in tensors]
    )
    want = with_gradients(lambda *t: run_mixer(reference, list(t), chunk_size, segment_BT), tensors)
    for mine, theirs in zip(got, want, strict=True):
        # The gradient of A may be a small difference of large sums.
        assert_close(mine, theirs, 20 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "state"), [(2, 50, 6, 32, 32), (1, 200, 5, 64, 128), (20, 3, 2, 16, 16)]
)
def test_the_shapes_of_real_models(
    dtype: torch.dtype, batch: int, length: int, heads: int, width: int, state: int
) -> None:
    """Several chunks, several groups of heads, and many sequences."""
    tensors = mixer_inputs(1, batch, length, heads, width, state, 4)
    got = with_gradients(lambda *t: run_mixer(native, list(t), 64, None), [tensor.to(dtype) for tensor in tensors])
    want = with_gradients(lambda *t: run_mixer(reference, list(t), 64, None), tensors)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, 2 * TOLERANCE[dtype])


@settings(max_examples=30)
@given(seeds, dtypes, st.integers(1, 2), st.integers(1, 70), st.integers(1, 20), st.booleans())
def test_the_scan_alone(seed: int, dtype: torch.dtype, batch: int, length: int, chunk_size: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, width, state = 3, 5, 7
    tensors = [
        normal(generator, batch, length, heads, width),
        normal(generator, batch, length, heads).exp() * 0.3,
        -normal(generator, heads).exp(),
        normal(generator, batch, length, state),
        normal(generator, batch, length, state),
        normal(generator, batch, heads, width, state),
    ]
    segment_BT = documents(generator, batch, length) if packed else None
    assert_same_as_reference("chunk_scan", tensors, dtype, chunk_size, segment_BT, slack=20)


@settings(max_examples=30)
@given(seeds, dtypes, st.integers(1, 3), st.integers(1, 12), st.integers(1, 70), st.integers(2, 6), st.booleans())
def test_the_convolution_alone(
    seed: int, dtype: torch.dtype, batch: int, length: int, channels: int, taps: int, packed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        normal(generator, batch, length, channels),
        normal(generator, channels, taps),
        normal(generator, channels),
        normal(generator, batch, channels, taps - 1),
    ]
    segment_BT = documents(generator, batch, length) if packed else None
    assert_same_as_reference("causal_conv", tensors, dtype, segment_BT)


@settings(max_examples=30)
@given(seeds, dtypes, st.integers(1, 3), st.integers(1, 40), st.integers(1, 70))
def test_the_norms(seed: int, dtype: torch.dtype, batch: int, length: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y, z = normal(generator, batch, length, width) * 3, normal(generator, batch, length, width)
    weight = normal(generator, width)
    assert_same_as_reference("gated_rms_norm", [y, z, weight], dtype, 1e-5, slack=2)
    assert_same_as_reference("rms_norm", [y, weight], dtype, 1e-5, slack=2)
    assert_same_as_reference("rms_norm", [y.flatten(0, 1), weight], dtype, 1e-5, slack=2)


@settings(max_examples=30)
@given(seeds, dtypes, st.integers(1, 70), st.integers(1, 40), st.integers(1, 70))
def test_the_dense_layer(seed: int, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [normal(generator, 2, rows, inputs), normal(generator, outputs, inputs)]
    assert_same_as_reference("linear", tensors, dtype)


def test_strided_inputs_are_read_in_place_and_unordered_ones_too() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = normal(generator, 2, 9, 40).float()
    weight = normal(generator, 20).float()
    y, z = wide[..., :20], wide[..., 20:]
    assert_close(
        native.gated_rms_norm(y, z, weight, 1e-5),
        reference.gated_rms_norm(y, z, weight, 1e-5),
        TOLERANCE[torch.float32],
    )
    turned = normal(generator, 20, 9, 2).float().transpose(0, 2)
    assert_close(native.rms_norm(turned, weight, 1e-5), reference.rms_norm(turned, weight, 1e-5), 1e-5)
    x, matrix = normal(generator, 30, 40).float().T, normal(generator, 7, 30).float()
    assert_close(native.linear(x, matrix), x @ matrix.T, TOLERANCE[torch.float32])


# Finite differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "chunk_size", "packed"), [(5, 2, False), (5, 2, True), (1, 64, False), (3, 64, True), (4, 1, False)]
)
def test_gradients_of_the_mixer_are_those_of_finite_differences(length: int, chunk_size: int, packed: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in mixer_inputs(2, 2, length, 2, 3, 2, 3)]
    segment_BT = documents(torch.Generator().manual_seed(4), 2, length) if packed else None
    assert torch.autograd.gradcheck(lambda *t: run_mixer(native, list(t), chunk_size, segment_BT), tensors)


def test_gradients_of_scan_convolution_and_norm_are_those_of_finite_differences() -> None:
    z, weight, bias, _, A, _, norm, window, state = mixer_inputs(3, 1, 5, 2, 3, 2, 4)
    x, dt, B, C = z[..., :6].unflatten(2, (2, 3)), z[..., :2].exp(), z[..., 6:8], z[..., 8:10]
    for function, tensors in (
        (lambda *t: native.chunk_scan(*t, 2), [x, dt, A, B, C, state]),
        (native.causal_conv, [z[..., : bias.shape[0]], weight, bias, window]),
        (lambda *t: native.gated_rms_norm(*t, 1e-5), [z[..., :6], z[..., 6:12], norm]),
    ):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        assert torch.autograd.gradcheck(function, leaves)


def test_gradients_are_only_computed_once() -> None:
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    (dx,) = torch.autograd.grad(native.rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


# Invariants -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("batch", "length"), [(1, 150), (9, 20)])
def test_results_are_bit_identical_on_one_thread_and_on_several(
    threads: Callable[[int], None], batch: int, length: int
) -> None:
    tensors = [tensor.float() for tensor in mixer_inputs(5, batch, length, 5, 24, 40, 4)]
    weight = torch.randn(150, tensors[0].shape[-1], generator=torch.Generator().manual_seed(0))

    def compute(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (*run_mixer(native, list(inputs[:-1]), 64, None), native.linear(inputs[0], inputs[-1]))

    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(with_gradients(compute, [*tensors, weight]))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@settings(max_examples=20)
@given(seeds, st.integers(2, 150), st.data())
def test_an_input_changes_nothing_before_it_and_nothing_beside_it(seed: int, length: int, data: st.DataObject) -> None:
    tensors = [tensor.float() for tensor in mixer_inputs(seed, 2, length, 2, 8, 5, 4)]
    changed_at = data.draw(st.integers(0, length - 1))
    other = tensors[0].clone()
    other[0, changed_at] += 1.0
    one, two = run_mixer(native, tensors, 64, None), run_mixer(native, [other, *tensors[1:]], 64, None)
    assert torch.equal(one[0][0, :changed_at], two[0][0, :changed_at])
    assert not torch.equal(one[0][0, changed_at:], two[0][0, changed_at:])
    for mine, theirs in zip(one, two, strict=True):
        assert torch.equal(mine[1], theirs[1])


def test_inputs_are_left_as_they_were() -> None:
    tensors = [tensor.float() for tensor in mixer_inputs(0, 2, 70, 2, 8, 5, 4)]
    copies = [tensor.clone() for tensor in tensors]
    with_gradients(lambda *t: run_mixer(native, list(t), 64, None), tensors)
    assert all(torch.equal(one, two) for one, two in zip(tensors, copies, strict=True))


def test_strong_decay_leaves_an_exact_zero_and_no_overflow() -> None:
    """A step that forgets everything: exp(-4000) is 0, and its inverse is never formed."""
    tensors = [tensor.float() for tensor in mixer_inputs(0, 1, 130, 2, 4, 4, 4)]
    tensors[4] = torch.full((2,), -4000.0)
    results = with_gradients(lambda *t: run_mixer(native, list(t), 64, None), tensors)
    want = with_gradients(lambda *t: run_mixer(reference, list(t), 64, None), tensors)
    for mine, theirs in zip(results, want, strict=True):
        assert mine.isfinite().all()
        assert_close(mine, theirs, 1e-4)


def test_types_that_the_core_does_not_take_go_to_the_definition() -> None:
    tensors = [tensor.to(torch.bfloat16) for tensor in mixer_inputs(0, 1, 9, 2, 4, 4, 4)]
    tensors[4], tensors[8] = tensors[4].float(), tensors[8].float()
    for mine, theirs in zip(run_mixer(native, tensors, 64, None), run_mixer(reference, tensors, 64, None), strict=True):
        assert torch.equal(mine, theirs)
    mixed = torch.randn(40, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError):  # PyTorch's own complaint
        native.linear(mixed, torch.randn(4, 8))
    meta = torch.empty(40, 8, device="meta")
    assert native.linear(meta, torch.empty(4, 8, device="meta")).shape == (40, 4)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_results_of_the_definition(isa: str) -> None:
    """In a process of its own: the choice is made once."""
    code = (
        "import torch\n"
        "from tests.kernels.test_native import *\n"
        "for dtype in (torch.float32, torch.float64):\n"
        "    for length, packed in ((70, False), (37, True)):\n"
        "        tensors = mixer_inputs(0, 2, length, 3, 9, 21, 4)\n"
        "        segment = documents(torch.Generator().manual_seed(0), 2, length) if packed else None\n"
        "        want = with_gradients(lambda *t: run_mixer(reference, list(t), 64, segment), tensors)\n"
        "        tensors = [tensor.to(dtype) for tensor in tensors]\n"
        "        got = with_gradients(lambda *t: run_mixer(native, list(t), 64, segment), tensors)\n"
        "        for mine, theirs in zip(got, want):\n"
        "            assert_close(mine, theirs, 3 * TOLERANCE[dtype])\n"
        "print(native_core.core.isa())\n"
    )
    environment = {**os.environ, "CRSM_NATIVE_ISA": isa, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}; {result.stdout.strip()} passed instead")


def test_a_short_training_ends_where_it_ends_on_the_definition() -> None:
    """60 steps of AdamW on one batch: the losses agree to a thousandth, at the end of a curve that falls."""
    sizes = BackboneConfig(vocab_size=20, d_model=16, n_layer=2, d_state=8, headdim=8)
    tokens = torch.randint(20, (4, 15), generator=torch.Generator().manual_seed(0))

    def train(kernels: Kernels) -> list[float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = Backbone(sizes, kernels)
        optimizer = torch.optim.AdamW(backbone.parameters(), lr=5e-3)
        losses = []
        for _ in range(60):
            hidden_BTLD, _ = backbone(tokens[:, :-1])
            logits_BTV = kernels.linear(backbone.norm_f(hidden_BTLD[:, :, -1], kernels), backbone.embedding.weight)
            loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    want, got = train(reference), train(native)
    assert want[-1] < 0.75 * want[0]
    assert abs(got[-1] - want[-1]) < 1e-3 * want[-1]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_wrong_arrays_are_refused_by_name() -> None:
    core = native_core.require()
    x, weight, bias, window = torch.zeros(2, 5, 6), torch.zeros(6, 4), torch.zeros(6), torch.zeros(2, 6, 3)
    y, last = torch.zeros(2, 5, 6), torch.zeros(2, 6, 3)
    core.conv_forward(x, weight, bias, window, None, True, y, last)
    for wrong, message in (
        ((x[0], weight, bias, window, None, True, y, last), r"x has shape \(5, 6\); allowed: \(any, any, any\)"),
        ((x.int(), weight, bias, window, None, True, y, last), "x: wrong dtype; allowed: float32, float64"),
        ((x, weight.double(), bias, window, None, True, y, last), "weight: wrong dtype; allowed: float32"),
        ((x.transpose(1, 2), torch.zeros(5, 4), bias, window, None, True, y, last), "x: last axis has stride"),
        ((x, weight, bias[:5], window, None, True, y, last), r"bias has shape \(5\); allowed: \(6\)"),
        ((x, weight, bias, window[:1], None, True, y, last), r"state has shape \(1, 6, 3\); allowed: \(2, 6, 3\)"),
        ((x, weight, bias, window, torch.zeros(2, 5), True, y, last), "segment: wrong dtype; allowed: int64"),
        ((x, weight, bias, window, None, True, y[:, :4], last), r"y has shape \(2, 4, 6\); allowed: \(2, 5, 6\)"),
        ((x[:, :0], weight, bias, window, None, True, y, last), "none of them 0"),
    ):
        with pytest.raises(ValueError, match=message):
            core.conv_forward(*wrong)
    with pytest.raises(ValueError, match="y: wrong shape"):
        core.norm_forward(x[0], None, bias, 1e-5, y[0])
    with pytest.raises(ValueError, match=r"dz; allowed: given where z is"):
        core.norm_backward(x, None, bias, 1e-5, x, y, y, bias)


def test_wrong_arrays_of_the_scan_are_refused_by_name() -> None:
    core = native_core.require()
    heads, state = 2, 4
    x, dt, A = torch.zeros(1, 5, 6), torch.zeros(1, 5, heads), torch.zeros(heads)
    B, h, y = torch.zeros(1, 5, state), torch.zeros(1, heads, 3, state), torch.zeros(1, 5, 6)

    def run(
        x: Tensor = x, dt: Tensor = dt, B: Tensor = B, h: Tensor = h, chunk_size: int = 2, kept: Any = None
    ) -> None:
        core.scan_forward(x, dt, A, B, B, None, None, h, None, chunk_size, y, torch.zeros_like(h), kept)

    run()
    for changes, message in (
        ({"x": torch.zeros(1, 5, 7)}, r"x has shape \(1, 5, 7\); allowed: \(B, T, H·P\) of 2 heads"),
        ({"dt": dt[:, :4]}, r"dt has shape \(1, 4, 2\); allowed: \(1, 5, 2\)"),
        ({"B": B[..., :0]}, "d_state 0"),
        ({"h": h[..., :3].contiguous()}, r"state has shape \(1, 2, 3, 3\); allowed: \(1, 2, 3, 4\)"),
        ({"chunk_size": 0}, "chunk_size = 0; allowed: at least 1"),
        ({"kept": torch.zeros(1, 2, 2, 4, 3)}, r"kept has shape \(1, 2, 2, 4, 3\); allowed: \(1, 2, 3, 4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kept = None"):
        out = (torch.zeros_like(t) for t in (x, dt, A, B, B))
        core.scan_backward(x, dt, A, B, B, None, None, h, None, 2, None, y, None, *out, None, None, None)
    with pytest.raises(ValueError, match="length = 0"):
        core.scan_chunks(0, 64)
