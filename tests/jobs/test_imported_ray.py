"""crsm import and then the whole pipeline on a local Ray: a System 2 for weights from elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import load_checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from tests.importing.sources import random_model, save_mamba_ssm

pytest.importorskip("transformers")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def call(*args, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def run(tmp_path):
    """An imported tiny model, and settings that train it for a few steps."""
    save_mamba_ssm(random_model(tie_word_embeddings=True), tmp_path / "source")
    call("crsm.cli", "import", "source", "imported", cwd=tmp_path)
    sizes = load_checkpoint(tmp_path / "imported").config.model.backbone.model_dump(mode="json")
    stage = {"steps": 3, "batch": 4, "evaluate_problems": 6, "log_every": 1}
    tree = {
        "name": "added",
        "model": {"backbone": sizes, "world_model": {"width": 24, "decoder_width": 32}, "writer": {"width": 20}},
        "tokenizer": {"kind": "bpe", "vocab_size": 303},
        "tasks": [
            {"name": "arithmetic", "style": "marks", "min_operations": 1, "max_operations": 2},
            {"name": "gsm8k", "path": "sample", "max_tokens": 1024},
        ],
        "search": {"simulations": 4},
        "sampling": {"max_tokens": 48},
        "train": {"threads": 1},
        "stage_1": {**stage, "bootstrap_steps": 2, "bootstrap_problems": 48},
        "stage_2": {**stage, "unroll": 3, "roots": 2, "attempts": 2},
        "stage_3": {**stage, "problems": 8},
        "stage_4": {**stage, "batch": 8, "calibration_problems": 8},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def said(checkpoint, deliberation=None):
    planners = None if deliberation is None else InlinePlanners(Deliberator.from_checkpoint(checkpoint), 8)
    engine = Engine(checkpoint, planners, EngineConfig(clock="virtual"))
    prompt = tuple(checkpoint.tokenizer.encode("Question: What is 3 + 4?\nAnswer:"))
    sampling = SamplingConfig(max_tokens=24, ignore_eos=True)
    (tokens,) = engine.generate_all([GenerationRequest(prompt, sampling, deliberation or DeliberationConfig())])
    return tokens, sum(engine.metrics.injections_per_layer.values())


def test_the_pipeline_adds_a_system_2_to_imported_weights(run):
    args = ("jobs.pipeline", "--config", "tiny.yaml", "--checkpoint", "imported", "--json", "-")
    done = call(*args, cwd=run)
    stages = json.loads(done.stdout)["results"]["stages"]
    assert list(stages) == ["import", "stage_1", "stage_2", "stage_3", "stage_4"]
    assert (run / "runs" / "added" / "stage_1.bootstrap" / "attempts.jsonl").read_text().count("\n") > 0
    assert stages["stage_4"]["gates"]["open"] is False and "GATES STAY SHUT" in done.stderr

    folder = run / "runs" / "added" / "stage_4" / "checkpoint"
    checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    assert (checkpoint.config.model.world_model.width, checkpoint.config.model.writer.width) == (24, 20)
    assert model.fusion.weights_L.tolist() == [0.0, 0.0, 1.0]
    alone, _ = said(checkpoint)
    assert said(checkpoint, DeliberationConfig(lag=0)) == (alone, 0)
    model.gate.calibrate(torch.zeros(3), torch.full((3,), 2.0), -10.0)
    with torch.no_grad():  # as a trained writer does, it writes much
        for read_out in (model.writer.u, model.writer.b):
            read_out.bias.normal_(std=3.0)
    assert said(checkpoint, DeliberationConfig(lag=0, injection_rate=0.0))[0] == alone
    steered, written = said(checkpoint, DeliberationConfig(lag=0, injection_rate=0.9))
    assert written > 0 and steered != alone

    ask = ("crsm.cli", "generate", "Question: What is 3 + 4?", "--checkpoint", folder, "--max-tokens", 12)
    assert call(*ask, cwd=run).stdout == call(*ask, "--planners", 0, cwd=run).stdout


def test_a_frozen_backbone_makes_its_own_attempts_and_stays_bit_for_bit_what_it_was(run):
    frozen = ("--set", "stage_1.freeze_backbone=true", "--set", "stage_1.bootstrap_steps=0", "--name", "frozen")
    call("jobs.pipeline", "--config", "tiny.yaml", "--checkpoint", "imported", *frozen, cwd=run)
    before = load_checkpoint(run / "imported").model.state_dict()
    after = load_checkpoint(run / "runs" / "frozen" / "stage_4" / "checkpoint").model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after.get(name, before[name]))}
    same = {name for name in before if name.startswith(("backbone.", "lm_head.", "fusion."))}
    assert all(torch.equal(before[name], after[name]) for name in same) and len(same) > 25
    assert "critic" in changed
    attempts = (run / "runs" / "frozen" / "stage_1.bootstrap" / "attempts.jsonl").read_text().splitlines()
    assert attempts and all(json.loads(line)["correct"] is False for line in attempts)  # nobody counts by chance
    assert not (run / "runs" / "frozen" / "stage_1.bootstrap" / "checkpoint").exists()
