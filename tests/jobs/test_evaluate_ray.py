"""jobs.evaluate on a local Ray: the same table from any number of actors, also if the job is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crsm.model import save_checkpoint
from jobs import evaluate
from jobs.command import invoke
from jobs.evaluation.folder import ANSWERS, PARTS
from tests.fixtures import tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
OPTIONS = ("--benchmarks", "path_star", "--problems", "24", "--seed", "7", "--controls", "random_write")
OPTIONS += ("--set", "evaluation.part=2", "--set", "evaluation.resamples=50")


@pytest.fixture
def start(tmp_path):
    """Starts the job on the tiny checkpoint with some options."""
    save_checkpoint(tiny_checkpoint(), tmp_path / "tiny")

    def call(output, *options):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "jobs.evaluate", "--checkpoint", tmp_path / "tiny", "--json", "-", *OPTIONS]
        command += ["--output", output, *options]
        return subprocess.Popen(
            [*map(str, command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return call


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, json.loads(out)["results"] if out else None, err


def test_two_actors_give_the_table_and_the_answers_of_one_process(tmp_path, capsys):
    save_checkpoint(tiny_checkpoint(), tmp_path / "tiny")
    for name, actors in (("alone", 0), ("two", 2)):
        options = ["--checkpoint", tmp_path / "tiny", "--output", tmp_path / name, "--actors", actors, *OPTIONS]
        assert invoke(evaluate.main, [*map(str, options)]) == 0, capsys.readouterr().err
    for name in ("results.md", f"path_star/{ANSWERS}"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.slow
def test_two_actors_killed_on_the_way_give_the_table_of_one_process(start, tmp_path):
    status, alone, err = finish(start(tmp_path / "alone"))
    assert status == 0, err
    parts = tmp_path / "out" / "path_star" / PARTS
    killed = start(tmp_path / "out", "--actors", "2")
    end = time.monotonic() + 240
    while not parts.is_file() and killed.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    status, results, err = finish(start(tmp_path / "out", "--actors", "2"))
    assert status == 0, err
    assert results["benchmarks"] == alone["benchmarks"]
    for name in ("results.md", f"path_star/{ANSWERS}"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert "Traceback" not in err
