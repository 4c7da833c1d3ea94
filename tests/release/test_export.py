"""``crsm export``: what is written is a checkpoint of ours and a model of transformers, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import crsm.release.export
from crsm.cli import app
from crsm.model import Checkpoint, load_checkpoint, save_checkpoint
from crsm.release.card import model_card
from crsm.release.export import export_checkpoint
from crsm.release.mamba2 import export_mamba2
from jobs.command import invoke
from tests.fixtures import text_checkpoint, tiny_checkpoint, tiny_config

ROOT = Path(__file__).parents[2]
FILES = {
    "README.md",
    "config.json",
    "configuration_crsm.py",
    "crsm.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_crsm.py",
    "system_2.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reported(checkpoint: Checkpoint) -> Checkpoint:
    """With figures that occur nowhere else."""
    label = checkpoint.config.tasks[0].label
    report = {
        "stage_1": {
            "steps": 4321,
            "loss": 0.123456,
            "seconds": 77.4,
            "commit": "abcdef0123456789",
            f"valid/perplexity/{label}": 1.2345,
            f"valid/value_auc/{label}/layer_0": 0.9111,
            f"valid/value_auc/{label}/layer_1": 0.8222,
        },
        "stage_2": {"fidelity": {label: [{"step": 1.0, "policy_kl": 0.3333, "value_error": 0.0444, "cosine": None}]}},
        "stage_3": {"judgment": {label: {"branch_accuracy": 0.9556, "ece": 0.00001}}},
        "stage_4": {
            "writer": {f"valid/follow_rate/{label}": 0.9777},
            "gates": {"plans": 987.0, "system1_right": 0.4666, "plan_right": 0.6888, "written": 0.5999},
        },
    }
    return dataclasses.replace(checkpoint, report=report, trust_horizon=5)


# A checkpoint ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_an_exported_folder_is_the_same_checkpoint(tmp_path: Path, tied: bool, shard: str) -> None:
    save_checkpoint(reported(tiny_checkpoint(tiny_config(tied=tied))), tmp_path / "model")
    original = load_checkpoint(tmp_path / "model")
    files = export_checkpoint(original, tmp_path / "exported", max_shard_size=shard)
    assert files == {path.name: path.stat().st_size for path in (tmp_path / "exported").iterdir()}
    if shard == "5GB":
        assert set(files) == FILES
    else:
        for part in ("model", "system_2"):
            assert f"{part}.safetensors" not in files and f"{part}.safetensors.index.json" in files
            assert len([name for name in files if name.startswith(f"{part}-0") and name.endswith(".safetensors")]) > 1
    loaded = load_checkpoint(tmp_path / "exported")
    theirs = loaded.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in original.model.state_dict().items())
    for field in ("trust_horizon", "model_version", "report", "weights_hash", "config"):
        assert getattr(loaded, field) == getattr(original, field), field
    assert loaded.tokenizer.to_json() == original.tokenizer.to_json()
    assert os.listdir(tmp_path).sort() == ["exported", "model"].sort()


def test_every_tensor_is_in_one_of_the_two_files_and_system_1_needs_only_its_own(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    export_checkpoint(checkpoint, tmp_path / "exported")
    system_1, system_2 = (load_file(tmp_path / "exported" / f"{name}.safetensors") for name in ("model", "system_2"))
    assert not set(system_1) & set(system_2)
    assert set(system_1) | set(system_2) == set(checkpoint.model.state_dict())
    assert {name.split(".")[0] for name in system_1} == {"backbone", "lm_head", "fusion"}


def test_bf16_rounds_matrices_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    export_checkpoint(checkpoint, tmp_path / "exported", dtype="bf16")
    loaded = load_checkpoint(tmp_path / "exported")
    theirs = loaded.model.state_dict()
    for name, tensor in checkpoint.model.state_dict().items():
        want = tensor.bfloat16() if tensor.ndim >= 2 else tensor
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], want.to(tensor.dtype)), name
    assert load_file(tmp_path / "exported" / "model.safetensors")["backbone.norm_f.weight"].dtype == torch.float32
    assert loaded.weights_hash not in ("", checkpoint.weights_hash), "other weights have another name"


@pytest.mark.parametrize("name", ["system_2.safetensors", "tokenizer.json"])
def test_a_file_of_an_export_that_is_cut_short_is_refused_with_both_sizes(tmp_path: Path, name: str) -> None:
    export_checkpoint(tiny_checkpoint(), tmp_path / "exported")
    whole = (tmp_path / "exported" / name).stat().st_size
    with open(tmp_path / "exported" / name, "r+b") as file:
        file.truncate(whole - 3)
    with pytest.raises(ValueError, match=f"{name}: {whole - 3} bytes; the checkpoint names {whole}"):
        load_checkpoint(tmp_path / "exported")


def test_a_description_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    export_checkpoint(tiny_checkpoint(), tmp_path / "exported")
    description = tmp_path / "exported" / "crsm.json"
    files = json.loads(description.read_text())["files"]
    edit_json(description, files=files | {"../x.safetensors": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(ValueError, match=r"files\.\.\./x\.safetensors lies elsewhere; allowed: files of the folder"):
        load_checkpoint(tmp_path / "exported")


# Whole or not at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [export_checkpoint, export_mamba2])
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_left_as_it_is(tmp_path: Path, export: Any, kind: str) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.model.fusion.use_last_layer()
    place = tmp_path / "place"
    match kind:
        case "folder":
            place.mkdir()
        case "file":
            place.write_text("mine")
        case _:
            place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"place exists; allowed: a folder that does not exist yet"):
        export(checkpoint, place)
    assert os.listdir(tmp_path) == ["place"]
    assert kind != "folder" or os.listdir(place) == []
    assert kind != "file" or place.read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(crsm.release.export, "model_card", fail)
    with pytest.raises(type(error)):
        export_checkpoint(tiny_checkpoint(), tmp_path / "deep" / "exported")
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{model}"], "model exists; allowed: a folder that does not exist yet"),
        (
            ["missing", "{new}"],
            "checkpoint = 'missing': no folder with a config.json; allowed: such a folder",
        ),
        (["{broken}", "{new}"], "model.safetensors: 9 bytes; the checkpoint names"),
        (["{model}", "{new}", "--layout", "mamba2"], "fusion has 0.119 of its weight on layers before the last one"),
        (["{model}", "{new}", "--results", "{model}/none.json"], "none.json cannot be read: No such file or directory"),
        (["{model}", "{new}", "--results", "{model}/config.json"], "results are of job None; allowed: those of bench"),
        (
            ["{model}", "{new}", "--data", "{model}/config.json"],
            "no report of prepared data; allowed: what jobs.",
        ),
        (["{model}", "{new}", "--dtype", "int4"], "'int4'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for name in ("model", "broken"):
        save_checkpoint(tiny_checkpoint(), tmp_path / name)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"truncated")
    before = sorted(path for path in tmp_path.rglob("*"))
    places = {name: str(tmp_path / name) for name in ("model", "broken", "new")}
    assert invoke(app, ["export", *(argument.format(**places) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and message in captured.err and captured.out == ""
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_the_command_writes_the_folder_and_prints_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tiny_checkpoint(), tmp_path / "model")
    assert invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "new"), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


# The card -------------------------------------------------------------------------------------------------------------


def test_the_cards_figures_are_those_of_the_report() -> None:
    card = model_card(reported(tiny_checkpoint()), dtype="fp32", licence="mit")
    for figure in (
        "4,321",
        "0.123",
        "77",
        "abcdef012345 ",
        "1.234",
        "0.822",
        "0.333",
        "0.044",
        "0.956",
        "1.0e-05",
        "0.978",
        "987",
        "0.467",
        "0.689",
        "0.600",
        "trusted for 5 imagined steps",
        "license: mit",
    ):
        assert figure in card, figure


def test_the_card_of_a_checkpoint_without_report_says_so() -> None:
    card = model_card(dataclasses.replace(tiny_checkpoint(calibrated=False), report={}), dtype="bf16", licence="mit")
    for statement in (
        "The checkpoint carries no report of a training.",
        "The gates are shut (never calibrated)",
        "How far the world model can be trusted was never measured.",
        "here the matrices are bf16",
        "No comparison of System 1 with System 2 was handed in at the export.",
    ):
        assert statement in card
    assert "nan" not in card.lower().split()


def test_the_card_names_the_texts_licences_and_who_is_to_be_named() -> None:
    data = {
        "name": "mix",
        "sources": [
            {
                "name": "encyclopedia",
                "licence": "CC BY-SA 4.0",
                "attribution": "its writers",
                "splits": {"train": {"documents": 1234, "tokens": 56789}},
            }
        ],
        "evaluation_sets": [],
    }
    card = model_card(text_checkpoint(), dtype="fp32", licence="mit", data_report=data)
    assert "| encyclopedia | CC BY-SA 4.0 | train | 1,234 | 56,789 |" in card and "* encyclopedia: its writers" in card
    assert "compared with no evaluation set" in card


def test_a_comparison_enters_the_card_if_it_is_of_these_weights(tmp_path: Path) -> None:
    record = json.loads((ROOT / "docs" / "paper" / "results" / "path_star.json").read_text())
    checkpoint = dataclasses.replace(tiny_checkpoint(), weights_hash=record["results"]["checkpoint"]["weights"])
    export_checkpoint(checkpoint, tmp_path / "exported", results=[record])
    card = (tmp_path / "exported" / "README.md").read_text()
    for run in record["results"]["lags"]:
        row = next(line for line in card.splitlines() if line.startswith(f"| path_star | 500 | {run['lag']} |"))
        assert f"{run['system1']['accuracy']:.3f} (" in row and f"{run['system2']['accuracy']:.3f} (" in row
        assert f"random write {run['controls']['random_write']['accuracy']:.3f}" in row
    other = dataclasses.replace(checkpoint, weights_hash="0" * 16)
    with pytest.raises(ValueError, match=r"results are of weights '901f.*'; allowed: those of '0000"):
        export_checkpoint(other, tmp_path / "other", results=[record])
    assert not (tmp_path / "other").exists()
