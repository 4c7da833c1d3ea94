"""The native decoder is ``Backbone.step``, whatever the batch, the threads and the instruction set."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from crsm import native
from crsm.config import BackboneConfig, Config, ModelConfig
from crsm.mamba_ssm import Layer
from crsm.model import CRSM
from crsm.types import LayerState, ModelState, StepOutput

if not native.available():
    pytest.skip(f"no native core: {native.MISSING}", allow_module_level=True)

from crsm.native.decoder import NativeDecoder, Weights

SMALL: dict[str, Any] = {"d_model": 64, "n_layer": 3, "d_state": 16, "headdim": 16, "vocab_size": 50}
SHAPES: list[dict[str, Any]] = [
    SMALL,
    {"d_model": 128, "n_layer": 4, "d_state": 32, "headdim": 32, "vocab_size": 512},
    {"d_model": 96, "n_layer": 2, "d_state": 128, "headdim": 64, "vocab_size": 97, "tie_embeddings": False},
    {"d_model": 20, "n_layer": 2, "d_state": 20, "headdim": 5, "vocab_size": 33, "d_conv": 3},
    {"d_model": 33, "n_layer": 1, "d_state": 7, "headdim": 11, "vocab_size": 1, "expand": 1, "d_conv": 2},
    {"d_model": 36, "n_layer": 1, "d_state": 64, "headdim": 36, "vocab_size": 64, "expand": 3, "d_conv": 5},
]
LARGE: dict[str, Any] = {"d_model": 512, "n_layer": 2, "d_state": 128, "headdim": 64, "vocab_size": 20000}
"""Large enough for two threads and for stores past the caches."""


def random_model(seed: int = 0, **sizes: Any) -> CRSM:
    """Weights with opinions: norms, D and biases that are not their initial values, large embeddings."""
    torch.manual_seed(seed)
    model = CRSM(Config(model=ModelConfig(backbone=BackboneConfig(**sizes)))).eval().requires_grad_(False)
    model.backbone.embedding.weight.normal_()
    model.fusion.logits_L.normal_()
    for name, parameter in model.backbone.named_parameters():
        if "norm" in name or name.endswith(("D", "conv1d.bias")):
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_tokens(model: CRSM, *shape: int) -> Tensor:
    return torch.randint(0, model.config.model.backbone.vocab_size, shape)


def random_state(model: CRSM, batch: int) -> ModelState:
    """After a few tokens."""
    return model.backbone(random_tokens(model, batch, 5))[1]


def largest_difference(one: StepOutput, other: StepOutput) -> float:
    pairs = [(one.hidden_BLD, other.hidden_BLD), *zip(one.decay_LBH, other.decay_LBH, strict=True)]
    for mine, theirs in zip(one.state.layers, other.state.layers, strict=True):
        pairs += [(mine.conv_BCK, theirs.conv_BCK), (mine.ssm_BHPN, theirs.ssm_BHPN)]
    return max(float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for a, b in pairs)


def assert_same(one: StepOutput, other: StepOutput) -> None:
    """Bit for bit."""
    assert torch.equal(one.hidden_BLD, other.hidden_BLD)
    assert torch.equal(torch.stack(one.decay_LBH), torch.stack(other.decay_LBH))
    for mine, theirs in zip(one.state.layers, other.state.layers, strict=True):
        assert torch.equal(mine.conv_BCK, theirs.conv_BCK) and torch.equal(mine.ssm_BHPN, theirs.ssm_BHPN)


def owned(state: ModelState) -> ModelState:
    """A copy in memory without gaps."""
    layers = (
        LayerState(*(tensor.clone(memory_format=torch.contiguous_format) for tensor in layer)) for layer in state.layers
    )
    return ModelState(tuple(layers))


# The same as the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SHAPES, ids=lambda sizes: f"d{sizes['d_model']}")
@pytest.mark.parametrize("batch", [1, 2, 3, 13, 64])
def test_a_step_equals_the_backbones(sizes: dict[str, Any], batch: int) -> None:
    model = random_model(**sizes)
    decoder, state = NativeDecoder(model), random_state(model, batch)
    for _ in range(3):
        token_B = random_tokens(model, batch)
        want = model.backbone.step(token_B, state)
        logits_BV, found = decoder.step_logits(token_B, state)
        assert largest_difference(found, want) < 1e-5
        want_BV = model.logits(want.hidden_BLD)
        assert float((logits_BV - want_BV).abs().max()) < 1e-5 * max(1.0, float(want_BV.abs().max()))
        assert torch.equal(decoder.logits(found.hidden_BLD), logits_BV)
        state = found.state


def test_a_large_step_on_two_threads_equals_the_backbones_and_that_of_one_thread() -> None:
    model = random_model(**LARGE)
    one, two = NativeDecoder(model, threads=1), NativeDecoder(model, threads=2)
    for batch in (1, 9):
        token_B, state = random_tokens(model, batch), random_state(model, batch)
        logits_BV, found = two.step_logits(token_B, state)
        assert largest_difference(found, model.backbone.step(token_B, state)) < 1e-5
        alone_BV, alone = one.step_logits(token_B, state)
        assert_same(found, alone)
        assert torch.equal(logits_BV, alone_BV)


def test_200_steps_do_not_drift_from_the_backbone() -> None:
    model = random_model(**SMALL)
    decoder, state = NativeDecoder(model), model.backbone.initial_state(3)
    plain = state
    for token_B in random_tokens(model, 200, 3):
        out, want = decoder.step(token_B, state, donate=True), model.backbone.step(token_B, plain)
        state, plain = out.state, want.state
    assert largest_difference(out, want) < 1e-4


def test_steps_equal_forward() -> None:
    model = random_model(**SMALL)
    decoder, tokens_BT, state = NativeDecoder(model), random_tokens(model, 2, 40), model.backbone.initial_state(2)
    hidden_BTLD, _ = model.backbone(tokens_BT)
    for position in range(40):
        out = decoder.step(tokens_BT[:, position], state)
        state = out.state
        torch.testing.assert_close(out.hidden_BLD, hidden_BTLD[:, position], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_equals_the_definition(isa: str) -> None:
    """The choice is made when the module is loaded; a processor that lacks one takes the next below it."""
    program = (
        "import tests.native.test_decoder as t\n"
        "for sizes in t.SHAPES:\n"
        "    for batch in (1, 2, 5, 14):\n"
        "        t.test_a_step_equals_the_backbones(sizes, batch)\n"
        "for weights in ('bf16', 'int8'):\n"
        "    t.test_rounded_weights_are_those_of_a_model_rounded_the_same_way(weights)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"CRSM_NATIVE_ISA": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *sys.path])
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=root)


# Rounded weights -----------------------------------------------------------------------------------------------------


def round_matrix(weight: Tensor, weights: str) -> Tensor:
    if weights == "bf16":
        return weight.bfloat16().float()
    pieces = []
    for piece in weight.split(64, dim=1):
        scale = piece.abs().amax(dim=1, keepdim=True) / 127
        pieces.append(torch.where(scale > 0, (piece / scale).round(), 0.0) * scale)
    return torch.cat(pieces, dim=1)


def rounded_model(model: CRSM, weights: str) -> CRSM:
    model = copy.deepcopy(model)
    for layer in cast(list[Layer], list(model.backbone.layers)):
        for linear in (layer.mixer.in_proj, layer.mixer.out_proj):
            linear.weight.copy_(round_matrix(linear.weight, weights))
    # The embedding is read unrounded, also where the head shares its matrix.
    model.lm_head.weight = nn.Parameter(round_matrix(model.lm_head.weight, weights), requires_grad=False)
    return model


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_are_those_of_a_model_rounded_the_same_way(weights: Weights) -> None:
    for sizes in SHAPES[:4]:
        model = random_model(**sizes)
        same, decoder = rounded_model(model, weights), NativeDecoder(model, weights)
        for batch in (1, 2, 5):
            token_B, state = random_tokens(model, batch), random_state(model, batch)
            want = same.backbone.step(token_B, state)
            logits_BV, found = decoder.step_logits(token_B, state)
            assert largest_difference(found, want) < 1e-5
            want_BV = same.logits(want.hidden_BLD)
            assert float((logits_BV - want_BV).abs().max()) < 1e-5 * max(1.0, float(want_BV.abs().max()))


def test_fewer_bits_take_fewer_bytes() -> None:
    """Matrices in 4, 2, and 1 + 4/64 bytes a weight; the embedding and the vectors in 4."""
    model = random_model(d_model=128, n_layer=2, d_state=32, headdim=32, vocab_size=512)
    sizes = model.config.model.backbone
    matrices = 2 * (128 * (2 * 256 + 64 + sizes.n_heads) + 256 * 128) + 128 * 512
    padded = matrices + 2 * 128 * (32 - (2 * 256 + 64 + sizes.n_heads) % 32)
    names: tuple[Weights, ...] = ("fp32", "bf16", "int8")
    fp32, bf16, int8 = (NativeDecoder(model, name).bytes_of_weights for name in names)
    assert fp32 - bf16 == 2 * padded
    assert fp32 - int8 == 3 * padded - padded // 16
    assert fp32 >= 4 * (matrices + 512 * 128)


# Values in, values out -----------------------------------------------------------------------------------------------


def test_a_state_is_not_changed_unless_it_is_given_up() -> None:
    model = random_model(**SMALL)
    decoder, state, token_B = NativeDecoder(model), owned(random_state(model, 3)), random_tokens(model, 3)
    before = owned(state)
    kept = decoder.step(token_B, state)
    assert_same(StepOutput(kept.hidden_BLD, state, kept.decay_LBH), StepOutput(kept.hidden_BLD, before, kept.decay_LBH))
    given_up = decoder.step(token_B, state, donate=True)
    assert_same(given_up, kept)
    for new, old in zip(given_up.state.layers, state.layers, strict=True):
        assert new.ssm_BHPN.data_ptr() == old.ssm_BHPN.data_ptr() and new.conv_BCK.data_ptr() == old.conv_BCK.data_ptr()


def test_results_stay_when_later_steps_are_made() -> None:
    """Memory that comes back to the pool is memory that nobody looks at any more."""
    model = random_model(**SMALL)
    decoder, state = NativeDecoder(model), random_state(model, 2)
    outputs, copies = [], []
    for token_B in random_tokens(model, 12, 2):
        outputs.append(decoder.step(token_B, state))
        state = outputs[-1].state
        copies.append(copy.deepcopy(outputs[-1]))
        assert type(copies[-1].state) is ModelState
        del outputs[:-5], copies[:-5]
        for one, other in zip(outputs, copies, strict=True):
            assert_same(one, other)
    del decoder
    assert_same(outputs[-1], copies[-1])


def test_a_state_with_gaps_or_shared_by_layers_is_read_and_never_written() -> None:
    model = random_model(**SMALL)
    decoder, token_B = NativeDecoder(model), random_tokens(model, 2)
    first = model.backbone.initial_state(2)  # one pair of tensors for all layers
    gaps = [
        LayerState(conv_BCK.transpose(1, 2).contiguous().transpose(1, 2), ssm_BHPN.repeat(1, 1, 1, 2)[..., ::2])
        for conv_BCK, ssm_BHPN in random_state(model, 2).layers
    ]
    prefilled = ModelState(tuple(gaps))
    assert not any(tensor.is_contiguous() for layer in prefilled.layers for tensor in layer)
    for state in (first, prefilled):
        before = owned(state)
        found = decoder.step(token_B, state, donate=True)
        assert largest_difference(found, model.backbone.step(token_B, before)) < 1e-5
        assert all(
            torch.equal(a, b)
            for x, y in zip(state.layers, before.layers, strict=True)
            for a, b in zip(x, y, strict=True)
        )


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_sequence_has_the_same_bits_in_any_batch(weights: Weights) -> None:
    model = random_model(**SMALL)
    decoder, state, token_B = NativeDecoder(model, weights), random_state(model, 64), random_tokens(model, 64)
    whole_BV, whole = decoder.step_logits(token_B, state)
    for rows in ([0], [63], [5, 60], [7, 3, 11], list(range(13)), list(range(64, 0, -3))[1:]):
        index = torch.tensor(rows)
        logits_BV, part = decoder.step_logits(token_B[index], state.rows(index))
        decays = tuple(decay_BH[index] for decay_BH in whole.decay_LBH)
        assert_same(part, StepOutput(whole.hidden_BLD[index], whole.state.rows(index), decays))
        assert torch.equal(logits_BV, whole_BV[index])


# The model changes ---------------------------------------------------------------------------------------------------


def test_changed_weights_are_noticed() -> None:
    model = random_model(**SMALL)
    decoder, state, token_B = NativeDecoder(model), random_state(model, 2), random_tokens(model, 2)
    layer = cast(Layer, model.backbone.layers[1])
    before = decoder.step(token_B, state)

    def check() -> None:
        logits_BV, found = decoder.step_logits(token_B, state)
        want = model.backbone.step(token_B, state)
        assert largest_difference(found, want) < 1e-5 < largest_difference(before, want)
        torch.testing.assert_close(logits_BV, model.logits(want.hidden_BLD), atol=1e-5, rtol=1e-5)

    layer.mixer.in_proj.weight *= 0.5  # in place
    check()
    replaced = nn.Parameter(torch.randn_like(layer.mixer.out_proj.weight), requires_grad=False)
    layer.mixer.out_proj.weight = replaced
    check()
    model.load_state_dict(random_model(seed=1, **SMALL).state_dict())
    check()
    layer.mixer.A_log.data += 0.5  # behind torch's back
    decoder.refresh()
    check()


# Refusals ------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name_and_changes_nothing() -> None:
    model = random_model(**SMALL)
    decoder, state = NativeDecoder(model), owned(random_state(model, 2))
    before, token_B = owned(state), random_tokens(model, 2)
    narrow = ModelState(tuple(LayerState(layer.conv_BCK, layer.ssm_BHPN[..., :-1]) for layer in state.layers))
    double = ModelState(tuple(LayerState(layer.conv_BCK, layer.ssm_BHPN.double()) for layer in state.layers))
    elsewhere = ModelState(tuple(LayerState(layer.conv_BCK.to("meta"), layer.ssm_BHPN) for layer in state.layers))
    cases: list[tuple[Tensor, ModelState, str]] = [
        (torch.tensor([0, 50]), state, r"token_B\[1\] = 50; allowed: 0 to 49"),
        (torch.tensor([-1, 0]), state, r"token_B\[0\] = -1; allowed: 0 to 49"),
        (torch.tensor([[0], [1]]), state, r"token_B has shape \(2, 1\); allowed: \(B,\)"),
        (torch.tensor([], dtype=torch.int64), state, r"token_B has shape \(0,\)"),
        (token_B.int(), state, "token_B has dtype torch.int32; allowed: torch.int64"),
        (token_B.to("meta"), state, "token_B is on device meta; allowed: cpu"),
        (torch.tensor([0, 1, 2]), state, "state has 2 sequences; allowed: 3, as token_B has"),
        (token_B, ModelState(state.layers[:2]), "state has 2 layers; allowed: 3"),
        (token_B, narrow, r"ssm_BHPN has shape \(2, 8, 16, 15\); allowed: \(2, 8, 16, 16\)"),
        (token_B, double, "ssm_BHPN has dtype torch.float64; allowed: torch.float32"),
        (token_B, elsewhere, "conv_BCK is on device meta; allowed: cpu"),
    ]
    for bad_B, bad_state, message in cases:
        with pytest.raises(ValueError, match=message):
            decoder.step_logits(bad_B, bad_state, donate=True)
    assert all(
        torch.equal(a, b) for x, y in zip(state.layers, before.layers, strict=True) for a, b in zip(x, y, strict=True)
    )
    with pytest.raises(ValueError, match=r"hidden_BLD has shape \(2, 3, 63\); allowed: \(B, L, D\) = \(B, 3, 64\)"):
        decoder.logits(torch.zeros(2, 3, 63))
    with pytest.raises(ValueError, match=r"hidden_BLD has dtype torch.float64"):
        decoder.logits(torch.zeros(2, 3, 64).double())


def test_models_it_cannot_decode_are_refused_by_name() -> None:
    model = random_model(**SMALL)
    with pytest.raises(ValueError, match=r"weights = 'fp16'; allowed: 'fp32', 'bf16', 'int8'"):
        NativeDecoder(model, cast(Weights, "fp16"))
    with pytest.raises(ValueError, match=r"threads = 0; allowed: at least 1, or None"):
        NativeDecoder(model, threads=0)
    with pytest.raises(ValueError, match=r"backbone.embedding.weight has dtype torch.float64; allowed: torch.float32"):
        NativeDecoder(copy.deepcopy(model).double())
    without_head = NativeDecoder(model.backbone)
    with pytest.raises(ValueError, match=r"logits of a model with its head"):
        without_head.step_logits(torch.tensor([0]), model.backbone.initial_state(1))
    with pytest.raises(ValueError, match=r"logits of a model with its head"):
        without_head.logits(torch.zeros(1, 3, 64))
    layer = cast(Layer, model.backbone.layers[1])
    layer.mixer.out_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"backbone.layers.1.mixer.out_proj.weight holds nan; allowed: finite"):
        NativeDecoder(model)
    with pytest.raises(ValueError, match=r"layers.1.mixer.out_proj.weight holds nan"):
        without_head.step(torch.tensor([0]), model.backbone.initial_state(1))


def test_layers_that_the_head_does_not_read_are_no_obstacle() -> None:
    """An imported checkpoint has fusion logits of -inf for all layers but the last."""
    model = random_model(**SMALL)
    model.fusion.use_last_layer()
    decoder, state, token_B = NativeDecoder(model), random_state(model, 2), random_tokens(model, 2)
    logits_BV, out = decoder.step_logits(token_B, state)
    torch.testing.assert_close(logits_BV, model.logits(out.hidden_BLD), atol=1e-5, rtol=1e-5)


def test_the_core_itself_refuses_memory_that_is_written_twice_or_has_gaps() -> None:
    sizes: dict[str, Any] = {"d_model": 4, "d_state": 2, "headdim": 2, "n_heads": 4, "d_conv": 3, "vocab_size": 5}
    rest: dict[str, Any] = {"norm_eps": 1e-5, "weights": "fp32", "head": False}
    core = native.require().Decoder(n_layer=2, **sizes, **rest)
    token, hidden, decay = torch.tensor([1]).numpy(), torch.zeros(1, 2, 4).numpy(), torch.zeros(2, 1, 4).numpy()
    conv, ssm, memory = core.new_state(1)
    with pytest.raises(ValueError, match=r"weights are not loaded"):
        core.step(token, memory, memory, hidden, decay, None)
    aliased = core.state_of([*conv], [ssm[0], ssm[0]])
    crossed = core.state_of([*conv], [ssm[1], ssm[0]])
    assert memory.apart and crossed.apart and not aliased.apart
    for start, new in ((memory, aliased), (aliased, memory), (memory, crossed), (aliased, aliased)):
        with pytest.raises(ValueError, match=r"tensors of the new state share memory"):
            core.step(token, start, new, hidden, decay, None)
    with pytest.raises(ValueError, match=r"the state has 1 conv_BCK and 2 ssm_BHPN; allowed: one of each a layer, 2"):
        core.state_of([conv[0]], [*ssm])
    with pytest.raises(ValueError, match=r"the state is of batch 2 and 2 layers; allowed: of this model, batch 1"):
        core.step(token, core.new_state(2)[2], memory, hidden, decay, None)
    gaps = torch.zeros(1, 4, 2, 2).transpose(2, 3).numpy()
    with pytest.raises(ValueError, match=r"ssm_BHPN: not contiguous"):
        core.state_of([*conv], [gaps, ssm[1]])
    with pytest.raises(ValueError, match=r"head = False"):
        core.logits(hidden, torch.zeros(1, 5).numpy())
    with pytest.raises(ValueError, match=r"n_layer = 0; allowed: 1 to"):
        native.require().Decoder(n_layer=0, **sizes, **rest)


@pytest.mark.parametrize("batch", [1, 5])
def test_greedy_says_what_a_loop_of_steps_says(batch: int) -> None:
    model = random_model(**SMALL)
    decoder, state, token_B = NativeDecoder(model), random_state(model, batch), random_tokens(model, batch)
    before = owned(state)
    said_BT, after = decoder.greedy(token_B, state, 12)
    assert all(
        torch.equal(a, b) for x, y in zip(state.layers, before.layers, strict=True) for a, b in zip(x, y, strict=True)
    )
    for place in range(12):
        logits_BV, out = decoder.step_logits(token_B, state)
        token_B, state = logits_BV.argmax(dim=-1), out.state
        assert torch.equal(said_BT[:, place], token_B)
    for mine, theirs in zip(after.layers, state.layers, strict=True):
        assert torch.equal(mine.conv_BCK, theirs.conv_BCK) and torch.equal(mine.ssm_BHPN, theirs.ssm_BHPN)
    with pytest.raises(ValueError, match="count = 0; allowed: at least 1"):
        decoder.greedy(token_B, state, 0)
