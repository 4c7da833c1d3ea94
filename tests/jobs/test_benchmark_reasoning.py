"""The jobs that measure a checkpoint: their settings, their results, their mistakes."""

import json
import re

import pytest

from crsm.config import dump_config
from crsm.evaluation.comparison import CONTROLS
from crsm.evaluation.lent_planners import LentPlanners
from crsm.model import save_checkpoint
from crsm.planners import Arrivals
from jobs import benchmark_reasoning, verify_steering
from jobs.benchmark_reasoning import parse_lags
from jobs.checkpoints import load_with_settings, merge_settings
from jobs.command import invoke
from jobs.verify_steering import parse_rates
from tests.fixtures import FakePlanners, a_request, make_plan, tiny_checkpoint, tiny_config

FEW = ("--problems", "4", "--set", "sampling.max_tokens=7", "--set", "deliberation.injection_rate=0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(tiny_checkpoint(), path / "tiny")
    return path / "tiny"


@pytest.fixture
def job(folder, capsys):
    """Runs a job on the tiny checkpoint: exit status, its object (None without one), standard error."""

    def call(module, *args):
        status = invoke(module.main, ["--checkpoint", str(folder), *map(str, args)])
        found = capsys.readouterr()
        return status, json.loads(found.out) if found.out else None, found.err

    return call


# ------------------------------------------------------------------------------------------------ benchmark_reasoning


def test_the_benchmark_writes_every_figure_by_its_name(job):
    status, record, err = job(benchmark_reasoning, *FEW, "--lag", "1", "--seed", "7", "--json", "-")
    assert status == 0
    assert record["job"] == "benchmark_reasoning"
    assert set(record) == {"job", "commit", "config", "seed", "machine", "results"}
    results = record["results"]
    assert (record["seed"], results["lag"], results["problems"], results["threads"]) == (7, 1, 4, 1)
    for system in ("system1", "system2"):
        assert 0 <= results[system]["accuracy"] <= 1
        assert results["tokens_per_second"][system] > 0
    assert 0 <= results["mcnemar_p"] <= 1
    assert 0 <= results["plan_hit_rate"] <= 1
    assert set(results["controls"]) == set(CONTROLS)
    assert all("accuracy" in figures for figures in results["controls"].values())
    assert results["controls"]["gate_zero"]["identical"] is True
    assert "lags" not in results
    assert "silent tokens" in err


def without_times(value):
    timed = ("tokens_per_second", "times")
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in timed and key != "planners"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_two_runs_and_planners_in_threads_give_the_same_figures(job):
    options = (*FEW, "--lag", "1", "--controls", "oracle,random_write", "--json", "-")
    first, second, threads = (
        job(benchmark_reasoning, *options, *more)[1]["results"] for more in ((), (), ("--planners", "threads"))
    )
    assert without_times(first) == without_times(second) == without_times(threads)
    assert threads["planners"] == "threads"


@pytest.mark.ray
def test_planner_actors_give_the_same_figures(job):
    options = (*FEW, "--lag", "0,1", "--controls", "none", "--json", "-")
    inline = job(benchmark_reasoning, *options)[1]["results"]
    actors = job(benchmark_reasoning, *options, "--planners", "actors")[1]["results"]
    assert actors["system2"]["accuracy"] == inline["system2"]["accuracy"]
    assert without_times(actors) == without_times(inline)


def test_several_lags_give_a_result_each_and_the_first_on_top(job):
    _, record, _ = job(benchmark_reasoning, *FEW, "--lag", "2,0", "--lag", "1", "--controls", "none", "--json", "-")
    results = record["results"]
    assert [entry["lag"] for entry in results["lags"]] == [2, 0, 1]
    assert results["lag"] == 2
    assert results["system2"] == results["lags"][0]["system2"]


def test_settings_change_the_task_and_the_search(job):
    options = (*FEW, "--controls", "none", "--json", "-")
    _, record, _ = job(
        benchmark_reasoning, *options, "--set", "tasks.path_star.length=2", "--set", "search.simulations=3"
    )
    assert record["config"]["tasks"][0]["length"] == 2
    plans = record["results"]["plans"]
    assert plans["simulations"] == 3 * (plans["requests"] - plans["outcomes"].get("ended", 0))


def test_accuracy_against_compute_is_measured_and_drawn(job, tmp_path):
    picture = tmp_path / "compute.png"
    _, record, err = job(
        benchmark_reasoning, *FEW, "--controls", "none", "--compute", "--figure", picture, "--json", "-"
    )
    methods = record["results"]["compute"]["methods"]
    assert [point["budget"] for point in methods["best_of"]] == [1, 2, 4, 8, 16]
    assert [point["budget"] for point in methods["system_2"]] == [8, 16, 32, 64]
    assert set(methods) == {"system_2", "best_of", "self_consistency", "beam_search"}
    for points in methods.values():
        costs = [point["multiply_adds"] for point in points]
        assert costs == sorted(costs)
    assert methods["self_consistency"][0]["samples"] == pytest.approx(1.0, rel=0.2)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "costs as samples" in err


# --------------------------------------------------------------------------------------------------- verify_steering


def test_verify_steering_reports_follow_rates_gates_and_stability(job):
    options = ("--problems", "3", "--rate", "0.1,0.5", "--tokens", "40", "--set", "sampling.max_tokens=7")
    status, record, err = job(verify_steering, *options, "--json", "-")
    assert status == 0
    found = record["results"]["tasks"]["path_star"]
    # The answer has 6 tokens; behind each of its first 5 there is something to plan.
    assert {(row["position"], row["rate"]) for row in found["rows"]} == {(p, r) for p in range(5) for r in (0.1, 0.5)}
    assert set(found["audit"]) == {f"{line}, rate {rate}" for line in ("right", "wrong") for rate in (0.1, 0.5)}
    assert len(found["gates"]["layers"]) == 2
    stability = record["results"]["stability"]
    assert [row["write"] for row in stability] == ["writer", "random", "adversarial"]
    assert all(row["bounded"] and row["max_ratio"] <= 1 for row in stability)
    assert "a write before every token" in err


def test_a_state_that_grows_is_a_failure(job, monkeypatch):
    from crsm.evaluation import steering_audit

    monkeypatch.setattr(steering_audit, "inject", lambda ssm, write, alpha: 1.5 * ssm)
    status, _, err = job(verify_steering, "--problems", "2", "--tokens", "12", "--set", "sampling.max_tokens=4")
    assert status == 1
    assert "a state grew under the writes writer, random, adversarial" in err


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        (benchmark_reasoning, ["--task", "chess"], "task = 'chess'; allowed: path_star"),
        (benchmark_reasoning, ["--lag", "-1"], "lag = '-1'; allowed: whole numbers from 0 on"),
        (benchmark_reasoning, ["--lag", "1,,2"], "lag = ''; allowed"),
        (benchmark_reasoning, ["--controls", "placebo"], "control 'placebo'; allowed: all, none, gate_zero"),
        (benchmark_reasoning, ["--problems", "0"], "'--problems'"),
        (benchmark_reasoning, ["--figure", "x.png"], "--figure 'x.png' draws what --compute measures"),
        (benchmark_reasoning, ["--compute", "--figure", "x.gif"], "ending 'gif'; allowed: pdf, png, svg"),
        (benchmark_reasoning, ["--set", "deliberation.injection_rate=2"], "injection_rate = 2: .*less than"),
        (benchmark_reasoning, ["--set", "model.backbone.n_layer=3"], "n_layer = 3; allowed: 2, for which"),
        (benchmark_reasoning, ["--planners", "threads", "--set", "planners.count=0"], "planners.count = 0; allowed"),
        (verify_steering, ["--rate", "1.5"], "rate = '1.5'; allowed: numbers from 0 to 1"),
        (verify_steering, ["--rate", "much"], "rate = 'much'; allowed: numbers from 0 to 1"),
        (verify_steering, ["--task", "chess"], "task = 'chess'; allowed: path_star"),
    ],
)
def test_a_mistake_is_one_line(job, module, args, expected):
    status, record, err = job(module, *args)
    assert (status, record) == (2, None)
    assert err.count("\n") == 1, err
    assert re.match(rf"error: .*{expected}", err), err


