"""Ablations on a local Ray: a smoke sweep, one that is killed half-way and goes on, ASHA."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from crsm.model import save_checkpoint
from jobs.ablation.sweep import TRIALS_FILE, read_records
from tests.fixtures import tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep(tmp_path):
    """Starts a sweep over the tiny checkpoint with some options."""
    save_checkpoint(tiny_checkpoint(), tmp_path / "tiny")
    path = tmp_path / "sweep.yaml"
    tree = {
        "ablation": {
            "name": "tiny",
            "checkpoint": str(tmp_path / "tiny"),
            "space": {"lag": [0, 1, 2], "injection_rate": [0.0, 0.5]},
            "seeds": [1, 2, 3],
            "problems": 8,
            "controls": ["random_write"],
        },
        "sampling": {"max_tokens": 7},
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))

    def start(*options):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "jobs.ablate", "--config", path, "--json", "-", *options]
        return subprocess.Popen(
            [*map(str, command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, json.loads(out)["results"] if out else None, err


def test_a_smoke_sweep_measures_a_two_by_two_corner(sweep, tmp_path):
    status, results, err = finish(sweep("--set", "ablation.smoke=true", "--output", tmp_path / "out"))
    assert status == 0, err
    assert results["trials"] == len(results["table"]) == 4
    assert [(row["lag"], row["injection_rate"]) for row in results["table"]] == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]
    assert results["silence"] == {"points": 2, "problems": 16, "identical": True, "broken": []}
    silent = [row for row in results["table"] if row["injection_rate"] == 0.0]
    assert all(row["identical_to_system1"] and row["accuracy"] == row["system1_accuracy"] for row in silent)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"sweep.json", TRIALS_FILE, *results["files"]}
    assert "Traceback" not in err and "pid=" not in err and "Configuration for experiment" not in err


@pytest.mark.slow
def test_a_sweep_that_is_killed_half_way_goes_on_to_the_same_table_row_for_row(sweep, tmp_path):
    status, whole, err = finish(sweep("--output", tmp_path / "whole"))
    assert status == 0, err
    process = sweep("--output", tmp_path / "out", "--set", "ablation.concurrent=1")
    try:
        deadline = time.monotonic() + 200
        while len(read_records(tmp_path / "out")) < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=60)
    done = read_records(tmp_path / "out")
    assert 5 <= len(done) < 18
    status, resumed, err = finish(sweep("--output", tmp_path / "out", "--resume"))
    assert status == 0, err
    assert resumed["resumed_trials"] == len(done)
    assert resumed["table"] == whole["table"] and len(whole["table"]) == 18
    for name in ("table.csv", "table.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # What is finished is only read again: Ray does not even start.
    status, again, err = finish(
        sweep("--output", tmp_path / "out", "--resume", "--set", "ablation.resources.num_cpus=99")
    )
    assert status == 0, err
    assert again["table"] == whole["table"] and again["resumed_trials"] == 18


@pytest.mark.slow
def test_asha_ends_trials_early_and_their_rows_say_so(sweep, tmp_path):
    options = ("ablation.method=random", "ablation.points=6", "ablation.scheduler=asha", "ablation.rungs=2")
    status, results, err = finish(
        sweep(*(part for option in options for part in ("--set", option)), "--output", tmp_path / "out")
    )
    assert status == 0, err
    assert results["trials"] == 18
    assert {row["problems"] for row in results["table"]} <= {4, 8}
    assert all(row["finished"] == (row["problems"] == 8) for row in results["table"])
    assert any(row["finished"] for row in results["table"])


def test_a_trial_that_asks_for_more_than_there_is_is_refused_at_once(sweep, tmp_path):
    status, results, err = finish(sweep("--set", "ablation.resources.num_gpus=1000", "--output", tmp_path / "out"))
    assert (status, results) == (2, None)
    assert err.startswith("error: ablation.resources: a trial asks 1 CPU and 1000 GPU; the nodes of the cluster have")
    assert err.count("\n") == 1, err
