"""Runs whose storage is an object store: nothing of them lies on this machine, and they go on from what lies there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("moto", reason="extra dev")

from crsm.model import load_checkpoint
from jobs import runs
from jobs.storage import StoragePath
from tests.jobs.local_object_store import CREDENTIALS, start_object_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STAGES = ["stage_1", "stage_2", "stage_3", "stage_4"]


@pytest.fixture(scope="module")
def store():
    with start_object_store() as store:
        yield store


@pytest.fixture(autouse=True)
def environment(monkeypatch, store, tmp_path):
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": store.endpoint}.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CRSM_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def config_file(tmp_path):
    stage = {"steps": 4, "batch": 8, "evaluate_problems": 8, "log_every": 2, "checkpoint_every": 2}
    tree = {
        "name": "tiny",
        "model": {
            "backbone": {"d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16, "chunk_size": 16},
            "world_model": {"width": 16, "decoder_width": 32},
            "writer": {"width": 16},
        },
        "tasks": [{"name": "path_star", "arms": 2, "length": 3, "labels": 12}],
        "search": {"simulations": 4},
        "sampling": {"max_tokens": 8},
        "train": {"threads": 1},
        "stage_1": stage,
        "stage_2": {**stage, "unroll": 4},
        "stage_3": {**stage, "problems": 8, "actors": 1},
        "stage_4": {**stage, "calibration_problems": 8},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(folder, module, *args):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    (folder / "cwd").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=folder / "cwd",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def test_a_stage_leaves_everything_in_the_bucket_and_is_found_there(config_file, store, tmp_path):
    storage = store.bucket("one-stage") + "/runs"
    args = ("jobs.stage_1_backbone", "--config", config_file, "--storage", storage)
    status, out, err = finish(start(tmp_path, *args, "--json", "-"))
    assert status == 0, err
    stage = runs.run_folder(storage, "tiny") / "stage_1"
    names = [path.name for path in stage.iterdir()]
    assert {"run.json", "checkpoint", "progress.jsonl", "checkpoint_manager_snapshot.json"} <= set(names)
    assert sum(name.startswith("checkpoint_20") for name in names) == 2
    first_line = (stage / "progress.jsonl").read_text().splitlines()[0]
    assert json.loads(first_line) == {"say": "starts training"}
    assert (stage.parent / "tensorboard" / "stage_1").iterdir()
    assert list((tmp_path / "cwd").iterdir()) == []
    results = json.loads(out)["results"]
    assert StoragePath.of(results["checkpoint"]) == stage / "checkpoint" and not results["had_finished"]
    assert load_checkpoint(runs.local_copy(results["checkpoint"])).config.stage_1.steps == 4

    started = time.monotonic()
    status, _, err = finish(start(tmp_path, *args))
    assert status == 0 and "stage_1 had finished" in err
    assert time.monotonic() - started < 30  # no Ray was started
    status, _, err = finish(start(tmp_path, *args, "--set", "stage_1.steps=5"))
    assert status == 2 and err.count("\n") == 1
    assert "stage_1 was made with stage_1.steps = 4; the settings ask 5; allowed: the same settings" in err


@pytest.mark.parametrize(
    ("storage", "line"),
    [
        (
            "s3://no-such-bucket/runs",
            "error: s3://no-such-bucket/runs/tiny/stage_1: the storage cannot be written: no such bucket",
        ),
        (
            "s3://bucket/runs?endpoint_override=http://127.0.0.1:1",
            "error: s3://bucket/runs/tiny/stage_1: the storage cannot be written: no server answers",
        ),
        (
            "s4://bucket/runs",
            "error: storage = 's4://bucket/runs'; allowed: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
        ),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_before_anything_starts(config_file, storage, line, tmp_path):
    status, _, err = finish(start(tmp_path, "jobs.stage_1_backbone", "--config", config_file, "--storage", storage))
    assert (status, err.strip()) == (2, line)


@pytest.mark.slow
def test_a_pipeline_that_is_killed_after_its_first_stage_goes_on_from_the_bucket(config_file, store, tmp_path):
    storage = store.bucket("pipeline")
    args = ("jobs.pipeline", "--config", config_file, "--storage", storage)
    process = start(tmp_path, *args)
    first = runs.run_folder(storage, "tiny") / "stage_1" / "checkpoint"
    try:
        while not (first / runs.MARKER).is_file():
            assert process.poll() is None, finish(process)
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    trained = json.loads((first / runs.MARKER).read_text())

    output = tmp_path / "model"
    status, out, err = finish(start(tmp_path, *args, "--output", output, "--json", "-"))
    assert status == 0, err
    assert "stage_1 had finished" in err and "stage_4 finished" in err
    results = json.loads(out)["results"]
    assert list(results["stages"]) == STAGES
    assert results["stages"]["stage_1"] == trained["report"]["stage_1"]
    run = runs.run_folder(storage, "tiny")
    assert (run / "stage_3" / "rollouts.jsonl").is_file()
    assert [path.name for path in (run / "tensorboard").iterdir()] == STAGES
    assert load_checkpoint(output).model_version == 4
    assert load_checkpoint(runs.local_copy(run / "stage_4" / "checkpoint")).model_version == 4

    status, _, err = finish(start(tmp_path, *args, "--stages", "4", "--fresh"))
    assert status == 0, err
    assert (run / "stage_4.old-1" / "checkpoint" / runs.MARKER).is_file()
