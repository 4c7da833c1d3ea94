"""Training on a local Ray: all stages end to end, and a run that is killed twice ends with the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from crsm.config import load_config
from crsm.data.tokenizer import build_tokenizer
from crsm.model import build_model, load_checkpoint
from crsm.tasks import build_tasks
from crsm.training.backbone import BackboneStage
from crsm.training.loop import STATE_FILE, LoopState, run_stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path):
    stage = {"steps": 4, "batch": 8, "evaluate_problems": 8, "log_every": 2, "checkpoint_every": 2}
    path = tmp_path / "tiny.yaml"
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
        "train": {"storage_path": str(tmp_path / "runs"), "threads": 1},
        "stage_1": stage,
        "stage_2": {**stage, "unroll": 4},
        "stage_3": {**stage, "problems": 8},
        "stage_4": {**stage, "calibration_problems": 8},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def start(module, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, timeout=400):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def test_all_stages_in_a_row_then_again_at_once(config_file, tmp_path):
    output = tmp_path / "model"
    args = ("--config", config_file, "--output", output, "--json", "-")
    status, out, err = finish(start("jobs.pipeline", *args))
    assert status == 0, err
    results = json.loads(out)["results"]
    assert list(results["stages"]) == ["stage_1", "stage_2", "stage_3", "stage_4"]
    for report in results["stages"].values():
        assert report["steps"] == 4 and report["curve"] and report["seconds"] > 0 and report["commit"]
    assert set(results["seconds"]) == set(results["stages"])
    assert set(results["stages"]["stage_3"]["rounds"][0]["accuracy"]["path_star"]) == {"1", "2"}
    # A judge of four steps is none: the gates stay shut, and that is said.
    assert results["stages"]["stage_3"]["branch_accuracy"] < 0.9
    assert results["stages"]["stage_4"]["gates"]["open"] is False
    assert "THE GATES STAY SHUT" in err and "GATES STAY SHUT: pairwise branch accuracy" in err
    assert "Traceback" not in err and "pid=" not in err  # nothing of Ray's own talk

    checkpoint = load_checkpoint(output)
    assert checkpoint.model_version == 4
    assert checkpoint.trust_horizon == results["stages"]["stage_2"]["trust_horizon"]
    assert checkpoint.config.stage_1.steps == 4
    assert json.loads((output / "report.json").read_text())["results"]["command"].startswith("python -m jobs.pipeline")
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    curves = tmp_path / "runs" / "tiny" / "tensorboard"
    assert {path.name for path in curves.iterdir()} == {"stage_1", "stage_2", "stage_3", "stage_4"}

    started = time.monotonic()
    status, _, err = finish(start("jobs.stage_2_dynamics", "--config", config_file))
    assert status == 0 and "stage_2 had finished" in err
    assert time.monotonic() - started < 30  # no Ray was started
    status, _, err = finish(start("jobs.stage_2_dynamics", "--config", config_file, "--set", "stage_2.steps=5"))
    assert status == 2
    assert "stage_2.steps = 4; the settings ask 5" in err and err.count("\n") == 1


def workers_of(parent):
    """Processes of Ray Train's workers below a process."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text()
            names[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
    found = []
    for pid, name in names.items():
        ancestor = pid
        while ancestor in parents and ancestor != parent:
            ancestor = parents[ancestor]
        if ancestor == parent and name.startswith("ray::RayTrainWorker"):
            found.append(pid)
    return found


def wait_until(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    pytest.fail("it took too long")


def straight_run(config_file, changes):
    """The same steps without Ray, and without being killed, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = load_config(config_file, changes)
        tasks = build_tasks(config.tasks)
        tokenizer = build_tokenizer(config.tokenizer, tasks, config.seed)
        torch.manual_seed(config.seed)
        stage = BackboneStage(build_model(config, tokenizer), config.stage_1, config.seed, tasks, tokenizer)
        return stage, run_stage(stage)
    finally:
        torch.set_num_threads(threads)


def test_a_run_whose_worker_and_then_whose_driver_is_killed_ends_with_the_same_bits(config_file, tmp_path):
    changes = [f"stage_1.{key}={value}" for key, value in (("steps", 1500), ("checkpoint_every", 50))]
    changes += ["stage_1.evaluate_every=700", "stage_1.log_every=10"]
    args = ("--config", config_file, *(part for change in changes for part in ("--set", change)))
    folder = tmp_path / "runs" / "tiny" / "stage_1"
    progress = folder / "progress.jsonl"

    def said(text):
        return progress.exists() and text in progress.read_text()

    def states():
        # Ray Train's controller hears of a state later than its files are there.
        known = folder / "checkpoint_manager_snapshot.json"
        return known.exists() and len(re.findall("checkpoint_20", known.read_text())) >= 2

    process = start("jobs.stage_1_backbone", *args)
    try:
        wait_until(states, process)
        (worker,) = workers_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: said("goes on from step"), process)
        assert said("worker 0 failed")
        after = progress.stat().st_size
        wait_until(lambda: progress.stat().st_size > after + 400, process)  # some steps further
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (folder / "checkpoint").exists()

    status, _, err = finish(start("jobs.stage_1_backbone", *args))
    assert status == 0, err
    assert "goes on from step" in err
    resumed = json.loads((folder / "checkpoint" / "config.json").read_text())["report"]["stage_1"]

    stage, straight = straight_run(config_file, changes)
    assert resumed["loss"] == straight.metrics["loss"]
    ours, theirs = stage.model.state_dict(), load_checkpoint(folder / "checkpoint").model.state_dict()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_two_sharded_workers_whose_states_are_written_in_the_background_leave_what_one_process_leaves(
    config_file, tmp_path
):
    course = ["stage_1.steps=9", "stage_1.checkpoint_every=2"]
    how = ["workers=2", "strategy=fsdp", "async_checkpoints=true", "checkpoint_activations=true", "keep_checkpoints=3"]
    changes = [*course, *(f"train.{setting}" for setting in how)]
    args = ("--config", config_file, *(part for change in changes for part in ("--set", change)))
    status, _, err = finish(start("jobs.stage_1_backbone", *args))
    assert status == 0, err
    folder = tmp_path / "runs" / "tiny" / "stage_1"
    states = [LoopState.load(path / STATE_FILE, "stage_1") for path in sorted(folder.glob("checkpoint_*/"))]
    assert [state.step for state in states] == [6, 8, 9]
    theirs = load_checkpoint(folder / "checkpoint").model.state_dict()
    stage, _ = straight_run(config_file, course)
    for name, tensor in stage.model.state_dict().items():
        assert torch.allclose(theirs[name], tensor, atol=1e-4), name


def test_a_disk_that_is_full_in_the_background_stops_the_run_with_its_line(config_file, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        changes = ["stage_1.steps=100000", "train.async_checkpoints=true", "train.max_failures=0"]
        changes += [f"train.storage_path={small}", "stage_1.checkpoint_every=50", "stage_1.evaluate_every=100000"]
        args = ("--config", config_file, *(part for change in changes for part in ("--set", change)))
        status, _, err = finish(start("jobs.stage_1_backbone", *args))
        assert status == 1 and "No space left on device" in err.splitlines()[-1], err
        for path in (small / "tiny" / "stage_1").glob("checkpoint_*/"):
            LoopState.load(path / STATE_FILE, "stage_1")
    finally:
        subprocess.run(["umount", "-l", small], check=True)
