"""What cannot be imported is refused with the first field, tensor or file that does not fit, and leaves nothing."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from crsm.importing import import_checkpoint
from crsm.importing.layout import read_layout
from tests.importing.sources import (
    mamba_ssm_config,
    mamba_ssm_weights,
    random_model,
    save_hugging_face,
    save_mamba_ssm,
)

pytest.importorskip("transformers")
MODEL = random_model(tie_word_embeddings=True)


@pytest.fixture
def mamba_ssm(tmp_path):
    return save_mamba_ssm(MODEL, tmp_path / "mamba_ssm")


@pytest.fixture
def hugging_face(tmp_path):
    return save_hugging_face(MODEL, tmp_path / "hugging_face")


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        import_checkpoint(folder, folder / "tokenizer.json", name="imported")
    return str(caught.value)


def refused_config(tree, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError) as caught:
        read_layout(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: "), message
    return message.removeprefix(f"{file}: ")


# -------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ssm_cfg": {}}, "ssm_cfg.layer = 'Mamba1'; allowed: 'Mamba2'"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer = 'Mamba3'; allowed: 'Mamba2'"),
        ({"ssm_cfg": {"ngroups": 8}}, "ssm_cfg.ngroups = 8; allowed: 1"),
        ({"ssm_cfg": {"D_has_hdim": True}}, "ssm_cfg.D_has_hdim = True; allowed: False"),
        ({"ssm_cfg": {"rmsnorm": False}}, "ssm_cfg.rmsnorm = False; allowed: True"),
        ({"ssm_cfg": {"norm_before_gate": True}}, "ssm_cfg.norm_before_gate = True; allowed: False"),
        ({"ssm_cfg": {"bias": True}}, "ssm_cfg.bias = True; allowed: False"),
        ({"ssm_cfg": {"conv_bias": False}}, "ssm_cfg.conv_bias = False; allowed: True"),
        ({"ssm_cfg": {"d_ssm": 16}}, "ssm_cfg.d_ssm = 16; allowed: None"),
        ({"ssm_cfg": {"dt_limit": [0.0, 0.1]}}, "ssm_cfg.dt_limit = [0.0, 0.1]; allowed: [0.0, Infinity]"),
        ({"ssm_cfg": {"window": 4}}, "unknown key 'ssm_cfg.window'; allowed: "),
        ({"attn_layer_idx": [1]}, "attn_layer_idx = [1]; allowed: [], no attention"),
        ({"d_intermediate": 32}, "d_intermediate = 32; allowed: 0"),
        ({"rms_norm": False}, "rms_norm = False; allowed: True"),
        ({"d_model": 0}, "d_model = 0; allowed: greater than or equal to 1"),
        ({"n_layer": "many"}, "n_layer = 'many'; allowed: a valid integer"),
        ({"ssm_cfg": {"headdim": 5}}, "config: headdim = 5 does not divide expand · d_model = 32; allowed: a divisor"),
        ({"rope": True}, "unknown key 'rope'; allowed: attn_cfg, "),
    ],
)
def test_a_feature_that_the_backbone_lacks_is_named(change, expected, tmp_path):
    tree = mamba_ssm_config(MODEL.config)
    if change.get("ssm_cfg"):
        change = {"ssm_cfg": {"layer": "Mamba2", **change["ssm_cfg"]}}
    assert refused_config(tree | change, tmp_path).startswith(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba'; allowed: 'mamba2'"),
        ({"n_groups": 8}, "n_groups = 8; allowed: 1"),
        ({"n_groups": None}, "n_groups = None; allowed: 1"),
        ({"use_bias": True}, "use_bias = True; allowed: False"),
        ({"use_conv_bias": False}, "use_conv_bias = False; allowed: True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; allowed: 'silu' or 'swish'"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit = [0.001, 0.1]; allowed: [0.0, Infinity]"),
        ({"time_step_limit": [0.0, {"__float__": "x"}]}, "time_step_limit = [0.0, {'__float__': 'x'}]; allowed: "),
        ({"num_heads": 3}, "num_heads = 3 with head_dim = 8; allowed: heads that make up expand · hidden_size = 32"),
        ({"quantization_config": {"bits": 4}}, "quantization_config; allowed: None"),
        ({"conv_kernel": 1}, "conv_kernel = 1; allowed: greater than or equal to 2"),
    ],
)
def test_so_it_is_in_the_other_layout(change, expected, tmp_path):
    assert refused_config({**MODEL.config.to_dict(), **change}, tmp_path).startswith(expected)


def test_a_missing_number_of_groups_is_the_sources_default_of_eight(tmp_path):
    tree = MODEL.config.to_dict()
    del tree["n_groups"]
    assert refused_config(tree, tmp_path).startswith("n_groups = 8; allowed: 1")


@pytest.mark.parametrize("limit", [[0.0, math.inf], [0, {"__float__": "Infinity"}]])
def test_no_limit_of_the_time_step_is_understood_in_all_its_spellings(limit, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MODEL.config.to_dict() | {"time_step_limit": limit}))
    assert read_layout(file).backbone.d_model == 16


def test_another_file_altogether_is_named(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_layout(file)
    for text, expected in {
        '{"d_model": 16': "not a whole JSON file",
        "[1]": "holds a list; allowed: an object",
        '{"a": 1}': "neither model_type nor d_model, but 1 other keys; allowed: the config.json of",
        '{"format": 1, "crsm_version": "0"}': "neither model_type nor d_model, but this project's own checkpoint",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=expected):
            read_layout(file)


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("backbone.layers.1.mixer.A_log"), "'backbone.layers.1.mixer.A_log' is missing; allowed: of"),
        (lambda w: w.pop("backbone.embedding.weight"), "'backbone.embedding.weight' is missing; allowed: of shape"),
        (
            lambda w: w.update({"backbone.layers.0.mixer.D": torch.ones(3)}),
            "'backbone.layers.0.mixer.D' has shape (3,); allowed: (4,), by config.json",
        ),
        (
            lambda w: w.update({"backbone.layers.3.mixer.D": torch.ones(4)}),
            "'backbone.layers.3.mixer.D' of shape (4,) is left over; allowed: those of a Mamba-2 of 3 layers",
        ),
        (
            lambda w: w["backbone.norm_f.weight"].fill_(math.nan),
            "'backbone.norm_f.weight' holds NaN or infinity; allowed: finite numbers",
        ),
        (
            lambda w: w.update({"backbone.norm_f.weight": torch.ones(16, dtype=torch.int8)}),
            "'backbone.norm_f.weight' is of torch.int8; allowed: floating-point numbers",
        ),
        (
            lambda w: w["lm_head.weight"].add_(1),
            "'lm_head.weight' differs from the embedding; allowed: the same numbers",
        ),
        (lambda w: w.update({"lm_head.weight": torch.ones(3, 3)}), "'lm_head.weight' has shape (3, 3); allowed: (304,"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(change, expected, tmp_path):
    weights = mamba_ssm_weights(MODEL)
    change(weights)
    assert f"tensor {expected}" in refusal(save_mamba_ssm(MODEL, tmp_path / "source", weights))


def test_an_untied_model_needs_its_head(tmp_path):
    model = random_model(tie_word_embeddings=False)
    weights = mamba_ssm_weights(model)
    del weights["lm_head.weight"]
    assert "tensor 'lm_head.weight' is missing" in refusal(save_mamba_ssm(model, tmp_path / "source", weights))


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_files_that_are_cut_short_are_refused(mamba_ssm, hugging_face, kept):
    for folder, name in ((mamba_ssm, "pytorch_model.bin"), (hugging_face, "model.safetensors")):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:kept])
        message = refusal(folder)
        assert name in message and ("not a whole" in message or "cut short" in message), message


class Malice:
    def __reduce__(self):
        return os.system, ("touch run_by_pickle",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(mamba_ssm, zipped, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    weights = mamba_ssm_weights(MODEL) | {"backbone.norm_f.weight": Malice()}
    torch.save(weights, mamba_ssm / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert "a pickle of more than tensors" in refusal(mamba_ssm)
    assert not (tmp_path / "run_by_pickle").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(3)], "holds a list; allowed: tensors by name"),
        ({"model": {"backbone.norm_f.weight": torch.ones(3)}}, "entry 'model' is a dict; allowed: tensors by name"),
    ],
)
def test_a_file_of_torch_that_holds_something_else_is_refused(mamba_ssm, content, expected):
    torch.save(content, mamba_ssm / "pytorch_model.bin")
    assert expected in refusal(mamba_ssm)


def test_a_folder_without_weights_is_refused(mamba_ssm):
    (mamba_ssm / "pytorch_model.bin").unlink()
    assert "no weights; allowed: model.safetensors, model.safetensors.index.json, pytorch_model.bin" in refusal(
        mamba_ssm
    )


def test_an_index_and_its_files_have_to_agree(tmp_path):
    folder = save_hugging_face(MODEL, tmp_path / "source", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    name, file = next(iter(tree["weight_map"].items()))

    def with_map(change):
        index.write_text(json.dumps({"weight_map": tree["weight_map"] | change}))
        return refusal(folder)

    assert "tensor 'no.such' is missing; model.safetensors.index.json names it" in with_map({"no.such": file})
    assert "missing; the index names it" in with_map({"no.such": "model-9.safetensors"})
    assert "weight_map.no.such = '../model.safetensors'; allowed: a file of weights" in with_map(
        {"no.such": "../model.safetensors"}
    )
    index.write_text(json.dumps({"weight_map": {k: v for k, v in tree["weight_map"].items() if k != name}}))
    assert f"tensor {name!r} is not one that model.safetensors.index.json places there" in refusal(folder)
    index.write_text("{}")
    assert "weight_map = None; allowed: the file of each tensor" in refusal(folder)
    index.write_text(json.dumps(tree))
    moved = load_file(folder / file)
    other = next(place for place in tree["weight_map"].values() if place != file)
    save_file(load_file(folder / other) | {name: moved[name]}, folder / other)
    assert f"{other}: tensor {name!r} is not one that" in refusal(folder)
