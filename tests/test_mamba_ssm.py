"""The backbone: against the recurrence written out, against itself cut into pieces, and against Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crsm import native
from crsm.config import BackboneConfig
from crsm.kernels import KERNELS, cuda, reference, select_kernels
from crsm.mamba_ssm import Backbone
from crsm.model import CRSM
from crsm.types import LayerState, ModelState
from tests.fixtures import assert_same_state, layers_of, tiny_checkpoint, tiny_config

V = 20
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module", autouse=True, params=sorted(set(KERNELS) - {"cuda"}))
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything here holds for a backbone on any kernels for the CPU."""
    if request.param == "native" and not native.available():
        pytest.skip(f"no native core: {native.MISSING}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRSM_KERNELS", request.param)
        yield request.param


def config_of(**changes: Any) -> BackboneConfig:
    return BackboneConfig(**({"vocab_size": V, "d_model": 16, "n_layer": 2, "d_state": 8, "headdim": 8} | changes))


def backbone_of(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Backbone:
    """Random weights; larger ones than those of the start, so that every token matters to the ones after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Backbone(config_of(**changes)).to(dtype)
        with torch.no_grad():
            backbone.embedding.weight.normal_()
            for layer in layers_of(backbone):
                layer.mixer.D.normal_()
                layer.mixer.out_proj.weight *= 3
                layer.mixer.norm.weight.uniform_(0.5, 1.5)
                layer.norm.weight.uniform_(0.5, 1.5)
    return backbone.requires_grad_(False)


def tokens_of(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).integers(V, size=shape))


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest value."""
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def assert_close_states(got: ModelState, want: ModelState) -> None:
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        assert_close(mine.conv_BCK, theirs.conv_BCK)
        assert_close(mine.ssm_BHPN, theirs.ssm_BHPN)


# The recurrence -------------------------------------------------------------------------------------------------------


def recurrence(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTN: Tensor, C_BTN: Tensor, state_BHPN: Tensor, segment_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """``h[t] = exp(dt·A)·h[t-1] + (dt·x) ⊗ B``, ``y[t] = h[t]·C``, number by number; h = 0 where a document begins."""
    batch, length, heads, _ = x_BTHP.shape
    h = state_BHPN.clone()
    y = torch.zeros_like(x_BTHP)
    for b in range(batch):
        for t in range(length):
            if t > 0 and segment_BT[b, t] != segment_BT[b, t - 1]:
                h[b] = 0
            for i in range(heads):
                a = math.exp(float(dt_BTH[b, t, i] * A_H[i]))
                h[b, i] = a * h[b, i] + torch.outer(dt_BTH[b, t, i] * x_BTHP[b, t, i], B_BTN[b, t])
                y[b, t, i] = h[b, i] @ C_BTN[b, t]
    return y, h


def scan_inputs(seed: int, length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads, width, state = 2, 3, 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        normal(batch, length, heads, width),
        normal(batch, length, heads).exp() * 0.3,
        -normal(heads).exp(),
        normal(batch, length, state),
        normal(batch, length, state),
        normal(batch, heads, width, state),
    )


@settings(max_examples=40)
@given(seeds, st.integers(1, 13), st.integers(1, 16), st.booleans())
def test_the_chunked_scan_is_the_recurrence(seed: int, length: int, chunk_size: int, packed: bool) -> None:
    inputs = scan_inputs(seed, length)
    rng = np.random.default_rng(seed)
    changes = rng.random((2, length)) < (0.4 if packed else 0.0)
    segment_BT = torch.tensor(changes.cumsum(axis=1))
    want_y, want_h = recurrence(*inputs, segment_BT)
    y, h = reference.chunk_scan(*inputs, chunk_size, segment_BT if packed else None)
    np.testing.assert_allclose(y, want_y, atol=1e-9)
    np.testing.assert_allclose(h, want_h, atol=1e-9)


def test_one_step_is_the_recurrence_and_returns_its_decay() -> None:
    x, dt, A, B, C, state = scan_inputs(0, 1)
    want_y, want_h = recurrence(x, dt, A, B, C, state, torch.zeros(2, 1))
    y, h, decay = reference.state_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    np.testing.assert_allclose(y, want_y[:, 0], atol=1e-12)
    np.testing.assert_allclose(h, want_h, atol=1e-12)
    np.testing.assert_allclose(decay, np.exp((dt[:, 0] * A).numpy()), rtol=1e-12)


@settings(max_examples=30)
@given(seeds, st.integers(1, 9), st.integers(2, 5), st.booleans())
def test_the_convolution_is_a_sum_over_its_taps(seed: int, length: int, width: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels = 3
    x = torch.randn(2, length, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    state = torch.randn(2, channels, width - 1, generator=generator, dtype=torch.float64)
    changes = np.random.default_rng(seed).random((2, length)) < (0.4 if packed else 0.0)
    segment = changes.cumsum(axis=1)
    got, window = reference.causal_conv(x, weight, bias, state, torch.tensor(segment) if packed else None)
    for b in range(2):
        inputs = [(segment[b, 0], state[b, :, k]) for k in range(width - 1)]
        inputs += [(segment[b, t], x[b, t]) for t in range(length)]
        for t in range(length):
            taps = enumerate(inputs[t : t + width])
            want = bias + sum(weight[:, k] * value for k, (document, value) in taps if document == segment[b, t])
            np.testing.assert_allclose(got[b, t], want, atol=1e-12)
        for k, (document, value) in enumerate(inputs[-(width - 1) :]):
            np.testing.assert_array_equal(window[b, :, k], value if document == segment[b, -1] else 0 * value)
    one, window_one = reference.causal_conv_step(x[:, 0], weight, bias, state)
    np.testing.assert_allclose(one, got[:, 0], atol=1e-12)
    np.testing.assert_array_equal(window_one, torch.cat([state, x[:, 0, :, None]], dim=2)[:, :, 1:])


def test_gradients_of_the_scan_are_those_of_finite_differences() -> None:
    """Of every input, the initial state included, over a length that no chunk divides, with and without documents."""
    inputs = tuple(tensor.requires_grad_() for tensor in scan_inputs(1, 5, batch=1))
    for segment_BT in (None, torch.tensor([[0, 0, 1, 1, 1]])):

        def scan(*tensors: Tensor, segment: Tensor | None = segment_BT) -> tuple[Tensor, Tensor]:
            return reference.chunk_scan(*tensors, 2, segment)  # type: ignore[arg-type,call-arg]

        assert torch.autograd.gradcheck(scan, inputs)


def test_gradients_of_a_whole_backbone_are_those_of_finite_differences() -> None:
    backbone = backbone_of(dtype=torch.float64, d_model=4, d_state=2, headdim=4, chunk_size=2)
    tokens = tokens_of(0, 1, 5)
    _, start = backbone(tokens_of(1, 1, 3))
    names = [name for name, _ in backbone.named_parameters()]
    state = [tensor.clone().requires_grad_() for layer in start.layers for tensor in layer]
    parameters = [tensor.clone().requires_grad_() for _, tensor in backbone.named_parameters()]
    projection = torch.randn(5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(*tensors: Tensor) -> Tensor:
        weights = dict(zip(names, tensors[: len(names)], strict=True))
        parts = tensors[len(names) :]
        begin = ModelState(tuple(LayerState(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)))
        hidden, end = torch.func.functional_call(backbone, weights, (tokens, begin))
        return (hidden[0] * projection).sum() + end.layers[-1].ssm_BHPN.sum()

    # Along a random direction per input: exact, and a matter of a second instead of minutes.
    assert torch.autograd.gradcheck(loss, (*parameters, *state), fast_mode=True)


# Causality, pieces, state ---------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seeds, st.integers(2, 20), st.data())
def test_a_token_leaves_everything_before_it_bit_identical(seed: int, length: int, data: st.DataObject) -> None:
    backbone = backbone_of(chunk_size=6)
    changed_at = data.draw(st.integers(0, length - 1))
    tokens = tokens_of(seed, 2, length)
    other = tokens.clone()
    other[:, changed_at] = (other[:, changed_at] + 1 + seed % (V - 1)) % V
    (hidden, _), (changed, _) = backbone(tokens), backbone(other)
    assert torch.equal(hidden[:, :changed_at], changed[:, :changed_at])
    assert not torch.equal(hidden[:, changed_at], changed[:, changed_at])
    assert not torch.equal(hidden[:, -1], changed[:, -1]), "and it is not forgotten at once"


def test_fused_logits_before_a_changed_token_are_bit_identical() -> None:
    model = tiny_checkpoint().model
    tokens = tokens_of(0, 1, 12)
    other = tokens.clone()
    other[0, 7] = (other[0, 7] + 1) % V
    one, two = (model.logits(model.backbone(text)[0]) for text in (tokens, other))
    assert torch.equal(one[:, :7], two[:, :7]) and not torch.equal(one[:, 7:], two[:, 7:])


@settings(max_examples=25)
@given(seeds, st.integers(1, 23), st.integers(1, 9))
def test_steps_are_the_forward_pass_position_by_position(seed: int, length: int, chunk_size: int) -> None:
    backbone = backbone_of(seed % 3, chunk_size=chunk_size)
    tokens = tokens_of(seed, 2, length)
    hidden_BTLD, end = backbone(tokens)
    state = backbone.initial_state(2)
    stepped = []
    for t in range(length):
        out = backbone.step(tokens[:, t], state)
        stepped.append(out.hidden_BLD)
        state = out.state
    assert_close(torch.stack(stepped, dim=1), hidden_BTLD)
    assert_close_states(state, end)


@settings(max_examples=20)
@given(seeds, st.integers(2, 20), st.data())
def test_a_text_in_two_pieces_is_the_text_in_one(seed: int, length: int, data: st.DataObject) -> None:
    backbone = backbone_of(chunk_size=4)
    cut = data.draw(st.integers(1, length - 1))
    tokens = tokens_of(seed, 2, length)
    whole, end = backbone(tokens)
    first, middle = backbone(tokens[:, :cut])
    second, resumed_end = backbone(tokens[:, cut:], middle)
    assert_close(torch.cat([first, second], dim=1), whole)
    assert_close_states(resumed_end, end)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
def test_the_chunk_size_changes_rounding_only(chunk_size: int) -> None:
    tokens = tokens_of(0, 2, 21)
    hidden, state = backbone_of(chunk_size=chunk_size)(tokens)
    want, want_state = backbone_of(chunk_size=21)(tokens)
    assert_close(hidden, want)
    assert_close_states(state, want_state)


def test_the_state_matters_and_no_state_is_the_state_of_zeros() -> None:
    """The first thing that the original prototype got wrong: what it was given, it ignored."""
    backbone = backbone_of()
    tokens = tokens_of(0, 2, 5)
    hidden, _ = backbone(tokens)
    zeros = backbone.initial_state(2)
    assert all(not tensor.any() for layer in zeros.layers for tensor in layer)
    assert torch.equal(backbone(tokens, zeros)[0], hidden)
    _, other = backbone(tokens_of(1, 2, 9))
    for changed in (
        other,
        zeros.with_ssm(tuple(layer.ssm_BHPN for layer in other.layers)),
        ModelState(tuple(LayerState(b.conv_BCK, a.ssm_BHPN) for a, b in zip(zeros.layers, other.layers, strict=True))),
    ):
        for got in (backbone(tokens, changed)[0][:, 0], backbone.step(tokens[:, 0], changed).hidden_BLD):
            assert (got - hidden[:, 0]).abs().max() > 1e-3


def test_states_are_values() -> None:
    backbone = backbone_of()
    _, state = backbone(tokens_of(0, 2, 7))
    copy = ModelState(tuple(LayerState(*(tensor.clone() for tensor in layer)) for layer in state.layers))
    backbone(tokens_of(1, 2, 7), state)
    backbone.step(tokens_of(1, 2), state)
    assert_same_state(state, copy)


def test_the_decays_of_a_step_are_those_its_state_decayed_by() -> None:
    """The same token from two states: the states' difference shrinks by exactly the decay in the first layer."""
    backbone = backbone_of()
    _, one = backbone(tokens_of(0, 1, 7))
    other = one.with_ssm(tuple(layer.ssm_BHPN + 1.0 for layer in one.layers))
    token = torch.tensor([3])
    out, out_other = backbone.step(token, one), backbone.step(token, other)
    difference = out_other.state.layers[0].ssm_BHPN - out.state.layers[0].ssm_BHPN
    np.testing.assert_allclose(
        difference, out.decay_LBH[0][..., None, None].expand_as(difference), rtol=1e-4, atol=1e-5
    )
    assert all(((decay > 0) & (decay < 1)).all() for decay in out.decay_LBH)


# Packing --------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 8))
def test_packed_documents_are_separate_documents(seed: int, lengths: list[int], chunk_size: int) -> None:
    backbone = backbone_of(chunk_size=chunk_size)
    documents = [tokens_of(seed + i, 1, length) for i, length in enumerate(lengths)]
    segment = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]])
    packed, end = backbone(torch.cat(documents, dim=1), segment_BT=segment)
    alone = [backbone(document) for document in documents]
    assert_close(packed, torch.cat([hidden for hidden, _ in alone], dim=1))
    assert_close_states(end, alone[-1][1])


@pytest.mark.parametrize("lengths", [[8, 8, 8], [4, 4, 1, 7], [7, 1, 1, 8], [9, 8], [1, 1, 1, 1]])
def test_documents_that_end_at_the_border_of_a_chunk_are_separate_too(lengths: list[int]) -> None:
    backbone = backbone_of(chunk_size=8)
    documents = [tokens_of(i, 1, length) for i, length in enumerate(lengths)]
    segment = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]])
    packed, _ = backbone(torch.cat(documents, dim=1), segment_BT=segment)
    assert_close(packed, torch.cat([backbone(document)[0] for document in documents], dim=1))


