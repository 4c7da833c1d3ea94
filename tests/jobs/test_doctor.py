"""What the doctor says follows from what it found; and what it finds is there."""

import dataclasses
import json
import socket
from pathlib import Path

import pytest

from crsm.cli import app
from crsm.config import Config, load_config
from jobs.command import invoke
from jobs.doctor import GB, Facts, Node, Package, State, diagnose, look, port_is_free, storage_problem
from tests.jobs.local_object_store import CREDENTIALS, start_object_store

WELL = Facts(
    python=(3, 12, 3),
    packages=(Package("ray", "<2.61,>=2.60", "2.60.0", True), Package("torch", ">=2.8", "2.13.0", True)),
    torch="2.13.0",
    torch_cuda=None,
    gpus=(),
    driver=False,
    gpu_kernels="",
    native="",
    native_runs="avx512, 2 threads",
    cpu=frozenset({"avx2", "avx512f"}),
    compiler="/usr/bin/c++",
    browser="/usr/bin/chromium",
    cores=8,
    memory=32 * GB,
    shared_memory=8 * GB,
    disk={"/": 100 * GB},
    open_files=65536,
    ports={6379: True, 8265: True, 8000: True},
    auth_mode="token",
    token="/home/me/.ray/auth_token",
    token_is_open=False,
    address=None,
    cluster=(),
    cluster_problem=None,
    storage_problem=None,
    trackers_problem=None,
    workers=1,
    needs_gpu=False,
)
TWO = (Node("10.0.0.1", {"CPU": 4.0}), Node("10.0.0.2", {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}))
REMOTE = {"address": "10.0.0.1:6379", "cluster": TWO}


def findings(**changes):
    return diagnose(dataclasses.replace(WELL, **changes))


def test_where_all_is_well_nothing_is_to_be_mended():
    assert all(finding.state is State.OK and not finding.mend for finding in findings())
    assert all(finding.state is State.OK for finding in findings(**REMOTE))


@pytest.mark.parametrize(
    ("changes", "name", "state", "found", "mend"),
    [
        ({"python": (3, 10, 1)}, "version", "missing", "3.10.1", "3.11"),
        (
            {"packages": (Package("ray", "<2.61,>=2.60", "2.9.0", False),)},
            *("ray", "missing", "2.9.0 (asked: ray<2.61,>=2.60)", "pip install 'ray<2.61,>=2.60'"),
        ),
        (
            {"packages": (Package("torch", ">=2.8", None, False),)},
            *("torch", "missing", "not installed", "pip install 'torch>=2.8'"),
        ),
        ({"native": "no module"}, "native core", "note", "no module", "make setup"),
        ({"native": "no module", "compiler": None}, "native core", "note", "no module", "apt-get install g++"),
        ({"cpu": frozenset({"avx2"})}, "vectors", "ok", "AVX2", ""),
        ({"cpu": frozenset()}, "vectors", "note", "portable code", ""),
        ({"gpus": ("H200",), "torch_cuda": "13.0"}, "GPU", "ok", "H200; torch for CUDA 13.0", ""),
        ({"gpus": ("H200",), "gpu_kernels": "none built"}, "GPU kernels", "note", "none built", "gpu_checks.sh build"),
        ({"driver": True}, "GPU", "note", "torch sees no GPU", "pip install --force-reinstall torch"),
        ({"driver": True, "torch_cuda": "13.0"}, "GPU", "note", "torch sees no GPU", "nvidia-smi"),
        ({"needs_gpu": True}, "GPU", "missing", "none", "train.use_gpu=false"),
        ({"cores": 1}, "cores", "note", "1", "shares the core"),
        ({"memory": GB}, "memory", "note", "1.0 GB free", "end other programs"),
        ({"shared_memory": 64 << 20}, "/dev/shm", "note", "0.1 GB free", "--shm-size"),
        ({"disk": {"/data": GB}}, "disk at /data", "note", "1 GB free", "make room at /data"),
        ({"open_files": 1024}, "open files", "note", "1024", "ulimit -n 65536"),
        ({"storage_problem": "/x cannot be written"}, "storage", "missing", "/x cannot be", "train.storage_path"),
        ({"ports": {6379: False}}, "port 6379", "note", "somebody listens", "ray start --head --port=PORT"),
        ({"ports": {8000: False}}, "port 8000", "note", "somebody listens", "crsm serve --port"),
        ({"token": None}, "token", "missing", "RAY_AUTH_MODE is token", "ray get-auth-token --generate"),
        ({"token": None, "auth_mode": None}, "token", "note", "RAY_AUTH_MODE is unset", "ray get-auth-token"),
        ({"auth_mode": "disabled"}, "token", "note", "disabled", "export RAY_AUTH_MODE=token"),
        ({"token_is_open": True}, "token", "note", "others can read", "chmod 600 /home/me/.ray/auth_token"),
        (REMOTE, "address", "ok", "10.0.0.1:6379: 2 nodes, 12 CPU, 1 GPU", ""),
        (REMOTE | {"workers": 13}, "address", "missing", "train.workers = 13 asks 13 CPU", "train.workers=N"),
        (REMOTE | {"workers": 2, "needs_gpu": True}, "address", "missing", "asks 2 GPU", "more nodes"),
        (REMOTE | {"cluster_problem": "refuses the token"}, "address", "missing", "refuses", "~/.ray/auth_token"),
        (REMOTE | {"cluster_problem": "nobody answers"}, "address", "missing", "nobody answers", "unset RAY_ADDRESS"),
        (
            REMOTE | {"cluster_problem": "Ray 2; allowed: the same versions"},
            "address",
            "missing",
            "Ray 2",
            "install",
        ),
        (
            {"trackers_problem": "'wandb', which is not installed; allowed: pip install 'crsm[wandb]'"},
            *("trackers", "missing", "not installed", "pip install 'crsm[wandb]'"),
        ),
        ({"compiler": None}, "C++ compiler", "note", "none", "apt-get install g++"),
        ({"browser": None}, "browser", "note", "none", "apt-get install chromium"),
    ],
)
def test_what_is_wrong_is_named_with_what_mends_it(changes, name, state, found, mend):
    (finding,) = (finding for finding in findings(**changes) if finding.name == name)
    assert finding.state == state
    assert found in finding.found
    assert mend in finding.mend and bool(mend) == bool(finding.mend)


