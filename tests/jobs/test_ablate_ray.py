"""Ablations on a local Ray: a smoke sweep, one that loses a worker and then its driver and goes on, ASHA, Optuna."""

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
from jobs import ablate
from jobs.ablation.place import TRIALS_FILE
from jobs.ablation.sweep import read_records
from jobs.ablation.table import Record, rows, write_table
from jobs.ablation.trial import Bench
from jobs.storage import StoragePath
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

    def start(*options, **variables):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.pop("RAY_ADDRESS", None)
        environment |= variables
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
    assert found == {"sweep.json", TRIALS_FILE, "tune", *results["files"]}
    assert "Traceback" not in err and "pid=" not in err and "Configuration for experiment" not in err


def without_ray(tmp_path):
    """The records of the whole sweep, measured here one after the other."""
    whole = ablate.prepare(tmp_path / "sweep.yaml", [], None, None)
    bench = Bench(whole.checkpoint, whole.ablation.task, whole.ablation.problems)
    return [
        Record(plan.trial, plan.point, plan.seed, bench.measure(plan.point, plan.seed, slice(None), plan.controls))
        for plan in ablate.plan(whole)
    ]


def trial_processes(parent, doing=""):
    """Processes below another one that run trials; the name is that of Tune's wrapper, and of what it is called for."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
    found = []
    for pid, name in names.items():
        ancestor = pid
        while ancestor in parents and ancestor != parent:
            ancestor = parents[ancestor]
        if ancestor == parent and name.startswith("ray::ResourceTrainable") and doing in name:
            found.append(pid)
    return found


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    pytest.fail("it took too long")


@pytest.mark.slow
def test_a_sweep_that_loses_a_worker_and_then_its_driver_ends_with_the_same_table_row_for_row(sweep, tmp_path):
    folder = tmp_path / "out"
    process = sweep("--output", folder, "--set", "ablation.concurrent=1")
    try:
        wait_until(lambda: len(read_records(folder)) >= 2, process)
        for pid in wait_until(lambda: trial_processes(process.pid), process):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(read_records(folder)) >= 5, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    done = read_records(folder)
    assert 5 <= len(done) < 18

    status, resumed, err = finish(sweep("--output", folder, "--resume"))
    assert status == 0, err
    assert resumed["resumed_trials"] == len(done)
    expected = rows(without_ray(tmp_path), ["random_write"])
    assert resumed["table"] == expected and len(expected) == 18
    (tmp_path / "expected").mkdir()
    for path in write_table(expected, tmp_path / "expected"):
        assert (folder / path.name).read_bytes() == path.read_bytes()

    # What is finished is only read again: Ray does not even start.
    impossible = ("--set", "ablation.resources.num_cpus=99")
    status, again, err = finish(sweep("--output", folder, "--resume", *impossible))
    assert status == 0, err
    assert again["table"] == expected and again["resumed_trials"] == 18


@pytest.fixture
def two_nodes():
    """A cluster of a head and another node, with a CPU each; this process looks on."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000}
    )
    try:
        yield cluster, cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_sweep_that_loses_a_node_ends_with_the_same_table_row_for_row(sweep, two_nodes, tmp_path):
    cluster, other = two_nodes
    folder = tmp_path / "out"
    (raylet,) = (found.process.pid for found in other.all_processes["raylet"])
    process = sweep("--output", folder, "--set", "ablation.seeds=[1, 2]", RAY_ADDRESS=cluster.address)
    try:
        # One that is at work is stopped, so that it is surely not done when its node is lost.
        (busy, *_) = wait_until(lambda: trial_processes(raylet, doing=".train"), process)
        os.kill(busy, signal.SIGSTOP)
        left = len(read_records(folder))
        cluster.remove_node(other, allow_graceful=False)
        status, results, err = finish(process)
    finally:
        process.kill()
    assert status == 0, err
    assert left < 12 and "lost its process and is run again" in err
    expected = rows([record for record in without_ray(tmp_path) if record.seed in (1, 2)], ["random_write"])
    for number, row in enumerate(expected):
        row["trial"] = number  # without the third seed there are fewer
    assert results["table"] == expected and len(expected) == 12