def test_the_incoming_state_belongs_to_the_first_document_and_names_of_documents_may_return() -> None:
    backbone = backbone_of(chunk_size=4)
    tokens = tokens_of(0, 1, 9)
    _, state = backbone(tokens_of(1, 1, 5))
    packed, end = backbone(tokens, state, torch.tensor([[7, 7, 3, 3, 3, 7, 9, 7, 7]]))
    pieces = [backbone(tokens[:, :2], state), *(backbone(tokens[:, a:b]) for a, b in ((2, 5), (5, 6), (6, 7), (7, 9)))]
    assert_close(packed, torch.cat([hidden for hidden, _ in pieces], dim=1))
    assert_close_states(end, pieces[-1][1])


# Hugging Face, names, initialisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_model", "n_layer", "d_state", "headdim", "d_conv", "chunk_size", "tied"),
    [(16, 2, 8, 8, 4, 8, False), (32, 3, 16, 16, 4, 5, True), (24, 1, 4, 8, 2, 64, False)],
)
def test_logits_are_those_of_hugging_faces_mamba2_on_the_same_weights(
    d_model: int, n_layer: int, d_state: int, headdim: int, d_conv: int, chunk_size: int, tied: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                vocab_size=V,
                hidden_size=d_model,
                num_hidden_layers=n_layer,
                state_size=d_state,
                head_dim=headdim,
                num_heads=2 * d_model // headdim,
                n_groups=1,
                conv_kernel=d_conv,
                chunk_size=chunk_size,
                tie_word_embeddings=tied,
            )
        ).eval()
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    tiny = tiny_config()
    sizes = config_of(d_model=d_model, n_layer=n_layer, d_state=d_state, headdim=headdim, d_conv=d_conv)
    sizes = sizes.model_copy(update={"chunk_size": 6, "tie_embeddings": tied})
    ours = CRSM(tiny.model_copy(update={"model": tiny.model.model_copy(update={"backbone": sizes})}))
    weights = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith(("backbone", "lm_head"))]
    ours.fusion.use_last_layer()
    tokens = tokens_of(3, 2, 19)
    with torch.no_grad():
        want = theirs(tokens).logits
        got = ours.logits(ours.backbone(tokens)[0])
    assert float((got - want).abs().max()) <= 1e-4
    assert float(want.std()) > 0.1


