"""Training without Ray, some minutes at a time: stopped runs go on as if they had not been stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crsm.config import Config, load_config
from crsm.data.preparation import SerialExecutor, prepare
from crsm.model import load_checkpoint
from jobs import train_alone
from jobs.command import invoke
from jobs.train_alone import Limits, Training
from tests.data.corpora import prose, tiny_config, write_jsonl

CPU = torch.device("cpu")
NO_END = Limits(float("inf"))


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "books.jsonl", [prose(seed, words=80) for seed in range(40)])
    prepare(
        tiny_config({"name": "books", "path": str(folder / "books.jsonl"), "valid_share": 0.2}),
        folder,
        SerialExecutor(),
    )
    return [
        "model.backbone={d_model: 32, n_layer: 2, d_state: 8, headdim: 16, chunk_size: 16}",
        "model.world_model={width: 16, decoder_width: 16}",
        "model.writer.width=16",
        "tasks=[{name: path_star, arms: 2, length: 3, labels: 12}]",
        f"tokenizer={{kind: file, path: {folder}/tokenizer.json}}",
        "train={use_gpu: false, threads: 1}",
        "stage_1={steps: 6, batch: 6, log_every: 1, evaluate_problems: 4, checkpoint_every: 100, evaluate_every: 100}",
        f"stage_1.text={{shards: {folder}, share: 0.6, length: 64}}",
        "stage_1.optimizer={warmup: 2, lr: 0.01}",
        "stage_2={steps: 2, batch: 4, log_every: 1, evaluate_problems: 4, unroll: 2, roots: 1, attempts: 2}",
        "stage_2.optimizer={warmup: 1}",
        "stage_3={steps: 2, batch: 4, log_every: 1, problems: 4, iterations: 1, evaluate_problems: 4}",
        "stage_3.optimizer={warmup: 1}",
        "stage_4={steps: 2, batch: 4, log_every: 1, evaluate_problems: 4, calibration_problems: 4}",
        "stage_4.optimizer={warmup: 1}",
    ]


@pytest.fixture(scope="module")
def config(overrides: list[str]) -> Config:
    return load_config(None, overrides)


def asked(times: int) -> Limits:
    """A clock that comes to its end when it has been asked so often: once after every step."""

    def ticks() -> Iterator[float]:
        yield from (float(number) for number in range(1, 1000))

    clock = ticks()
    return Limits(float(times), lambda: next(clock))


def test_a_run_that_is_stopped_twice_ends_where_one_ends_that_is_not(config: Config, tmp_path: Path) -> None:
    whole = Training(config, "stage_1", tmp_path / "whole", None, CPU).train(NO_END, 0.0)
    found = [Training(config, "stage_1", tmp_path / "parts", None, CPU).train(asked(2), 0.0) for _ in range(2)]
    assert [(part["finished"], part["steps"]) for part in found] == [(False, 2), (False, 4)]
    last = Training(config, "stage_1", tmp_path / "parts", None, CPU).train(NO_END, 0.0)
    assert last["finished"] and last["steps"] == whole["steps"] == 6
    losses = [[point["loss"] for point in run["curve"] if "loss" in point] for run in (last, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    one, other = (load_checkpoint(tmp_path / name / "checkpoint").model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_stage_is_passed_over_and_other_settings_are_refused(config: Config, tmp_path: Path) -> None:
    Training(config, "stage_1", tmp_path, None, CPU).train(asked(1), 0.0)
    other = config.model_copy(update={"seed": 3})
    with pytest.raises(ValueError, match=r"seed.*allowed: the same settings, or another --name"):
        Training(other, "stage_1", tmp_path, None, CPU).train(NO_END, 0.0)
    Training(config, "stage_1", tmp_path, None, CPU).train(NO_END, 0.0)
    weights = (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert Training(config, "stage_1", tmp_path, None, CPU).train(NO_END, 0.0)["finished"]
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns == weights


def test_the_steps_that_fill_the_time_are_fixed_when_the_run_begins(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_alone, "seconds_of_a_step", lambda *_: 2.0)
    found = Training(config, "stage_1", tmp_path, None, CPU).train(asked(3), 0.5)
    assert json.loads((tmp_path / "steps.json").read_text()) == {"steps": 13}  # 0.9 · 30 s / 2 s
    assert (found["finished"], found["steps"]) == (False, 3)
    monkeypatch.setattr(train_alone, "seconds_of_a_step", lambda *_: pytest.fail("measured twice"))
    assert Training(config, "stage_1", tmp_path, None, CPU).train(NO_END, 0.5)["steps"] == 13


def test_a_step_is_timed_after_the_first_ones(config: Config) -> None:
    from jobs.runs import Work
    from jobs.train_worker import build_stage

    work = Work("stage_1", config.model_dump(mode="json"), None, "", None, {}, "")
    seconds = train_alone.seconds_of_a_step(build_stage(work, config).stage, config, CPU)
    assert 0 < seconds < 60


def test_all_stages_follow_one_another_without_ray(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.setitem(__import__("sys").modules, "ray.train", None)
    arguments = [word for override in overrides for word in ("--set", override)]
    arguments += ["--storage", str(tmp_path), "--name", "all", "--device", "cpu", "--json", str(tmp_path / "r.json")]
    assert invoke(train_alone.main, arguments) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["finished"] and sorted(results["stages"]) == ["stage_1", "stage_2", "stage_3", "stage_4"]
    found = load_checkpoint(tmp_path / "all" / "stage_4" / "checkpoint")
    assert set(found.report) == {"stage_1", "stage_2", "stage_3", "stage_4"}
    assert found.report["stage_3"]["rounds"][0]["round"] == 1


def test_a_storage_that_is_no_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(train_alone.main, ["--storage", "s3://bucket/runs", "--stages", "1"]) == 2
    assert "storage = 's3://bucket/runs'; allowed: a folder of this machine" in capsys.readouterr().err