def test_this_machine_has_what_pyproject_asks(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    facts = look(Config(train={"storage_path": str(tmp_path / "not" / "yet")}))
    assert {package.name for package in facts.packages} >= {"ray", "torch", "numpy", "typer"}
    assert all(package.fits for package in facts.packages)
    assert facts.memory > 0 and facts.cores > 0 and str(tmp_path) in facts.disk
    assert facts.storage_problem is None
    assert not (tmp_path / "not").exists()


def test_a_bucket_that_is_not_there_and_a_place_that_is_none_are_missing(monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with start_object_store() as store:
        facts = look(Config(train={"storage_path": store.uri("nowhere/runs")}))
        assert facts.storage_problem == "s3://nowhere/runs: the storage cannot be written: no such bucket"
        store.bucket("there")
        assert look(Config(train={"storage_path": store.uri("there/runs")})).storage_problem is None
    assert "allowed: a folder, s3://" in (look(Config(train={"storage_path": "ftp://x/y"})).storage_problem or "")


def test_a_port_on_which_somebody_listens_is_not_free():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)


def test_a_storage_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert storage_problem(tmp_path / "file" / "runs") == f"{tmp_path / 'file'} is no folder"
    assert (storage_problem(Path("/proc/runs")) or "").startswith("/proc cannot be written")


def test_the_token_is_looked_for_where_ray_does(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert look(Config()).token is None
    (tmp_path / ".ray").mkdir()
    path = tmp_path / ".ray" / "auth_token"
    path.write_text("a" * 64)
    path.chmod(0o644)
    facts = look(Config())
    assert (facts.token, facts.token_is_open) == (str(path), True)
    path.chmod(0o600)
    assert not look(Config()).token_is_open
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert look(Config()).token == "RAY_AUTH_TOKEN"


def test_the_command_fails_if_what_is_asked_for_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert invoke(app, ["doctor", "--json", str(tmp_path / "d.json")]) == 0
    report = json.loads((tmp_path / "d.json").read_text())["results"]["findings"]
    assert {entry["state"] for entry in report} <= {"ok", "note"}
    assert {"subject", "name", "state", "found", "mend"} == set(report[0])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("COLUMNS", "240")
    assert invoke(app, ["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "missing cluster: address" in out and "no Ray cluster answers there" in out
    assert invoke(app, ["doctor", "--set", "train.workerss=1"]) == 2


def test_settings_decide_what_is_needed(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    facts = look(load_config(None, ["train.workers=3", "train.use_gpu=true"]))
    assert (facts.workers, facts.needs_gpu) == (3, True)
