"""A source's tensors, each used once, say what the source says; System 2 is there and changes nothing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.importing import import_checkpoint
from crsm.model import PARTS, build_model, load_checkpoint, save_checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from tests.importing.sources import (
    ROWS,
    SAVE,
    TOKENS,
    mamba_ssm_weights,
    random_model,
    save_hugging_face,
    save_mamba_ssm,
    source_tensors,
    tokenizer_json,
)

pytest.importorskip("transformers")


def imported(folder, **options):
    return import_checkpoint(folder, folder / "tokenizer.json", name="imported", **options)


def some_tokens(count, batch=2, rows=ROWS):
    return torch.randint(rows, (batch, count), generator=torch.Generator().manual_seed(count))


def logits_of(model, tokens):
    with torch.no_grad():
        return model.logits(model.backbone(tokens)[0])


def stepped_logits(model, tokens):
    state, found = model.backbone.initial_state(len(tokens)), []
    with torch.no_grad():
        for token in tokens.T:
            out = model.backbone.step(token, state)
            state = out.state
            found.append(model.logits(out.hidden_BLD))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", SAVE)
def test_the_logits_are_the_sources_in_one_piece_and_token_by_token(layout, tied, tmp_path):
    theirs = random_model(tie_word_embeddings=tied)
    checkpoint = imported(SAVE[layout](theirs, tmp_path / "source"))
    assert checkpoint.report["import"]["layout"] == layout
    assert checkpoint.config.model.backbone.tie_embeddings is tied
    save_checkpoint(checkpoint, tmp_path / "ours")
    ours = load_checkpoint(tmp_path / "ours").model
    tokens = some_tokens(27)  # over three chunks, the last one not full
    with torch.no_grad():
        want = theirs(tokens).logits
    assert float(want.std()) > 0.5
    assert float((logits_of(ours, tokens) - want).abs().max()) <= 1e-4
    assert float((stepped_logits(ours, tokens) - want).abs().max()) <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", SAVE)
def test_every_tensor_of_the_source_is_used_exactly_once(layout, tied, tmp_path):
    folder = SAVE[layout](random_model(tie_word_embeddings=tied), tmp_path / "source")
    checkpoint = imported(folder)
    source = {name.replace("embeddings", "embedding"): tensor for name, tensor in source_tensors(folder).items()}
    ours = dict(checkpoint.model.named_parameters())
    ours = {name: tensor for name, tensor in ours.items() if name.startswith(("backbone.", "lm_head."))}
    if tied:
        source.pop("lm_head.weight", None)
        assert checkpoint.model.lm_head.weight is checkpoint.model.backbone.embedding.weight
    assert set(ours) == set(source)
    assert all(torch.equal(ours[name], tensor) for name, tensor in source.items())
    values = [tuple(tensor.flatten()[:3].tolist()) for tensor in source.values()]
    assert len(set(values)) == len(values)  # so that no two could have been exchanged
    assert checkpoint.report["import"]["tensors"] == len(source) + (tied and layout == "mamba-ssm")


def test_shards_give_the_same_as_one_file(tmp_path):
    model = random_model()
    whole = imported(save_hugging_face(model, tmp_path / "whole"))
    folder = save_hugging_face(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    tokens = some_tokens(9)
    assert torch.equal(logits_of(imported(folder).model, tokens), logits_of(whole.model, tokens))


def test_halves_are_read_as_they_are_and_computed_in_fp32(tmp_path):
    model = random_model(tie_word_embeddings=True).half()
    checkpoint = imported(save_mamba_ssm(model, tmp_path / "source"))
    tokens = some_tokens(9)
    with torch.no_grad():
        want = model.float()(tokens).logits
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float32}
    assert float((logits_of(checkpoint.model, tokens) - want).abs().max()) <= 1e-4


def test_a_saved_model_of_mamba_ssm_may_be_safetensors_too(tmp_path):
    model = random_model(tie_word_embeddings=False)
    folder = save_mamba_ssm(model, tmp_path / "source")
    (folder / "pytorch_model.bin").unlink()
    save_file(mamba_ssm_weights(model), folder / "model.safetensors")
    assert imported(folder).report["import"] == {"source": "source", "layout": "mamba-ssm", "tensors": 3 * 9 + 3}


@pytest.fixture(scope="module")
def large():
    """Of the sizes of mamba2-130m."""
    model = random_model(
        vocab_size=50288,
        hidden_size=768,
        num_hidden_layers=24,
        state_size=128,
        head_dim=64,
        num_heads=24,
        chunk_size=256,
        tie_word_embeddings=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)  # spread as trained ones are: the residual stream must not drown its layers
    return model


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", SAVE)
def test_the_logits_are_the_sources_at_the_sizes_of_mamba2_130m(large, layout, tmp_path):
    folder = SAVE[layout](large, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    if layout == "mamba-ssm":  # to the letter as in the public repositories
        config |= {"vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
        (folder / "config.json").write_text(json.dumps(config))
    checkpoint = imported(folder)
    assert checkpoint.model.num_parameters()["backbone"] == large.num_parameters() == 128_989_632
    tokens = some_tokens(300, batch=1, rows=50277)
    with torch.no_grad():
        want = large(tokens).logits
    assert float(want.std()) > 0.5
    assert float((logits_of(checkpoint.model, tokens) - want).abs().max()) <= 1e-4
    first = tokens[:, :20]
    assert float((stepped_logits(checkpoint.model, first) - want[:, :20]).abs().max()) <= 1e-4


# ----------------------------------------------------------------------------------------------------------- System 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return imported(save_mamba_ssm(random_model(tie_word_embeddings=True), tmp_path_factory.mktemp("source")), seed=3)


def test_the_parts_of_system_2_are_new_and_shut(checkpoint):
    model = checkpoint.model
    assert model.fusion.weights_L.tolist() == [0.0, 0.0, 1.0]
    assert not bool(model.gate.calibrated)
    assert checkpoint.trust_horizon is None and checkpoint.model_version == 0
    with torch.random.fork_rng():
        torch.manual_seed(3)
        new = build_model(checkpoint.config, checkpoint.tokenizer)
    for part in set(PARTS) - {"backbone", "lm_head", "fusion"}:
        for name, tensor in getattr(new, part).state_dict().items():
            assert torch.equal(tensor, getattr(model, part).state_dict()[name]), f"{part}.{name}"


def test_with_planners_the_text_is_system_1s_until_the_stages_have_run(checkpoint):
    settings = EngineConfig(clock="virtual")
    prompt = tuple(checkpoint.tokenizer.encode("How many apples?"))
    deliberation = DeliberationConfig(lag=1, injection_rate=1.0, channel="both")
    sampling = SamplingConfig(max_tokens=24, ignore_eos=True)

    def said(planners, deliberation):
        engine = Engine(checkpoint, planners, settings)
        (tokens,) = engine.generate_all([GenerationRequest(prompt, sampling, deliberation)])
        return tokens, engine

    alone, _ = said(None, DeliberationConfig())
    thought, engine = said(InlinePlanners(Deliberator.from_checkpoint(checkpoint), 4), deliberation)
    assert thought == alone and len(alone) == 24
    assert engine.metrics.requests > 0 and not engine.metrics.injections_per_layer


def test_a_deep_model_is_read_at_four_layers(tmp_path):
    folder = save_mamba_ssm(random_model(num_hidden_layers=10), tmp_path / "deep")
    assert imported(folder).config.model.world_model.read_layers == (1, 4, 6, 9)


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_padding_and_verdicts_take_rows_that_the_source_left_empty(checkpoint):
    tokenizer = checkpoint.tokenizer
    assert tokenizer.is_foreign and tokenizer.has_verdicts
    assert (tokenizer.vocab_size, checkpoint.config.model.backbone.vocab_size) == (TOKENS + 3, ROWS)
    assert {tokenizer.pad_id, tokenizer.verdict_id(True), tokenizer.verdict_id(False)} == {300, 301, 302}


def test_without_empty_rows_the_vocabulary_stays_what_it_is_and_cannot_be_trained(tmp_path):
    folder = save_hugging_face(random_model(vocab_size=TOKENS + 1), tmp_path / "source")
    tokenizer = imported(folder).tokenizer
    assert tokenizer.vocab_size == TOKENS and not tokenizer.has_verdicts
    with pytest.raises(ValueError, match="lacks the verdict tokens"):
        tokenizer.verdict_id(True)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save_hugging_face(random_model(vocab_size=TOKENS - 1), tmp_path / "source")
    with pytest.raises(ValueError, match=r"tokenizer\.json: 300 tokens; allowed: at most 299, the rows"):
        imported(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json()[:-9])
    with pytest.raises(ValueError, match="is cut short or not JSON"):
        imported(folder)
