"""``ray job submit`` against a fresh head that asks for a token: results, exit status, stopping, and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crsm import __version__
from tests.jobs.heads import ROOT, Head, start_head

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TINY = [
    *("train.workers=1", "train.threads=1", "search.simulations=4", "sampling.max_tokens=8"),
    *("model.backbone.d_model=32", "model.backbone.n_layer=2", "model.backbone.d_state=8", "model.backbone.headdim=16"),
    *("model.world_model.width=16", "model.world_model.decoder_width=32", "model.writer.width=16"),
    *("stage_3.problems=8", "stage_3.actors=1", "stage_4.calibration_problems=8"),
]
STEPS = [f"stage_{n}.{what}" for n in (1, 2, 3, 4) for what in ("steps=4", "batch=8", "evaluate_problems=8")]


def job(module: str, *args: object, settings: list[str] = TINY) -> list[object]:
    changes = [part for change in settings for part in ("--set", change)]
    return ["python", "-m", module, "--config", "configs/nano.yaml", *changes, *args]


@pytest.fixture(scope="module")
def head():
    with start_head() as head:
        yield head


def in_job(head: Head, *args: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A job that is started by hand and told of the cluster by ``RAY_ADDRESS``."""
    environment = {**head.environment, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": head.address, **changes}
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_mistake_in_a_job_is_one_line_in_the_log_and_the_exit_status_of_the_command(head: Head) -> None:
    result = head.submit(*job("jobs.pipeline", "--set", "stage_1.stepps=4"))
    assert result.returncode == 1, result.stdout  # Ray's, for any job that failed
    assert "unknown key" in result.stdout and "stepps" in result.stdout
    assert "Traceback" not in result.stdout
    assert re.search(r"entrypoint command failed with exit code 2", result.stdout)


def test_a_job_that_asks_more_than_the_cluster_has_says_so_at_once(head: Head, tmp_path: Path) -> None:
    started = time.monotonic()
    args = ("jobs.pipeline", "--config", "configs/nano.yaml", "--storage", str(tmp_path))
    result = in_job(head, *args, "--set", "train.workers=8")
    assert result.returncode == 2
    assert "error: stage_1 with train.workers = 8 asks 8 CPU; the cluster has 4." in result.stderr
    result = in_job(head, *args, "--set", "train.use_gpu=true")
    assert result.returncode == 2
    assert "asks 2 GPU; the cluster has 0." in result.stderr
    assert time.monotonic() - started < 100  # and not for ever


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the cluster refuses the token, or asks for one"),
        ({"RAY_AUTH_MODE": "disabled"}, "the cluster refuses the token, or asks for one"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}, "RAY_AUTH_MODE is token and there is none"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "'127.0.0.1:1': no Ray cluster answers there"),
        ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "is that of the dashboard"),
        ({"RAY_ADDRESS": "nonsense"}, "allowed: HOST:PORT"),
    ],
    ids=["wrong token", "no authentication", "no token", "no cluster", "dashboard", "no address"],
)
def test_a_cluster_that_does_not_let_in_is_one_line(
    head: Head, changes: dict[str, str], said: str, tmp_path: Path
) -> None:
    result = in_job(head, "jobs.stage_1_backbone", "--storage", str(tmp_path), **changes)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_the_dashboard_is_no_head(head: Head, tmp_path: Path) -> None:
    address = head.dashboard.removeprefix("http://")
    result = in_job(head, "jobs.stage_1_backbone", "--storage", str(tmp_path), RAY_ADDRESS=address)
    assert result.returncode == 2
    assert "what answers there is no head of a Ray cluster" in result.stderr


# ------------------------------------------------------------------------------------------------------------- results


def result_of(output: str) -> dict:
    """The object that ``--json -`` writes, among Ray's own lines."""
    text = output[output.index('{\n  "job"') :]
    return json.JSONDecoder().raw_decode(text)[0]


@pytest.mark.slow
def test_the_pipeline_by_job_submit_gives_its_result_twice_in_a_row(head: Head, tmp_path: Path) -> None:
    losses = []
    for start in ("first", "second"):
        storage = ("--storage", str(tmp_path / start))
        options = ("--metadata-json", '{"commit": "abc"}') if start == "first" else ()
        done = head.submit(*job("jobs.pipeline", *storage, "--json", "-", settings=TINY + STEPS), options=options)
        assert done.returncode == 0, done.stdout
        assert "stage_1: starts 1 worker" in done.stdout  # streamed
        result = result_of(done.stdout)
        assert list(result["results"]["stages"]) == ["stage_1", "stage_2", "stage_3", "stage_4"]
        assert (tmp_path / start / "nano" / "stage_4" / "checkpoint" / "model.safetensors").is_file()
        version = r"\(abc\)" if start == "first" else r"\(package [0-9a-f]{16}\)"
        assert re.fullmatch(f"{re.escape(__version__)} {version}", result["commit"])
        losses.append([report["loss"] for report in result["results"]["stages"].values()])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_stopped_job_goes_on_when_it_is_submitted_again(head: Head, tmp_path: Path) -> None:
    settings = [*TINY, "stage_1.steps=1500", "stage_1.checkpoint_every=50", "stage_1.evaluate_every=1500"]
    command = job("jobs.stage_1_backbone", "--storage", tmp_path, settings=settings)
    folder = tmp_path / "nano" / "stage_1"
    started = head.submit(*command, options=("--no-wait", "--submission-id", "to-be-stopped"))
    assert started.returncode == 0, started.stdout
    end = time.monotonic() + 240
    while len(list(folder.glob("checkpoint_20*/loop_state.safetensors"))) < 2:
        assert time.monotonic() < end, head.ray("job", "logs", "--address", head.dashboard, "to-be-stopped").stdout
        time.sleep(0.2)
    stopped = head.ray("job", "stop", "--address", head.dashboard, "to-be-stopped")
    assert stopped.returncode == 0 and "was stopped" in stopped.stdout, stopped.stdout
    assert not (folder / "checkpoint").exists()

    again = head.submit(*command)
    assert again.returncode == 0, again.stdout
    step = int(re.search(r"goes on from step (\d+)", again.stdout)[1])
    assert 50 <= step < 1500 and step % 50 == 0
    assert (folder / "checkpoint" / "model.safetensors").is_file()
