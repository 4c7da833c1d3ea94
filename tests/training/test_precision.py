"""bf16: bfloat16 products between fp32 weights; the recurrence, norms and losses stay fp32."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crsm.kernels import KERNELS, native, reference, select_kernels
from crsm.training.loop import LoopState, run_stage
from crsm.training.precision import autocast

CPU = torch.device("cpu")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "convolution")
FP32_ONLY = (
    "_log_softmax",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cumsum",
    "exp",
    "pow",
    "rsqrt",
)
"""Losses, decays and norms are made of these."""


class Types(TorchDispatchMode):
    """The types of floating-point tensors that operators get."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_") if hasattr(function, "overloadpacket") else str(function)
        floats = {a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
        self.seen.setdefault(name, set()).update(floats)
        return function(*args, **(kwargs or {}))


def forward_backward(stage, precision):
    with Types() as types:
        with autocast(precision, CPU):
            loss, _ = stage(stage.batch(0, 0, 0, 1))
        loss.backward()
    return loss, types.seen


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("name", ["stage_1", "stage_2", "stage_3", "stage_4"])
def test_products_are_bfloat16_and_weights_gradients_norms_and_losses_are_fp32(make_stage, monkeypatch, name, kernels):
    monkeypatch.setenv("CRSM_KERNELS", kernels)
    stage = make_stage(name)
    loss, seen = forward_backward(stage, "bf16")
    assert loss.dtype == torch.float32
    assert any(torch.bfloat16 in seen.get(product, ()) for product in PRODUCTS), seen
    for operator in FP32_ONLY:
        assert seen.get(operator, set()) <= {torch.float32, torch.float64}, operator
    for parameter in stage.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_the_scan_its_state_and_its_parameters_are_fp32(make_stage, monkeypatch, kernels):
    monkeypatch.setenv("CRSM_KERNELS", kernels)
    module, scans = KERNELS[kernels], []
    scan = module.chunk_scan

    def watched(*tensors):
        y, state = scan(*tensors)
        assert not torch.is_autocast_enabled("cpu")
        scans.append({t.dtype for t in (*tensors[:6], y, state)})
        return y, state

    # `mixer` finds the scan by its name, wherever it lies.
    monkeypatch.setattr(module, "chunk_scan", watched)
    if kernels == "native":
        monkeypatch.setattr(reference, "chunk_scan", lambda *_: pytest.fail("not in C++"))
    stage = make_stage("stage_1")
    with autocast("bf16", CPU):
        hidden, state = stage.model.backbone(torch.randint(0, 12, (2, 9)))
        out = stage.model.backbone.step(torch.tensor([3, 4]), state)
    assert scans == [{torch.float32}] * 2
    assert hidden.dtype == out.hidden_BLD.dtype == torch.float32
    for layer in (*state.layers, *out.state.layers):
        assert layer.ssm_BHPN.dtype == torch.float32


def test_native_and_reference_kernels_agree_under_autocast(make_stage):
    if not native.available():
        pytest.skip("no native core")
    stage = make_stage("stage_1")
    tokens = torch.randint(0, 12, (2, 40))
    found = {}
    for name in ("reference", "native"):
        model = copy.deepcopy(stage.model)
        for module in model.modules():
            if hasattr(module, "kernels") and "kernels" in module.__dict__:
                module.kernels = select_kernels(name)
        with autocast("bf16", CPU):
            found[name] = model.logits(model.backbone(tokens)[0])
    assert torch.allclose(found["reference"], found["native"], atol=2e-2)


@pytest.mark.parametrize("name", ["stage_1", "stage_2", "stage_3", "stage_4"])
def test_the_curve_of_bf16_stays_beside_that_of_fp32(make_stage, name):
    """Relative to the loss: bfloat16 has 8 bits of mantissa, one rounding is 0.4 %."""
    curves, states = {}, []
    for precision in ("fp32", "bf16"):
        stage = make_stage(name, f"{name}.steps={30 if name == 'stage_1' else 10}", f"{name}.optimizer.warmup=5")
        stage.precision = precision
        result = run_stage(stage, on_checkpoint=states.append)
        curves[precision] = [point["loss"] for point in result.curve if "loss" in point]
    assert curves["fp32"] != curves["bf16"]
    for exact, rounded in zip(curves["fp32"], curves["bf16"], strict=True):
        assert rounded == pytest.approx(exact, rel=0.02)
    assert {tensor.dtype for tensor in states[-1].tensors.values() if tensor.is_floating_point()} == {torch.float32}


def test_a_run_in_bf16_goes_on_from_its_state_with_the_same_bits(make_stage, tmp_path):
    def make():
        stage = make_stage("stage_1", "stage_1.steps=6", "stage_1.checkpoint_every=3")
        stage.precision = "bf16"
        return stage

    whole = make()
    run_stage(whole, on_checkpoint=lambda state: state.save(tmp_path / str(state.step)))
    resumed = make()
    run_stage(resumed, resume=LoopState.load(tmp_path / "3", "stage_1"))
    for (name, left), right in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right), name