def test_parameter_names_and_shapes_are_those_of_the_public_checkpoints() -> None:
    """As listed by the checkpoints ``state-spaces/mamba2-*`` (with E = expand · d_model, one group)."""
    sizes = config_of(n_layer=1)
    d, e, n, h, k = 16, 32, 8, 4, 4
    with torch.random.fork_rng():
        tiny = tiny_config()
        model = CRSM(tiny.model_copy(update={"model": tiny.model.model_copy(update={"backbone": sizes})}))
    found = {
        name: tuple(parameter.shape)
        for name, parameter in model.state_dict().items()
        if name.startswith(("backbone", "lm_head"))
    }
    assert found == {
        "backbone.embedding.weight": (V, d),
        "backbone.layers.0.mixer.dt_bias": (h,),
        "backbone.layers.0.mixer.A_log": (h,),
        "backbone.layers.0.mixer.D": (h,),
        "backbone.layers.0.mixer.in_proj.weight": (2 * e + 2 * n + h, d),
        "backbone.layers.0.mixer.conv1d.weight": (e + 2 * n, 1, k),
        "backbone.layers.0.mixer.conv1d.bias": (e + 2 * n,),
        "backbone.layers.0.mixer.norm.weight": (e,),
        "backbone.layers.0.mixer.out_proj.weight": (d, e),
        "backbone.layers.0.norm.weight": (d,),
        "backbone.norm_f.weight": (d,),
        "lm_head.weight": (V, d),
    }