@pytest.mark.slow
def test_a_sweep_into_a_bucket_goes_on_from_there_and_has_the_same_table(sweep, tmp_path):
    from tests.jobs.local_object_store import CREDENTIALS, start_object_store

    with start_object_store() as store:
        store.bucket("sweeps")
        place = store.uri("sweeps/out")
        process = sweep("--output", place, "--set", "ablation.concurrent=1", **CREDENTIALS)
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in CREDENTIALS.items():
                    patch.setenv(name, value)
                folder = StoragePath.of(place)
                wait_until(lambda: len(read_records(folder)) >= 3, process)
                os.kill(process.pid, signal.SIGKILL)
                process.communicate(timeout=60)
                done = read_records(folder)
                assert 3 <= len(done) < 18
                status, results, err = finish(sweep("--output", place, "--resume", **CREDENTIALS))
                assert status == 0, err
                assert results["resumed_trials"] == len(done) and results["output"] == place
                expected = rows(without_ray(tmp_path), ["random_write"])
                assert results["table"] == expected
                (tmp_path / "expected").mkdir()
                for path in write_table(expected, tmp_path / "expected"):
                    assert (folder / path.name).read_bytes() == path.read_bytes()
                found = {path.name for path in folder.iterdir()}
                assert found == {"sweep.json", "ended", "tune", *results["files"]}
                assert (folder / "report.md").read_text().startswith("# Ablation tiny")
                (experiment, *_) = (folder / "tune").iterdir()  # Ray Tune's own
                assert any(path.name.startswith("experiment_state") for path in experiment.iterdir())
        finally:
            process.kill()


@pytest.mark.slow
def test_a_sweep_tells_its_trackers_of_every_trial(sweep, tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    folder = tmp_path / "out"
    status, results, err = finish(
        sweep(
            *("--set", "ablation.smoke=true", "--set", "ablation.trackers=[wandb, mlflow]", "--output", folder),
            WANDB_MODE="offline",
        )
    )
    assert status == 0, err
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    told = {(int(run.data.params["trial/trial"]), run.data.metrics["accuracy"]) for run in runs}
    assert told == {(row["trial"], row["accuracy"]) for row in results["table"]}
    assert not any(key.startswith("tally") for run in runs for key in run.data.metrics)
    assert len(list((folder / "wandb").glob("offline-run-*/run-*.wandb"))) == results["trials"] == 4


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


@pytest.mark.slow
def test_optuna_is_told_the_mean_of_the_seeds_and_goes_on_where_it_stopped(sweep, tmp_path):
    pytest.importorskip("optuna")
    options = ("--set", "ablation.method=optuna", "--set", "ablation.seeds=[1,2]", "--output", tmp_path / "out")
    status, first, err = finish(sweep(*options, "--set", "ablation.points=3"))
    assert status == 0, err
    assert sorted(row["seed"] for row in first["table"]) == [1, 1, 1, 2, 2, 2]
    lines = (tmp_path / "out" / TRIALS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / "out" / TRIALS_FILE).write_text("".join(lines[:3]))  # one point, and one seed of another
    status, again, err = finish(sweep(*options, "--set", "ablation.points=3", "--resume"))
    assert status == 0, err
    assert again["trials"] == 6 and again["table"][:3] == first["table"][:3]


def test_a_trial_that_asks_for_more_than_there_is_is_refused_at_once(sweep, tmp_path):
    status, results, err = finish(sweep("--set", "ablation.resources.num_gpus=1000", "--output", tmp_path / "out"))
    assert (status, results) == (2, None)
    assert err.startswith("error: ablation.resources: a trial asks 1 CPU and 1000 GPU; the nodes of the cluster have")
    assert err.count("\n") == 1, err
