"""Tuning of a training stage: settings, ranking, mistakes; and, on Ray, a search nested as Tune over Train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from crsm.config import load_config
from jobs import tune_training
from jobs.ablation.space import Range
from jobs.ablation.tuning import LEFT_ALONE, TuningConfig, apply_tuned, as_options, load_tuning, tunable
from jobs.command import invoke

ROOT = Path(__file__).parents[2]


def write(tmp_path, text):
    path = tmp_path / "tune.yaml"
    path.write_text(text)
    return path


SPACE = "space: {optimizer.lr: {low: 0.001, high: 0.01, log: true}, batch: [8, 16]}"


def test_a_file_holds_the_search_beside_the_settings_of_the_training(tmp_path):
    path = write(tmp_path, f"tuning: {{{SPACE}}}\nstage_1: {{steps: 40}}\n")
    asked = load_tuning(path, ["tuning.points=3", "stage_1.batch=4", "seed=2"], seed=5)
    assert asked.tuning.points == 3
    assert (asked.settings.stage_1.steps, asked.settings.stage_1.batch, asked.settings.seed) == (40, 4, 5)
    assert asked.space == {"optimizer.lr": Range(0.001, 0.01, log=True), "batch": (8, 16)}


def test_a_point_changes_the_stage_and_nothing_else():
    settings = load_config()
    found = apply_tuned({"optimizer.lr": 0.5, "batch": 3}, settings, "stage_1")
    assert (found.stage_1.optimizer.lr, found.stage_1.batch) == (0.5, 3)
    own = settings.stage_1
    back = found.stage_1.model_copy(update={"batch": own.batch, "optimizer": own.optimizer})
    assert found.model_copy(update={"stage_1": back}) == settings


def test_the_best_point_is_named_as_options_of_a_training_job():
    options = as_options({"optimizer.lr": 0.5, "batch": 3}, "stage_1")
    changed = load_config(None, options.replace("--set ", "").split())
    assert changed == apply_tuned({"optimizer.lr": 0.5, "batch": 3}, load_config(), "stage_1")


def test_how_long_a_trial_is_cannot_be_tuned():
    names = tunable(load_config().stage_1)
    assert {"batch", "optimizer.lr", "optimizer.warmup", "value_weight"} <= set(names)
    assert not set(names) & set(LEFT_ALONE)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{}", "tuning.space is empty; allowed: at least one of batch, optimizer.lr"),
        ("{space: {lr: [1]}}", "tuning.space: unknown key 'lr'; allowed: batch, optimizer.lr"),
        ("{space: {steps: [1]}}", "tuning.space: unknown key 'steps'; allowed: batch"),
        ("{space: {batch: [0]}}", "tuning.space.batch: stage_1.batch = 0: Input should be greater than or equal to 1"),
        ("{space: {batch: {low: 1, high: 9}}, method: grid}", "allowed: a list of values"),
        ("{stages: [1]}", "unknown key 'tuning.stages'; allowed: checkpoint, concurrent"),
        ("{stage: stage_3}", "tuning.stage = 'stage_3': Input should be 'stage_1', 'stage_2' or 'stage_4'"),
        ("{stage: stage_2}", "allowed: the checkpoint that stage_2 starts from"),
        ("{name: ..}", "allowed: the name of one folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, section, expected):
    path = write(tmp_path, f"tuning: {section}\n")
    assert invoke(tune_training.main, ["--config", str(path), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert expected in err
    assert not (tmp_path / "out").exists()


def test_more_workers_than_the_machine_has_are_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = write(tmp_path, f"tuning: {{{SPACE}}}\ntrain: {{workers: 1000}}\n")
    assert invoke(tune_training.main, ["--config", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "a trial of stage_1 with train.workers = 1000 asks 1000 CPU; the cluster has" in capsys.readouterr().err


def test_a_trial_that_was_ended_early_is_behind_those_that_were_not():
    trials = [
        {"trial": 0, "value": 0.1, "steps": 5, "finished": False},
        {"trial": 1, "value": 0.9, "steps": 20, "finished": True},
        {"trial": 2, "value": 0.5, "steps": 20, "finished": True},
        {"trial": 3, "value": 0.4, "steps": 10, "finished": False},
    ]
    assert [trial["trial"] for trial in tune_training.rank(trials, TuningConfig())] == [2, 1, 3, 0]
    assert [trial["trial"] for trial in tune_training.rank(trials, TuningConfig(mode="max"))] == [1, 2, 3, 0]


def test_the_shipped_search_is_valid():
    asked = load_tuning(ROOT / "configs" / "tune_stage_1.yaml")
    assert asked.tuning.stage == "stage_1" and set(asked.space) == {"optimizer.lr", "optimizer.warmup", "batch"}


# -------------------------------------------------------------------------------------------------------------- on Ray


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_search_trains_asha_ends_the_worse_and_resuming_trains_nothing_again(tmp_path):
    tree = {
        "tuning": {"space": {"optimizer.lr": [0.00001, 0.01]}, "method": "grid", "concurrent": 1, "stage": "stage_1"},
        "name": "tiny",
        "model": {
            "backbone": {"d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16, "chunk_size": 16},
            "world_model": {"width": 16, "decoder_width": 32},
            "writer": {"width": 16},
        },
        "tasks": [{"name": "path_star", "arms": 2, "length": 3, "labels": 12}],
        "train": {"workers": 1, "threads": 1},
        "stage_1": {"steps": 12, "batch": 4, "evaluate_problems": 4, "log_every": 2, "checkpoint_every": 4},
    }
    path = write(tmp_path, yaml.safe_dump(tree, sort_keys=False))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("RAY_ADDRESS", None)

    def search(*options):
        command = [sys.executable, "-m", "jobs.tune_training", "--config", path, "--output", tmp_path / "out"]
        found = subprocess.run(
            [*map(str, command), "--json", "-", *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)["results"]

    results = search()
    assert results["trials"] == len(results["table"]) == 2
    best = results["best"]
    assert best["finished"] and best["steps"] == 12 and best["point"] == {"optimizer.lr": 0.01}
    assert best["options"] == "--set stage_1.optimizer.lr=0.01"
    assert (tmp_path / "out" / "trials" / "0001" / "stage_1" / "checkpoint" / "config.json").is_file()
    (tmp_path / "out" / "trials").rename(tmp_path / "away")
    assert search("--resume")["table"] == results["table"]
    assert not (tmp_path / "out" / "trials").exists()
