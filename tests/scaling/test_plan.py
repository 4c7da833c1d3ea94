"""Plans: what is sent, how long it takes, whether it fits, and what would; and the command that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crsm.cli import app
from crsm.config import load_config
from crsm.scaling.devices import parse_devices
from crsm.scaling.plan import make_plan, refusal, remedies
from jobs.command import invoke

ROOT = Path(__file__).parents[2]
LARGE = ("baseline_170m", "baseline_350m", "1b", "3b")
OWN_DEVICES = {"baseline_170m": "8xH100", "baseline_350m": "8xH100", "1b": "16xH100", "3b": "64xH100"}


def planned(name, gpus, *overrides, utilisation=0.4):
    return make_plan(load_config(ROOT / f"configs/{name}.yaml", overrides), *parse_devices(gpus), utilisation)


@pytest.mark.parametrize("name", LARGE)
def test_every_config_fits_on_the_devices_that_it_names(name):
    plan = planned(name, OWN_DEVICES[name])
    assert plan.fits
    assert plan.config.train.workers == plan.devices == load_config(ROOT / f"configs/{name}.yaml").train.workers
    assert f"--gpus {OWN_DEVICES[name]}" in (ROOT / f"configs/{name}.yaml").read_text()


@pytest.mark.parametrize("name", LARGE)
def test_learning_rates_follow_the_rule_from_nano(name):
    """Adam's rate falls with the width (arXiv 2203.03466) and rises with the root of the batch (arXiv 2205.10287)."""
    small, large = planned("nano", "1xcpu:4GB"), planned(name, OWN_DEVICES[name])
    width = small.config.model.backbone.d_model / large.config.model.backbone.d_model
    # Of the first four fifths, before problems take more of the rows.
    text = large.config.stage_1.text
    tokens = large.config.stage_1.batch * text.share * text.length
    batch = (tokens / small.workload.step_tokens) ** 0.5
    rule = small.config.stage_1.optimizer.lr * width * batch
    assert large.config.stage_1.optimizer.lr == pytest.approx(rule, rel=0.03)


def test_a_ring_sends_gradients_twice_and_shards_once_each_way():
    trained = planned("1b", "8xH100").trained
    assert planned("1b", "1xH200", "stage_1.optimizer.accumulate=32").communication.total == 0
    assert planned("1b", "8xH100").communication.total == pytest.approx(2 * 7 / 8 * 4 * trained)
    sharded = planned("1b", "8xH100", "train.strategy=fsdp").communication
    assert sharded.all_reduce == 0
    assert sharded.reduce_scatter == pytest.approx(7 / 8 * 4 * trained)
    # Two micro-batches, two gathers of the layers in bf16 and one of the table in fp32 each.
    table = 50288 * 1536
    assert sharded.all_gather == pytest.approx(2 * 7 / 8 * (2 * 2 * (trained - table) + 4 * table), rel=0.01)


def test_time_is_operations_over_what_the_devices_do():
    plan = planned("baseline_170m", "8xH100", utilisation=0.5)
    speed = plan.speed
    assert speed.tokens_per_second == pytest.approx(8 * 0.5 * 989e12 / speed.flops_per_token)
    assert speed.days == pytest.approx(speed.tokens / speed.tokens_per_second / 86400)
    assert speed.tokens == pytest.approx(7000 * plan.workload.step_tokens)
    assert planned("baseline_170m", "16xH100", utilisation=0.5).speed.days == pytest.approx(speed.days / 2)
    recomputed = planned("baseline_170m", "8xH100", "train.checkpoint_activations=true", utilisation=0.5)
    assert 1.2 < recomputed.speed.days / speed.days < 4 / 3
    fp32 = planned("baseline_170m", "8xH100", "train.precision=fp32", utilisation=0.5)
    assert fp32.speed.days == pytest.approx(speed.days * 989 / 67)


def test_nano_is_planned_from_its_own_problems():
    plan = planned("nano", "2xcpu:1GB")
    assert plan.fits and plan.kernels == "native" and plan.speed.tokens_per_second is None
    assert plan.workload.step_tokens == 32 * 38 + 32 * 53
    assert [(group.rows, group.length) for group in plan.workload.groups] == [(16, 53), (16, 38)]
    assert plan.workload.notes == ()


