"""The job: the same shards for any number of workers and any number of kills, and one line for bad input."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from crsm.data.preparation import SerialExecutor, prepare
from crsm.data.shards import open_shards
from crsm.data_config import load_data_config
from jobs.prepare_data import remove_output
from tests.data.corpora import edited, prose, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        texts = [prose(100 * number + seed) for seed in range(30)] + [edited(prose(seed), 0.02) for seed in range(3)]
        write_jsonl(folder / f"{number}.jsonl", texts)
    tree = {
        "name": "tiny",
        "sources": [{"kind": "files", "name": "text", "path": str(folder / "*.jsonl"), "valid_share": 0.1}],
        "tokenizer": {"kind": "bpe", "vocab_size": 300, "sample_mb": 0.05},
        "part_mb": 0.005,
        "shard_tokens": 5000,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(*args):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.prepare_data", *map(str, args)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".part")
    }


@pytest.fixture(scope="module")
def expected(config_file, tmp_path_factory):
    """Without Ray and without being stopped."""
    folder = tmp_path_factory.mktemp("expected")
    prepare(load_data_config(config_file), folder, SerialExecutor())
    return contents(folder)


def kill_group(process):
    """Kills the job with all that it started, Ray's processes included, and waits until they are gone."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_two_workers_give_the_shards_of_one_process_and_a_killed_run_goes_on(config_file, expected, tmp_path):
    folder = tmp_path / "out"
    args = ("--config", config_file, "--output", folder, "--workers", 2, "--json", "-")
    process = start(*args)
    end = time.monotonic() + 120
    while len(list(folder.glob("work/clean/*.parquet"))) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    kill_group(process)
    assert not (folder / "index.json").exists()
    status, out, err = finish(start(*args))
    assert status == 0, err
    assert contents(folder) == expected
    results = json.loads(out)["results"]
    assert results["had_finished"] is False and results["bytes_per_second"] > 0
    assert results["sources"][0]["duplicates"]["near"] == 6
    for step in ("clean", "compare", "tokenizer", "encode", "write"):
        assert f"{step}: " in err
    assert "WARNING" not in err and "ray.data" not in err
    status, out, err = finish(start(*args))
    assert status == 0 and "had finished" in err and contents(folder) == expected


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments_the_shards_are_the_same(config_file, expected, tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "out"
    args = ("--config", config_file, "--output", folder, "--workers", 2)
    began = time.monotonic()
    assert finish(start(*args))[0] == 0
    whole = time.monotonic() - began
    assert contents(folder) == expected
    remove_output(folder)
    kills = 0
    while kills < 20:
        process = start(*args)
        time.sleep(rng.uniform(0.2, 1.0) * whole)
        if process.poll() is not None:  # it came to its end before: begin anew
            process.communicate()
            assert contents(folder) == expected
            remove_output(folder)
            continue
        kill_group(process)
        kills += 1
        if rng.random() < 0.3:
            assert finish(start(*args))[0] == 0
            assert contents(folder) == expected
            remove_output(folder)
    assert finish(start(*args))[0] == 0
    assert contents(folder) == expected


def test_bad_input_is_one_line_and_leaves_no_index(config_file, tmp_path):
    for changes, message in (
        (["sources.text.path=nowhere"], "sources.text.path = 'nowhere': no such file"),
        (["sources.text.kind=web"], "'web'"),
        (["tokenizer={kind: file, path: none.json}"], "none.json' cannot be read"),
        (["sources.none.path=x"], "no task 'none'"),
    ):
        options = [part for change in changes for part in ("--set", change)]
        status, _, err = finish(start("--config", config_file, "--output", tmp_path / "out", *options))
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out" / "index.json").exists()
    status, _, err = finish(start("--config", config_file, "--output", "/proc/none"))
    assert status == 2 and "/proc" in err and "cannot be written" in err and err.count("\n") == 1


def test_fresh_removes_what_a_preparation_left_and_nothing_else(config_file, tmp_path):
    prepare(load_data_config(config_file), tmp_path, SerialExecutor())
    (tmp_path / "mine.txt").write_text("keep")
    remove_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_sample_that_ships_with_the_project_is_prepared_without_ray(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    report = prepare(load_data_config("configs/data/sample.yaml"), tmp_path, SerialExecutor())
    docs, gsm8k, star = report["sources"]
    assert docs["splits"]["train"]["documents"] > 5
    # The problems that the task keeps for validation and test are not trained on.
    assert gsm8k["counts"]["contaminated"]["gsm8k"] == report["evaluation_sets"][0]["examples"] > 5
    assert gsm8k["splits"]["train"]["documents"] == 200 - gsm8k["counts"]["contaminated"]["gsm8k"]
    assert star["splits"]["train"]["documents"] == 500
    assert open_shards(tmp_path).eos_id == 1
