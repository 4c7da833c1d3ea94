"""Checkpoints: what was saved comes back bit for bit, and nothing else is ever taken for a checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import crsm.model
from crsm.config import Config
from crsm.data import Tokenizer
from crsm.fusion import Fusion
from crsm.latent_dynamics import ExactDynamics
from crsm.model import (
    PARTS,
    Checkpoint,
    build_model,
    load_checkpoint,
    load_weights,
    resolve_checkpoint,
    save_checkpoint,
)
from tests.fixtures import PROMPT, assert_same_state, tiny_checkpoint, tiny_config, tiny_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tiny_checkpoint(), tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


# Round trip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_checkpoint_comes_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    original = dataclasses.replace(
        tiny_checkpoint(tiny_config(tied=tied)), trust_horizon=5, model_version=7, report={"stage_1": {"loss": 0.25}}
    )
    original.model.fusion.use_last_layer()
    save_checkpoint(original, tmp_path / "deep" / "model")
    loaded = load_checkpoint(tmp_path / "deep" / "model")
    theirs = loaded.model.state_dict()
    for name, tensor in original.model.state_dict().items():
        assert torch.equal(theirs[name], tensor) and theirs[name].dtype == tensor.dtype, name
    assert (loaded.trust_horizon, loaded.model_version, loaded.report) == (5, 7, {"stage_1": {"loss": 0.25}})
    assert loaded.config == original.config and not loaded.model.training
    assert loaded.tokenizer.to_json() == original.tokenizer.to_json()
    assert (loaded.model.lm_head.weight is loaded.model.backbone.embedding.weight) is tied
    prompt_BT = torch.tensor([PROMPT])
    (logits, hidden, state), (logits_2, hidden_2, state_2) = (
        m.prefill(prompt_BT) for m in (original.model, loaded.model)
    )
    assert torch.equal(logits, logits_2) and torch.equal(hidden, hidden_2)
    assert_same_state(state, state_2)
    assert sorted(os.listdir(tmp_path / "deep")) == ["model"]
    assert sorted(os.listdir(tmp_path / "deep" / "model")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_matrices_saved_in_bf16_come_back_rounded_and_vectors_as_they_were(tmp_path: Path) -> None:
    model = tiny_checkpoint().model
    save_checkpoint(tiny_checkpoint(), tmp_path / "half", torch.bfloat16)
    kept = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values() if tensor.dim() > 1} == {torch.bfloat16}
    loaded = load_checkpoint(tmp_path / "half").model.state_dict()
    for name, tensor in model.state_dict().items():
        want = tensor.bfloat16().float() if tensor.dim() > 1 else tensor
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], want), name


def test_the_hash_of_the_weights_tells_them_apart(tmp_path: Path) -> None:
    hashes = []
    for index, seed in enumerate((1, 1, 2)):
        save_checkpoint(tiny_checkpoint(seed=seed), tmp_path / str(index))
        hashes.append(load_checkpoint(tmp_path / str(index)).weights_hash)
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 16


def test_saving_over_a_checkpoint_replaces_it(saved: Path) -> None:
    other = tiny_checkpoint(seed=1)
    save_checkpoint(other, saved)
    assert torch.equal(load_checkpoint(saved).model.lm_head.weight, other.model.lm_head.weight)
    assert os.listdir(saved.parent) == [saved.name]


def test_the_gates_calibration_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    for calibrated in (True, False):
        save_checkpoint(tiny_checkpoint(calibrated=calibrated), tmp_path / "model")
        assert bool(load_checkpoint(tmp_path / "model").model.gate.calibrated) is calibrated


def test_a_pickled_model_says_the_same() -> None:
    """How a model may reach another process."""
    model = tiny_checkpoint().model
    twin = pickle.loads(pickle.dumps(model))
    tokens = torch.tensor([PROMPT])
    assert torch.equal(model.prefill(tokens)[0], twin.prefill(tokens)[0])


# A save that fails ----------------------------------------------------------------------------------------------------


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["save_file", "tokenizer", "config", "move"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_save_that_fails_leaves_what_was_there_and_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, exists: bool
) -> None:
    old, path = tiny_checkpoint(seed=1), tmp_path / "model"
    if exists:
        save_checkpoint(old, path)
    rename = os.rename

    def rename_but_not_into_place(source: Path, target: Path) -> None:
        if Path(target) == path and Path(source).name != path.name:
            full_disk()
        rename(source, target)

    with monkeypatch.context() as patch:
        match where:
            case "save_file":
                patch.setattr(crsm.model, "save_file", full_disk)
            case "tokenizer":
                patch.setattr(Tokenizer, "save", full_disk)
            case "config":
                patch.setattr(json, "dump", full_disk)
            case "move":
                patch.setattr(os, "rename", rename_but_not_into_place)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tiny_checkpoint(seed=2), path)
    assert os.listdir(tmp_path) == (["model"] if exists else [])
    if exists:
        assert torch.equal(load_checkpoint(path).model.lm_head.weight, old.model.lm_head.weight)


def test_an_interrupt_while_saving_leaves_no_partial_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(crsm.model, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tiny_checkpoint(seed=2), saved)
    assert os.listdir(saved.parent) == [saved.name]


# Damaged checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_refused_with_both_sizes(saved: Path, name: str) -> None:
    whole = (saved / name).stat().st_size
    with open(saved / name, "r+b") as file:
        file.truncate(whole - 7)
    with pytest.raises(ValueError, match=f"{name}: {whole - 7} bytes; the checkpoint names {whole}"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_altered_file_of_the_same_size_is_refused_with_both_hashes(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[-3] ^= 1
    (saved / name).write_bytes(content)
    want = json.loads((saved / "config.json").read_text())["files"][name]["sha256"]
    with pytest.raises(ValueError, match=f"{name}: sha256 .{{16}}…; the checkpoint names {want[:16]}"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_refused_by_name(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing; the checkpoint names it"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format=9), "format = 9; allowed: 1"),
        (lambda tree: tree.pop("format"), "format = None; allowed: 1"),
        (lambda tree: tree.pop("report"), "key 'report' is missing"),
        (lambda tree: tree["files"].pop("model.safetensors"), "files.model.safetensors is missing"),
        (lambda tree: tree["config"].update(heat=1), "unknown key 'heat'"),
        (lambda tree: tree["config"]["model"]["backbone"].update(vocab_size=30), "vocab_size = 30; allowed: .*31"),
        (lambda tree: tree["config"]["model"]["backbone"].update(d_state=4), r"in_proj.weight' has shape .*\(84, 16\)"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_with_both_values(
    saved: Path,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    edit_json(saved / "config.json", change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


def test_a_description_cut_short_or_of_another_kind_is_refused(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    for broken in (text[:-20], "[1]", "\x00"):
        (saved / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"config\.json: "):
            load_checkpoint(saved)


def test_the_tokenizer_of_another_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    other = Tokenizer.closed(["yes", "no", "|"])
    other.save(saved / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json: \d+ bytes; the checkpoint names \d+"):
        load_checkpoint(saved)


def test_a_config_with_another_model_is_refused_with_both_values(saved: Path) -> None:
    asked = tiny_config(n_layer=3)
    with pytest.raises(ValueError, match=r"model\.backbone\.n_layer = 2; the config asks 3"):
        load_checkpoint(saved, config=asked)
    longer = tiny_config().model_copy(update={"name": "other", "seed": 9})
    assert load_checkpoint(saved, config=longer).config.name == "tiny"


def test_a_foreign_weights_file_is_refused_naming_the_tensor(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    model = tiny_checkpoint(seed=1).model
    name = "backbone.layers.1.mixer.A_log"

    def load(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "foreign.safetensors")
        load_weights(model, tmp_path / "foreign.safetensors")

    with pytest.raises(ValueError, match=rf"tensor '{name}' is missing; the model needs it with shape \(4,\)"):
        load({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"tensor '{name}' has shape \(5,\); the model has \(4,\)"):
        load(tensors | {name: torch.zeros(5)})
    with pytest.raises(ValueError, match=r"tensor 'extra' is not one of the model's"):
        load(tensors | {"extra": torch.zeros(1)})
    (tmp_path / "foreign.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(model, tmp_path / "foreign.safetensors")
    load(tensors)
    assert torch.equal(model.lm_head.weight, tiny_checkpoint().model.lm_head.weight)


def test_an_unknown_name_lists_the_shipped_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    monkeypatch.setattr(crsm.model, "ASSETS", saved.parent)
    with pytest.raises(ValueError, match=r"checkpoint = 'mode': no folder .* or one of model$"):
        resolve_checkpoint("mode")
    assert resolve_checkpoint("model") == saved == resolve_checkpoint(saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        load_checkpoint(tmp_path / "empty")


# The parts together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_of_the_parts_add_up(tied: bool) -> None:
    model = tiny_checkpoint(tiny_config(tied=tied)).model
    counts = model.num_parameters()
    assert tuple(counts) == PARTS
    assert sum(counts.values()) == sum(p.numel() for p in set(model.parameters()))
    assert counts["lm_head"] == (0 if tied else 31 * 16)
    assert counts["fusion"] == 2 and counts["critic"] == 2 * 16 + 2 + 2 and counts["gate"] == 0


def test_a_model_takes_the_vocabulary_of_its_tokenizer() -> None:
    config = tiny_config()
    assert build_model(config, tiny_tokenizer()).config.model.backbone.vocab_size == 31
    sizes = config.model.backbone.model_copy(update={"vocab_size": 30})
    other: Config = config.model_copy(update={"model": config.model.model_copy(update={"backbone": sizes})})
    with pytest.raises(ValueError, match=r"vocab_size = 30; allowed: .*31"):
        build_model(other, tiny_tokenizer())


def test_logits_read_the_norm_of_the_mixture() -> None:
    checkpoint: Checkpoint = tiny_checkpoint()
    model = checkpoint.model
    hidden = model.backbone(torch.tensor([PROMPT]))[0]
    fusion: Fusion = model.fusion
    mixed = (hidden * fusion.weights_L[:, None]).sum(dim=2)
    rms = mixed.pow(2).mean(dim=-1, keepdim=True).add(1e-5).sqrt()
    want = (mixed / rms * model.backbone.norm_f.weight) @ model.lm_head.weight.T
    np.testing.assert_allclose(model.logits(hidden), want, atol=1e-5)


def test_a_prompt_in_two_pieces_leaves_the_same_state() -> None:
    model = tiny_checkpoint().model
    logits, hidden, _ = model.prefill(torch.tensor([PROMPT]))
    _, _, state = model.prefill(torch.tensor([PROMPT[:4]]))
    resumed_logits, resumed_hidden, _ = model.prefill(torch.tensor([PROMPT[4:]]), state)
    np.testing.assert_allclose(resumed_logits, logits, atol=1e-5)
    np.testing.assert_allclose(resumed_hidden, hidden, atol=1e-5)


def test_a_part_that_is_about_to_be_trained_may_be_made_anew_with_other_settings(saved: Path) -> None:
    before = load_checkpoint(saved)
    writer = before.config.model.writer
    wider = writer.model_copy(update={"rank": writer.rank + 1})
    asked = before.config.model_copy(update={"model": before.config.model.model_copy(update={"writer": wider})})
    with pytest.raises(ValueError, match=r"writer\.rank"):
        load_checkpoint(saved, config=asked)
    with pytest.raises(ValueError, match=r"writer\.rank"):
        load_checkpoint(saved, config=asked, renewable=("world_model",))
    after = load_checkpoint(saved, config=asked, renewable=("writer",))
    assert after.model.writer.u.out_features == before.model.writer.u.out_features // writer.rank * wider.rank
    renewed = ("writer.", "gate.")
    kept = {name: tensor for name, tensor in before.model.state_dict().items() if not name.startswith(renewed)}
    assert all(torch.equal(after.model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_what_was_measured_of_a_part_does_not_hold_for_a_new_one(tmp_path: Path) -> None:
    save_checkpoint(dataclasses.replace(tiny_checkpoint(), trust_horizon=5), tmp_path / "measured")
    for part in ("world_model", "writer"):
        model = tiny_config().model
        other = model.model_copy(update={part: getattr(model, part).model_copy(update={"width": 20})})
        asked = tiny_config().model_copy(update={"model": other})
        renewed = load_checkpoint(tmp_path / "measured", config=asked, renewable=("world_model", "writer"))
        assert not bool(renewed.model.gate.calibrated)
        assert renewed.trust_horizon == (None if part == "world_model" else 5)
    same = load_checkpoint(tmp_path / "measured", config=tiny_config(), renewable=("world_model", "writer"))
    assert bool(same.model.gate.calibrated) and same.trust_horizon == 5


def test_the_choice_of_what_imagines_is_no_matter_of_weights(saved: Path) -> None:
    before, asked = load_checkpoint(saved), tiny_config(kind="exact")
    after = load_checkpoint(saved, config=asked, renewable=("world_model",))
    assert isinstance(after.model.planning_model(), ExactDynamics) and after.trust_horizon == before.trust_horizon
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor), name


def test_a_renewable_part_with_the_same_settings_keeps_its_weights(saved: Path) -> None:
    before, after = load_checkpoint(saved), load_checkpoint(saved, config=tiny_config(), renewable=("writer",))
    assert torch.equal(before.model.writer.u.weight, after.model.writer.u.weight)