@pytest.mark.parametrize(("name", "gpus"), [("1b", "4xL4"), ("1b", "2xH100"), ("3b", "8xH100"), ("3b", "8xL40S")])
def test_what_is_said_to_fit_fits(name, gpus):
    plan = planned(name, gpus, "train.strategy=ddp", "train.checkpoint_activations=false")
    if plan.fits:
        return
    for way in remedies(plan):
        changed = planned(name, gpus, "train.strategy=ddp", "train.checkpoint_activations=false", *way.changes)
        assert changed.fits and changed.fullest.peak == way.peak
    line = refusal(plan)
    assert "\n" not in line and f"on each of {plan.devices} {plan.device.name}" in line


def test_the_least_change_comes_first_and_none_is_named_twice():
    plan = planned("baseline_170m", "8xL4", "stage_1.optimizer.accumulate=1")
    assert not plan.fits
    (first,), *others = (way.changes for way in remedies(plan))
    key, _, times = first.partition("=")
    assert key == "stage_1.optimizer.accumulate"
    assert planned("baseline_170m", "8xL4", first).fits
    assert not planned("baseline_170m", "8xL4", f"{key}={int(times) // 2}").fits
    assert not any(key in change for changes in others for change in changes)


def test_an_evaluation_that_does_not_fit_is_made_smaller():
    plan = planned("3b", "64xH100", "stage_1.evaluate_problems=192")
    assert not plan.fits and plan.memory.peak < plan.device.room < plan.memory_evaluated.peak
    assert remedies(plan)[0].changes == ("stage_1.evaluate_problems=96",)
    assert "gsm8k, evaluation" in refusal(plan)


def test_nothing_helps_a_model_that_is_too_large_for_one_device():
    plan = planned("3b", "1xL4")
    assert remedies(plan) == []
    assert "neither smaller micro-batches nor checkpoint_activations, fsdp or evaluate_problems help" in refusal(plan)


@pytest.mark.parametrize(
    ("name", "gpus", "overrides", "message"),
    [
        ("1b", "512xH100", (), "leaves 128 rows for 512 workers; allowed: at least one for each"),
        ("1b", "1xcpu:64GB", (), "train.precision = 'bf16' on a CPU; allowed: fp32"),
        ("nano", "1xcpu:4GB", ("tokenizer={kind: file, path: nowhere.json}",), "cannot be read"),
    ],
)
def test_what_cannot_run_whatever_the_memory_is_refused(name, gpus, overrides, message):
    with pytest.raises(ValueError) as error:
        planned(name, gpus, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("utilisation", [0.0, -0.1, 1.5, float("nan")])
def test_a_utilisation_is_a_share(utilisation):
    with pytest.raises(ValueError, match="allowed: more than 0, at most 1"):
        planned("nano", "1xcpu:4GB", utilisation=utilisation)


# -------------------------------------------------------------------------------------------------------- command


def test_the_command_prints_tables_and_writes_the_plan(capsys, tmp_path):
    status = invoke(
        app, ["plan", str(ROOT / "configs/1b.yaml"), "--gpus", "16xH100", "--json", str(tmp_path / "plan.json")]
    )
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "plan.json").read_text())["results"]
    assert status == 0 and results["fits"] and results["refusal"] is None
    assert "1,009,396,880" in shown and results["parameters"]["total"] == 1_009_396_880
    peak = results["bytes"]["peak"]
    assert peak["peak"] == sum(peak["parts"].values()) == planned("1b", "16xH100").memory.peak
    assert f"{peak['peak'] / 1e9:.3f}" in shown


def test_a_plan_that_does_not_fit_is_one_line_and_status_1(capsys, tmp_path):
    status = invoke(
        app, ["plan", str(ROOT / "configs/3b.yaml"), "--gpus", "8xH100", "--json", str(tmp_path / "plan.json")]
    )
    error = capsys.readouterr().err.splitlines()
    assert status == 1 and len(error) == 1
    assert error[0].startswith("error: 3b needs ") and "allowed: --set stage_1.optimizer.accumulate=" in error[0]
    assert json.loads((tmp_path / "plan.json").read_text())["results"]["refusal"] == error[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/1b.yaml", "--gpus", "8xV100"], "'V100' is not known; allowed: A10"),
        (["configs/1b.yaml", "--gpus", "0xH100"], "0 devices; allowed: 1 to"),
        (["configs/none.yaml", "--gpus", "8xH100"], "cannot be read"),
        (["configs/1b.yaml"], "Missing option '--gpus'"),
        (["configs/1b.yaml", "--gpus", "8xH100", "--utilisation", "2"], "utilisation = 2.0; allowed: more than 0"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert invoke(app, ["plan", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