def test_lags_and_rates_are_read_from_lists():
    assert parse_lags(None) == []
    assert parse_lags(["0, 1,2", "1", "6"]) == [0, 1, 2, 6]
    assert parse_rates(["0.1,1", "0"]) == [0.1, 1.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ settings


def test_a_checkpoints_settings_are_changed_by_file_then_set_then_seed(folder, tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("search: {simulations: 5}\ndeliberation: {lag: 3, max_lag: 4}\nseed: 1\n")
    settings = load_with_settings(folder, file, ["deliberation.lag=6"], seed=9).config
    assert (settings.search.simulations, settings.search.num_actions) == (5, 4)  # the second is the checkpoint's
    assert (settings.deliberation.lag, settings.deliberation.max_lag, settings.deliberation.plan_length) == (6, 4, 3)
    assert settings.seed == 9
    assert settings.model.backbone.vocab_size == tiny_checkpoint().tokenizer.vocab_size


def test_the_checkpoints_own_settings_change_nothing(folder, tmp_path):
    saved = load_with_settings(folder).config
    file = tmp_path / "same.yaml"
    file.write_text(dump_config(saved))
    assert merge_settings(saved, file) == saved


def test_only_the_world_model_that_plans_may_be_changed():
    saved = tiny_config()
    assert merge_settings(saved, overrides=["model.world_model.kind=exact"]).model.world_model.kind == "exact"
    with pytest.raises(ValueError, match=r"model\.world_model\.width = 8; allowed: 24, for which the checkpoint"):
        merge_settings(saved, overrides=["model.world_model.width=8"])
    with pytest.raises(ValueError, match=r"tokenizer\.kind = 'bpe'; allowed: 'closed'"):
        merge_settings(saved, overrides=["tokenizer.kind=bpe"])


def test_lent_planners_come_back_without_anything_under_way():
    checkpoint = tiny_checkpoint()
    inner = FakePlanners(lambda request: [make_plan(request, checkpoint)] if request.request_id % 2 else None)
    lent = LentPlanners(inner)
    lent.submit([a_request(request_id=number) for number in range(4)])
    assert len(lent.wait([1]).plans) == 1
    lent.close()
    assert inner.waits == [(1,), (0, 2, 3)]
    assert inner.poll() == Arrivals()
    lent.close()
    assert len(inner.waits) == 2