def test_the_initialisation_is_that_of_mamba_ssm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = Backbone(config_of(d_model=64, n_layer=4, headdim=1, vocab_size=400)).requires_grad_(False)
    assert abs(float(backbone.embedding.weight.std()) - 0.02) < 0.001
    for layer in layers_of(backbone):
        mixer = layer.mixer
        A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
        assert 1 <= A.min() and A.max() <= 16 and abs(float(A.mean()) - 8.5) < 1.5
        assert 0.001 * 0.999 <= dt.min() and dt.max() <= 0.1 * 1.001
        # Uniform in the logarithm: the median lies at the geometric mean, 0.01.
        assert 0.005 < float(dt.median()) < 0.02
        assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all() and (layer.norm.weight == 1).all()
        # PyTorch's linear layers start uniform within 1/√inputs; the residual branch is scaled down by √layers.
        for weight, bound in ((mixer.in_proj.weight, 64**-0.5), (mixer.out_proj.weight, 128**-0.5 / math.sqrt(4))):
            assert 0.98 * bound < float(weight.abs().max()) <= bound
        for parameter in (mixer.A_log, mixer.D, mixer.dt_bias):
            assert vars(parameter)["_no_weight_decay"]
    assert backbone.config.n_heads == 128


# Bad input ------------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused_by_name() -> None:
    backbone = backbone_of()
    state = backbone.initial_state(2)
    tokens = tokens_of(0, 2, 3)
    with pytest.raises(ValueError, match=r"tokens_BT has shape \(3,\); allowed: \(B, T\)"):
        backbone(tokens[0])
    with pytest.raises(ValueError, match=r"tokens_BT has shape \(2, 0\)"):
        backbone(tokens[:, :0])
    with pytest.raises(ValueError, match=r"token_B has shape \(2, 3\)"):
        backbone.step(tokens, state)
    with pytest.raises(ValueError, match=r"state has 1 layers; allowed: 2"):
        backbone(tokens, ModelState(state.layers[:1]))
    with pytest.raises(ValueError, match=r"layer 0 .*\(2, 4, 8, 8\).*allowed: .*\(3, 4, 8, 8\)"):
        backbone.step(tokens_of(0, 3), state)
    broken = LayerState(state.layers[1].conv_BCK[:, :-1], state.layers[1].ssm_BHPN)
    with pytest.raises(ValueError, match="layer 1"):
        backbone.step(tokens[:, 0], ModelState((state.layers[0], broken)))
    with pytest.raises(ValueError, match="vocab_size = 0"):
        Backbone(config_of(vocab_size=0))
    with pytest.raises(ValueError, match="headdim = 7 does not divide"):
        config_of(headdim=7)


def test_unknown_kernels_are_refused_and_the_known_listed(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"kernels = 'abacus'; allowed: .*reference"):
        select_kernels("abacus")
    assert select_kernels("reference") is reference
    assert select_kernels().NAME == select_kernels(kernels).NAME == backbone_of().kernels.NAME == kernels
    monkeypatch.setenv("CRSM_KERNELS", "abacus")
    with pytest.raises(ValueError, match="CRSM_KERNELS = 'abacus'"):
        select_kernels()
    assert select_kernels("reference") is reference, "a name that is given goes before the environment"
    monkeypatch.delenv("CRSM_KERNELS")
    best = [cuda.NAME] * cuda.available() + ["native"] * native.available() + ["reference"]
    assert select_kernels().NAME == best[0]


def test_native_kernels_without_the_core_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crsm.kernels.available", lambda: False)
    monkeypatch.setattr(cuda, "missing", lambda: "no GPU")
    monkeypatch.delenv("CRSM_KERNELS")
    assert select_kernels() is reference
    with pytest.raises(ValueError, match="kernels = 'native': no native core"):
        select_kernels("native")
