"""Training that loses nodes, with and without a notice, ends where undisturbed training ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crsm.config import load_config
from jobs import chaos_training
from jobs.faults.nodes import ROLL_OUT, WORKER
from jobs.runs import Outcome
from jobs.storage import StoragePath

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "chaos_training.yaml"


def test_a_node_is_lost_in_stage_1_once_there_are_states_and_one_in_stage_3(tmp_path):
    settings = load_config(CONFIG)
    losses = chaos_training.plan_losses(settings, ["stage_1", "stage_3"], str(tmp_path), notice=6, absence=2)
    assert [(loss.on, loss.notice, loss.absence) for loss in losses] == [(WORKER, 6, 2), (ROLL_OUT, 0, 2)]
    known = tmp_path / "chaos-disturbed" / "stage_1" / "checkpoint_manager_snapshot.json"
    known.parent.mkdir(parents=True)
    (unannounced,) = chaos_training.plan_losses(settings, ["stage_1"], str(tmp_path), notice=0, absence=2)
    for states, with_notice, without in ((0, False, False), (1, True, False), (2, True, True)):
        known.write_text(json.dumps({"checkpoint_results": [{}] * states}))
        assert (losses[0].when(), unannounced.when()) == (with_notice, without)
    assert chaos_training.plan_losses(settings, ["stage_2"], str(tmp_path), 0, 0) == []


def test_stages_in_which_no_node_can_be_lost_are_refused(tmp_path):
    with pytest.raises(ValueError, match="stages = stage_2,stage_4; allowed: stage_1, stage_3 or both"):
        chaos_training.compare(load_config(CONFIG), ["stage_2", "stage_4"], str(tmp_path), 2, 2, 0, 0)


def test_losses_are_compared_stage_by_stage(tmp_path):
    one, other = (
        Outcome("stage_1", StoragePath.of(tmp_path), {"loss": loss, "seconds": 3.0}, False) for loss in (1.5, 1.25)
    )
    row = chaos_training.compared(one, other)
    assert (row["stage"], row["undisturbed"], row["disturbed"], row["difference"]) == ("stage_1", 1.5, 1.25, 0.25)


def chaos(folder, *args):
    """The job, and what the workers of the disturbed stage 1 said."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    environment["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    environment.pop("RAY_ADDRESS", None)
    command = ["-m", "jobs.chaos_training", "--config", CONFIG, "--storage", folder, "--json", folder / "out.json"]
    done = subprocess.run(
        [sys.executable, *map(str, (*command, *args))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = (folder / "chaos-disturbed" / "stage_1" / "progress.jsonl").read_text().splitlines()
    said = "\n".join(message["say"] for message in map(json.loads, lines) if "say" in message)
    return json.loads((folder / "out.json").read_text())["results"], said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pipeline_that_loses_a_node_in_stage_1_and_one_in_stage_3_ends_with_the_same_losses(tmp_path):
    results, said = chaos(tmp_path)
    assert [(loss["with"], loss["actors"] > 0) for loss in results["lost"]] == [(WORKER, True), (ROLL_OUT, True)]
    assert [row["stage"] for row in results["stages"]] == ["stage_1", "stage_2", "stage_3", "stage_4"]
    assert results["largest_difference"] <= 1e-3
    assert re.search(r"worker \d failed", said) and re.search(r"goes on from step \d+ with 2 workers", said)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_elastic_workers_save_on_notice_become_fewer_and_more_and_end_with_the_same_loss(tmp_path):
    changes = ["train.min_workers=1", "train.resize_seconds=3", "stage_1.batch=64", "stage_1.steps=4000"]
    changes += ["stage_1.checkpoint_every=600", "stage_1.evaluate_every=4000"]
    options = [part for change in changes for part in ("--set", change)]
    results, said = chaos(tmp_path, "--stages", "1", "--cpus", "1", "--notice", "6", *options)
    assert results["largest_difference"] <= 1e-3
    worlds = re.findall(r"^(?:starts training|goes on from step \d+)(?: with (\d) workers)?$", said, re.M)
    assert (worlds[0], worlds[1], worlds[-1]) == ("2", "", "2"), said
    saved = int(re.search(r"saved step (\d+): a node is about to go", said)[1])
    assert int(re.search(r"goes on from step (\d+)", said)[1]) >= saved
    assert "failed" not in said  # a preemption is no failure
