"""The script for a machine with a GPU runs without one too, tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(folder: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "GPU_DIR": str(folder), "DEVICE": "cpu", "QUICK": "1"}
    command = ["bash", "scripts/gpu_checks.sh", *stages]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = call(tmp_path, "fly")
    assert done.returncode == 2
    assert done.stderr.startswith("stage = 'fly'; allowed: fetch, build, test, train, decode, device, pair, baseline")


@pytest.mark.slow
def test_everything_but_the_kernels_runs_on_the_cpu(tmp_path: Path) -> None:
    done = call(tmp_path, "device", "pair", "baseline", "baseline", "system2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without mamba_ssm: it is not installed" in done.stdout or "ours / peer" in done.stdout
    assert "stage_1 had finished" in done.stdout
    assert "plans asked for" in done.stdout
    results = {path.stem: json.loads(path.read_text())["results"] for path in (tmp_path / "results").glob("*.json")}
    assert set(results) == {"speed_device", "pair", "baseline", "system2"}
    assert results["baseline"]["finished"] and results["system2"]["finished"]
