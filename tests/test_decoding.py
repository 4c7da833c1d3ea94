"""Which decoder an engine takes, and what stays true whichever it is."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from crsm import native
from crsm.config import EngineConfig, SamplingConfig, load_config
from crsm.decoding import TorchDecoder, select_decoder
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.native.decoder import NativeDecoder
from tests.fixtures import PROMPT, random_state, tiny_checkpoint

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native core: {native.MISSING}")

PROMPTS = (PROMPT, PROMPT[:3], (20,), (10, 21, 4, 8, 23, 7))


def say(config: EngineConfig, prompts: tuple[tuple[int, ...], ...], tokens: int = 12) -> list[list[tuple[int, float]]]:
    """Tokens with their log-probabilities, a prompt each."""
    engine = Engine(tiny_checkpoint(), config=config)
    ids = [engine.submit(GenerationRequest(prompt, SamplingConfig(max_tokens=tokens))) for prompt in prompts]
    said: dict[str, list[tuple[int, float]]] = {name: [] for name in ids}
    while engine.busy:
        for token in engine.step():
            said[token.generation_id].append((token.token, token.logprob))
    return [said[name] for name in ids]


@needs_native
def test_the_native_decoder_is_taken_for_fp32_on_the_cpu_and_pytorch_for_anything_else() -> None:
    model = tiny_checkpoint().model
    assert isinstance(select_decoder(model), NativeDecoder)
    assert isinstance(select_decoder(model, EngineConfig(decoder="native", weights="int8")), NativeDecoder)
    assert isinstance(select_decoder(model, EngineConfig(decoder="torch")), TorchDecoder)
    assert isinstance(select_decoder(model.double()), TorchDecoder)


def test_without_the_core_pytorch_decodes_and_what_only_the_core_can_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "MISSING", "not built")
    model = tiny_checkpoint().model
    assert isinstance(select_decoder(model), TorchDecoder)
    with pytest.raises(ValueError, match=r"engine.decoder = 'native', but the native core is not available: not built"):
        select_decoder(model, EngineConfig(decoder="native"))
    with pytest.raises(ValueError, match=r"engine.weights = 'bf16', but the native core is not available"):
        select_decoder(model, EngineConfig(weights="bf16"))


@needs_native
def test_the_native_decoder_cannot_be_had_for_other_types() -> None:
    with pytest.raises(ValueError, match=r"engine.decoder = 'native', but backbone.embedding.weight is torch.float64"):
        select_decoder(tiny_checkpoint().model.double(), EngineConfig(decoder="native"))


def test_settings_name_decoder_and_weights_and_refuse_what_does_not_go_together() -> None:
    assert load_config(overrides=["engine.weights=int8"]).engine.weights == "int8"
    with pytest.raises(
        ValueError, match=r"weights = 'bf16' with decoder = 'torch'; allowed: 'fp32', or another decoder"
    ):
        load_config(overrides=["engine.weights=bf16", "engine.decoder=torch"])
    with pytest.raises(ValueError, match=r"engine.weights = 'fp16'"):
        load_config(overrides=["engine.weights=fp16"])


@needs_native
def test_both_decoders_say_the_same_within_rounding() -> None:
    for one, other in zip(
        say(EngineConfig(decoder="native"), PROMPTS), say(EngineConfig(decoder="torch"), PROMPTS), strict=True
    ):
        assert [token for token, _ in one] == [token for token, _ in other]
        torch.testing.assert_close([p for _, p in one], [p for _, p in other], atol=1e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_what_is_said_does_not_depend_on_the_batch_bit_for_bit(weights: Literal["fp32", "bf16", "int8"]) -> None:
    """Prompts of different lengths: each is consumed alone, then all are decoded together."""
    config = EngineConfig(decoder="native", weights=weights)
    alone = [say(config, (prompt,))[0] for prompt in PROMPTS[:3]]
    assert say(config, PROMPTS[:3]) == alone


@pytest.mark.parametrize("decoder", ["auto", "torch"])
def test_a_state_is_changed_only_when_it_is_given_up(decoder: Literal["auto", "torch"]) -> None:
    checkpoint = tiny_checkpoint()
    state = random_state(checkpoint)
    before = [tensor.clone() for layer in state.layers for tensor in layer]
    chosen = select_decoder(checkpoint.model, EngineConfig(decoder=decoder))
    out = chosen.step(torch.tensor([PROMPT[0]]), state)
    chosen.step(torch.tensor([PROMPT[1]]), out.state, donate=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for layer in state.layers for t in layer), strict=True))
