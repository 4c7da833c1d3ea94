"""Ablations without Ray: settings and spaces, what a trial measures, the table, what is made of it, mistakes."""

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.evaluation.comparison import compare
from crsm.evaluation.figures import check_figure_path
from crsm.evaluation.statistics import wilson_interval
from crsm.model import save_checkpoint
from crsm.planners import Arrivals
from crsm.tasks import build_task
from crsm.tasks.base import problems as draw_problems
from crsm.types import PlanRequest
from jobs import ablate
from jobs.ablation import space as spaces
from jobs.ablation.cheapest import cheapest, design, fit
from jobs.ablation.checks import is_silent, lag_trend, silence
from jobs.ablation.few_planners import FewPlanners
from jobs.ablation.figures import draw_all, heat_map_keys
from jobs.ablation.report import report, verdicts
from jobs.ablation.settings import AblationConfig, ResourcesConfig, load_ablation, shrink
from jobs.ablation.space import (
    KEYS,
    PATHS,
    PLANNERS,
    Range,
    apply_point,
    corner,
    draw,
    grid,
    own_value,
    parse_space,
    reference,
)
from jobs.ablation.sweep import append_record, check_resources, complete_points, read_records
from jobs.ablation.table import Pooled, Record, figures, paired_difference, pool, rows, write_table
from jobs.ablation.trial import Bench, Tally, parts
from jobs.command import invoke
from tests.fixtures import TASK, tiny_checkpoint, tiny_config

SETTINGS = tiny_config()


def tally(right: int, problems: int = 10, **changes) -> Tally:
    verdicts_of = "1" * right + "0" * (problems - right)
    fields = {"correct": verdicts_of, "system1_correct": "1" * 3 + "0" * (problems - 3), "identical": False}
    fields |= {"multiply_adds": 100 * problems, "system1_multiply_adds": 10 * problems}
    return Tally(**(fields | changes))


# -------------------------------------------------------------------------------------------------------- the settings


def write(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_file_holds_the_sweep_beside_changes_of_the_checkpoints_settings(tmp_path):
    path = write(tmp_path, "ablation: {space: {lag: [0, 1]}, seeds: [4]}\nsearch: {simulations: 32}\n")
    asked = load_ablation(path, ["ablation.problems=7", "deliberation.lag=3", "ablation.resources.num_cpus=2"])
    assert asked.ablation.space == {"lag": [0, 1]} and asked.ablation.seeds == (4,)
    assert (asked.ablation.problems, asked.ablation.resources.num_cpus) == (7, 2.0)
    assert asked.stated == {"search": {"simulations": 32}}
    assert asked.overrides == ("deliberation.lag=3",)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("ablation: {seed: [1]}", [], r"unknown key 'ablation.seed'; allowed: checkpoint, concurrent, controls, "),
        ("ablation: {resources: {cpus: 1}}", [], r"unknown key 'ablation.resources.cpus'; allowed: num_cpus, num_gpus"),
        ("ablation: 3", [], "ablation = 3; allowed: a mapping"),
        ("search: {simulation: 4}", [], r"unknown key 'search.simulation'; allowed: gumbel_"),
        ("ablation: {seeds: [1, 1]}", [], r"seeds = \[1, 1\]; allowed: at least one, each once"),
        ("ablation: {name: a/b}", [], "name = 'a/b'; allowed: the name of one folder"),
        ("ablation: {method: best}", [], "ablation.method = 'best': Input should be 'grid', 'random' or 'optuna'"),
        ("ablation: {controls: [placebo]}", [], "ablation.controls.0 = 'placebo': Input should be 'gate_zero', "),
        ("", ["ablation.problems=0"], "ablation.problems = 0: Input should be greater than or equal to 1"),
        ("", ["ablation.smoke.deep=1"], "'ablation.smoke' has no keys"),
        ("ablation: {scheduler: asha, problems: 3}", [], "rungs = 4 of problems = 3; allowed: at least one problem"),
        ("ablation: {scheduler: asha, method: optuna}", [], "several seeds; allowed: one seed, or scheduler = 'all'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(tmp_path, text, overrides, expected):
    with pytest.raises(ValueError, match=expected):
        load_ablation(write(tmp_path, text), overrides)


def test_every_shipped_sweep_is_valid_for_the_shipped_checkpoint():
    paths = sorted((ablate.Path(__file__).parents[2] / "configs").glob("ablate_*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        sweep = ablate.prepare(path, [], None, None)
        assert sweep.ablation.name == path.stem.removeprefix("ablate_")
    lag_rate = ablate.prepare(paths[0].with_name("ablate_lag_rate.yaml"), [], None, None)
    planned = ablate.plan(lag_rate)
    assert len(planned) == 9 * 7 * 3 and [plan.trial for plan in planned] == list(range(189))
    assert {plan.point["injection_rate"] for plan in planned if plan.controls} == {0.05}
    assert {plan.point["lag"] for plan in planned if plan.controls} == set(range(9))


def test_smoke_is_a_two_by_two_corner_with_one_seed():
    space = {"lag": (0, 1, 2), "injection_rate": (0.0, 0.1, 0.2), "hypotheses": (1, 2)}
    assert corner(space) == {"lag": (0, 1), "injection_rate": (0.0, 0.1), "hypotheses": (1,)}
    small = shrink(AblationConfig(problems=500))
    assert (small.seeds, small.problems) == ((1,), 40)
    assert shrink(AblationConfig(problems=5)).problems == 5


# ----------------------------------------------------------------------------------------------------------- the space


def test_every_key_of_the_space_changes_the_setting_that_it_names():
    values = {
        "lag": 3,
        "injection_rate": 0.25,
        "channel": "policy",
        "hypotheses": 2,
        "plan_every": 3,
        "plan_length": 2,
        "max_plans": 1,
        "simulations": 5,
        "search_policy": "gumbel",
        "max_depth": 3,
        "uncertainty_penalty": 0.5,
        "world_model": "exact",
        "trust_horizon": 2,
    }
    assert {*values, PLANNERS} == set(KEYS), "planners are no setting of the checkpoint"
    config, horizon = apply_point(values, SETTINGS, None)
    for key, value in values.items():
        assert own_value(key, SETTINGS, None) != value
        assert own_value(key, config, horizon) == value


def test_no_key_of_the_space_is_a_column_of_figures():
    assert not set(KEYS) & set(figures(tally(3), ["oracle"]))


@pytest.mark.parametrize(
    ("tree", "ranges", "expected"),
    [
        ({}, False, "ablation.space is empty; allowed: at least one of lag, injection_rate"),
        ({"lags": [1]}, False, "unknown key 'lags'; allowed: lag, injection_rate, channel"),
        ({"planners": [0]}, False, "ablation.space.planners = 0; allowed: whole numbers from 1 on, or null"),
        ({"planners": [True]}, False, "ablation.space.planners = True; allowed: whole numbers from 1 on, or null"),
        (
            {"lag": [-1]},
            False,
            r"ablation.space.lag: deliberation.lag = -1: Input should be greater than or equal to 0",
        ),
        (
            {"injection_rate": [1.5]},
            False,
            "deliberation.injection_rate = 1.5: Input should be less than or equal to 1",
        ),
        ({"channel": ["loud"]}, False, "deliberation.channel = 'loud': Input should be 'state'"),
        ({"trust_horizon": [0]}, False, "ablation.space.trust_horizon = 0; allowed: whole numbers from 1 on, or null"),
        ({"lag": 3}, False, "ablation.space.lag = 3; allowed: a list of values"),
        ({"lag": []}, False, r"ablation.space.lag = \[\]; allowed: a list of values"),
        ({"lag": [1, 1]}, False, "ablation.space.lag: 1 twice"),
        ({"injection_rate": [0, 0.0]}, False, "0.0 twice"),
        ({"lag": {"low": 0, "high": 4}}, False, "allowed: a list of values, or method: random or optuna"),
        ({"lag": {"low": 0, "high": -4}}, True, "deliberation.lag = -4: Input should be greater"),
        ({"lag": {"low": 4, "high": 4}}, True, "allowed: low < high"),
        ({"lag": {"low": 0, "high": 4, "log": True}}, True, "allowed: 0 < low < high"),
        ({"lag": {"low": 0, "hi": 4}}, True, "allowed: numbers low and high, and log: true"),
        ({"lag": {"low": "a", "high": 4}}, True, "allowed: numbers low and high"),
    ],
)
def test_a_wrong_space_is_refused_in_the_words_of_the_setting(tree, ranges, expected):
    with pytest.raises(ValueError, match=expected):
        parse_space(tree, SETTINGS, ranges=ranges)


def test_values_become_what_their_setting_has():
    space = parse_space({"injection_rate": [0, 1], "lag": [1]}, SETTINGS, ranges=False)
    assert space == {"injection_rate": (0.0, 1.0), "lag": (1,)}
    assert isinstance(space["injection_rate"][0], float)
    range_of_rates = parse_space({"injection_rate": {"low": 0, "high": 1}}, SETTINGS, ranges=True)["injection_rate"]
    assert isinstance(range_of_rates, Range) and not range_of_rates.whole


def test_a_grid_is_the_product_in_the_order_of_the_keys():
    assert grid({"lag": (1, 0), "channel": ("state", "off")}) == [
        {"lag": 1, "channel": "state"},
        {"lag": 1, "channel": "off"},
        {"lag": 0, "channel": "state"},
        {"lag": 0, "channel": "off"},
    ]


@given(seed=st.integers(0, 1000), count=st.integers(1, 20), low=st.integers(1, 9), width=st.integers(1, 50))
def test_drawn_points_lie_in_the_space_and_a_longer_draw_begins_the_same(seed, count, low, width):
    space = {
        "lag": Range(low, low + width),
        "simulations": Range(low, low + width, log=True),
        "injection_rate": Range(0.001, 0.5, log=True),
        "channel": ("state", "policy"),
    }
    points = draw(space, count, seed)
    assert draw(space, count + 3, seed)[:count] == points
    for point in points:
        for key in ("lag", "simulations"):
            assert isinstance(point[key], int) and low <= point[key] <= low + width
        assert 0.001 <= point["injection_rate"] <= 0.5
        assert point["channel"] in ("state", "policy")
        apply_point(point, SETTINGS, None)


def test_the_reference_is_the_checkpoints_own_value_or_the_nearest():
    space = {"lag": (0, 5), "injection_rate": (0.0, 0.2), "channel": ("policy", "off"), "trust_horizon": (2, 4)}
    assert reference(space, SETTINGS, None) == {
        "lag": 0,
        "injection_rate": 0.2,
        "channel": "policy",
        "trust_horizon": 2,
    }
    assert reference(space, SETTINGS, 5)["trust_horizon"] == 4
    assert spaces.is_reference({"lag": 5, "channel": "off"}, {"lag": 0, "channel": "off"})
    assert not spaces.is_reference({"lag": 0, "channel": "policy"}, {"lag": 0, "channel": "off"})


def test_a_key_stands_where_its_path_says():
    tree = SETTINGS.model_dump()
    for path in PATHS.values():
        node = tree
        for part in path.split("."):
            node = node[part]


# ------------------------------------------------------------------------------------------------------------- a trial


@pytest.fixture(scope="module")
def bench():
    settings = tiny_config()
    sampling = settings.sampling.model_copy(update={"max_tokens": 7})
    return Bench(tiny_checkpoint(settings.model_copy(update={"sampling": sampling})), "path_star", 6)


def test_a_trial_has_the_figures_of_the_comparison(bench):
    found = bench.measure({"lag": 1, "injection_rate": 0.5}, 7, slice(None), ("random_write", "oracle"))
    settings = bench.settings
    task = build_task(TASK)
    expected = compare(
        bench.checkpoint,
        task,
        draw_problems(task, 7, "test", 6),
        deliberation=settings.deliberation.model_copy(update={"lag": 1, "injection_rate": 0.5}),
        search=settings.search,
        sampling=settings.sampling.model_copy(update={"seed": 7}),
        seed=7,
        controls=("random_write", "oracle"),
    )
    assert found.accuracy == expected["system2"]["accuracy"]
    assert found.system1_correct.count("1") / 6 == expected["system1"]["accuracy"]
    assert found.hits / found.settled == expected["plan_hit_rate"]
    assert {name: count / 6 for name, count in found.controls.items()} == {
        name: figures["accuracy"] for name, figures in expected["controls"].items()
    }
    assert (found.requests, found.injections) == (expected["plans"]["requests"], expected["plans"]["injections"])
    assert found.injections > 0 and not found.identical


def test_without_a_rate_the_answers_are_system_1s_bit_for_bit(bench):
    for lag in (0, 1, 3):
        assert bench.measure({"lag": lag, "injection_rate": 0.0}, 7, slice(None)).identical
    assert bench.measure({"channel": "off"}, 7, slice(None)).identical


@settings(max_examples=8)
@given(cut=st.integers(1, 5), lag=st.integers(0, 2))
def test_the_parts_of_a_trial_add_up_to_the_whole(bench, cut, lag):
    point = {"lag": lag, "injection_rate": 0.5}
    whole = bench.measure(point, 3, slice(None), ("oracle",))
    halves = [bench.measure(point, 3, part, ("oracle",)) for part in (slice(0, cut), slice(cut, 6))]
    assert Tally() + halves[0] + halves[1] == whole


def test_a_point_leaves_the_checkpoint_as_it_was(bench):
    before = bench.checkpoint.config
    bench.measure({"uncertainty_penalty": 2.0, "world_model": "exact", "trust_horizon": 2}, 7, slice(0, 1))
    assert bench.checkpoint.config is before
    assert bench.checkpoint.model.critic.uncertainty_penalty == before.model.critic.uncertainty_penalty


def test_planners_without_end_change_nothing_and_few_of_them_shed_what_they_cannot_do(bench):
    point, seed = {"lag": 2, "injection_rate": 0.5}, 7
    free = bench.measure(point, seed, slice(None))
    assert bench.measure(point | {"planners": None}, seed, slice(None)) == free
    # A plan takes 2 tokens, and one is asked for at every token.
    assert bench.measure(point | {"planners": 2}, seed, slice(None)) == free
    one = bench.measure(point | {"planners": 1}, seed, slice(None))
    assert one.requests == free.requests and one.simulations == free.simulations / 2
    assert one.multiply_adds - one.system1_multiply_adds == (free.multiply_adds - free.system1_multiply_adds) / 2
    # Twice the work takes 4 tokens, and the plan is wanted after 2.
    slow = bench.measure(point | {"planners": 9, "hypotheses": 2}, seed, slice(None))
    assert slow.simulations == slow.hits == 0 and slow.identical
    assert slow.multiply_adds == slow.system1_multiply_adds


@given(
    count=st.integers(1, 4),
    plan_tokens=st.floats(0.1, 5.0),
    asked=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 6)), max_size=30),
)
def test_no_planner_does_two_plans_at_a_time_and_what_is_taken_is_ready_at_its_target(count, plan_tokens, asked):
    inner = Noting()
    planners = FewPlanners(inner, count, plan_tokens)
    position, sent = {"a": 0, "b": 0}, []
    for index, (generation, step, lag) in enumerate(asked):
        position[generation] += step
        sent.append(request(index, generation, position[generation], lag))
        planners.submit([sent[-1]])
    arrived = planners.wait([one.request_id for one in sent])
    taken = {one.request_id for one in inner.sent}
    assert taken | {one.request_id for one in arrived.shed} == {one.request_id for one in sent}
    assert taken.isdisjoint(one.request_id for one in arrived.shed)
    assert not planners.poll().shed, "each is told once"
    for generation in "ab":
        free_at = [0.0] * count
        for one in (one for one in sent if one.generation_id == generation):
            done = max(float(one.position), min(free_at)) + plan_tokens
            assert (one.request_id in taken) == (done <= one.target)
            if one.request_id in taken:
                free_at[free_at.index(min(free_at))] = done


class Noting:
    """Planners that only note what they are asked."""

    def __init__(self):
        self.sent = []

    def submit(self, requests):
        self.sent += requests

    def poll(self):
        return Arrivals()

    def wait(self, request_ids):
        assert set(request_ids) <= {one.request_id for one in self.sent}
        return Arrivals()


def request(index, generation, position, lag):
    nothing = np.zeros((0,), dtype=np.float32)
    return PlanRequest(index, generation, position, position + lag, 0, nothing, nothing)


def test_the_uncertainty_penalty_reaches_the_search(bench):
    seen = []
    critic = type(bench.checkpoint.model.critic)
    original = critic.consensus_weights_L.fget

    def look(self):
        seen.append(self.uncertainty_penalty)
        return original(self)

    critic.consensus_weights_L = property(look)
    try:
        bench.measure({"uncertainty_penalty": 0.75}, 7, slice(0, 1))
    finally:
        critic.consensus_weights_L = property(original)
    assert set(seen) == {0.75}


@given(problems=st.integers(1, 300), rungs=st.integers(1, 12))
def test_parts_cover_all_problems_once(problems, rungs):
    covered = [index for part in parts(problems, rungs) for index in range(problems)[part]]
    assert covered == list(range(problems))


# ----------------------------------------------------------------------------------------------------------- the table


def records(accuracy_of=lambda lag, rate: 8, seeds=(1, 2), lags=(0, 1, 2), rates=(0.0, 0.1), **changes):
    found = []
    for lag in lags:
        for rate in rates:
            for seed in seeds:
                right = accuracy_of(lag, rate)
                controls = {"oracle": 10} if rate == 0.1 else {}
                found.append(
                    Record(
                        len(found),
                        {"lag": lag, "injection_rate": rate},
                        seed,
                        tally(right, identical=rate == 0.0, controls=controls, **changes),
                    )
                )
    return found


def test_a_row_holds_the_figures_of_its_trial():
    (row,) = rows(
        [Record(3, {"lag": 2}, 9, tally(8, hits=6, settled=8, controls={"oracle": 9}))], ["oracle", "gate_zero"]
    )
    assert (row["trial"], row["seed"], row["lag"], row["right"], row["problems"]) == (3, 9, 2, 8, 10)
    assert (row["accuracy"], row["system1_accuracy"], row["plan_hit_rate"]) == (0.8, 0.3, 0.75)
    assert (row["accuracy_low"], row["accuracy_high"]) == wilson_interval(8, 10)
    assert row["difference"] == pytest.approx(0.5)
    assert (row["multiply_adds_per_answer"], row["system1_multiply_adds_per_answer"]) == (100, 10)
    assert (row["control_oracle"], row["control_gate_zero"]) == (0.9, None)
    assert row["finished"] is True and row["identical_to_system1"] is False


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_difference_is_that_of_the_means_and_lies_in_its_interval(pairs):
    a, b = ("".join("01"[side] for side in column) for column in zip(*pairs, strict=True))
    gap, low, high = paired_difference(a, b)
    assert gap == pytest.approx((a.count("1") - b.count("1")) / len(pairs))
    assert low <= gap <= high
    back = paired_difference(b, a)
    assert back == pytest.approx((-gap, -high, -low))


def test_the_interval_of_a_paired_difference_is_the_normal_one():
    # 6 problems only the first solved, 2 only the second, of 20.
    gap, low, high = paired_difference("1" * 6 + "0" * 2 + "1" * 12, "0" * 6 + "1" * 2 + "1" * 12)
    deviation = np.std([1] * 6 + [-1] * 2 + [0] * 12) / np.sqrt(20)
    assert gap == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.2 - 1.96 * deviation, 0.2 + 1.96 * deviation))


def test_seeds_are_pooled_in_the_order_of_the_plan_whatever_order_they_ended_in():
    found = records()
    pooled = pool(found)
    assert pool(found[::-1]) == pooled
    assert [point.point for point in pooled] == grid({"lag": (0, 1, 2), "injection_rate": (0.0, 0.1)})
    assert all(point.tally.problems == 20 for point in pooled)
    assert pooled[1].tally.controls == {"oracle": 20}


def test_parquet_and_csv_hold_the_same_rows(tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    table = rows(records(), ["oracle"])
    table[0]["trust_horizon"], table[1]["trust_horizon"] = None, 3
    table = [{"trust_horizon": None} | row for row in table]
    parquet, csv = write_table(table, tmp_path)
    assert pyarrow.parquet.read_table(str(parquet)).to_pylist() == table
    again = pyarrow.csv.read_csv(str(csv)).to_pylist()
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in table]
    assert list(again[0]) == list(table[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.parquet"]


def test_records_survive_a_line_that_was_cut_short(tmp_path):
    found = records()[:3]
    for record in found:
        append_record(tmp_path, record)
    path = tmp_path / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert read_records(tmp_path) == found[:2]
    append_record(tmp_path, found[2])
    assert read_records(tmp_path) == found
    assert read_records(tmp_path / "nowhere") == []


def test_what_optuna_had_begun_is_finished_first():
    found = [Record(0, {"lag": 1}, 1, tally(8)), Record(1, {"lag": 1}, 2, tally(6)), Record(2, {"lag": 4}, 2, tally(3))]
    complete, missing = complete_points(found, (1, 2))
    assert complete == [({"lag": 1}, pytest.approx(0.7))]
    assert [(plan.trial, plan.point, plan.seed) for plan in missing] == [(3, {"lag": 4}, 1)]


# ----------------------------------------------------------------------------------------------------------- the checks


def test_silence_is_broken_by_one_answer_that_differs():
    settings = tiny_config()
    pooled = pool(records())
    assert silence(pooled, settings) == {"points": 3, "problems": 60, "identical": True, "broken": []}
    broken = [
        Pooled(point.point, dataclasses.replace(point.tally, identical=point.point["lag"] != 1)) for point in pooled
    ]
    assert silence(broken, settings)["broken"] == [{"lag": 1, "injection_rate": 0.0}]
    loud = [point for point in pooled if point.point["injection_rate"]]
    assert silence(loud, settings)["identical"] is None
    assert is_silent({"channel": "off"}, settings)
    assert not is_silent({"injection_rate": 0.0, "channel": "policy"}, settings)


def test_a_rise_with_the_lag_counts_only_beyond_the_interval_of_the_shorter_one():
    assert lag_trend(pool(records(lambda lag, rate: 9 - lag))) is not None
    falling = lag_trend(pool(records(lambda lag, rate: 9 - lag)))
    assert falling["holds"] and [group["largest_rise"]["rise"] for group in falling["groups"]] == [-0.1, -0.1]
    rising = lag_trend(pool(records(lambda lag, rate: 2 + 3 * lag if rate else 5)))
    assert not rising["holds"]
    assert [(group["settings"]["injection_rate"], group["holds"]) for group in rising["groups"]] == [
        (0.0, True),
        (0.1, False),
    ]
    assert rising["groups"][1]["largest_rise"]["lags"] == [0, 2]
    assert rising["groups"][1]["largest_rise"]["rise"] == pytest.approx(0.6)
    assert lag_trend([Pooled({"channel": "off"}, tally(3))]) is None
    # 8 of 20 reach up to 0.61: 12 lie within, 13 do not.
    assert wilson_interval(8, 20)[1] == pytest.approx(0.613, abs=1e-3)
    # 19 of 20 reach up to 0.991, and all 20 are one more: that is chance.
    for shorter, longer, holds in ((8, 12, True), (8, 13, False), (19, 20, True)):
        pair = [Pooled({"lag": 0}, tally(shorter, 20)), Pooled({"lag": 1}, tally(longer, 20))]
        assert lag_trend(pair)["holds"] is holds


# -------------------------------------------------------------------------------------------------------------- the fit


def points(cells, problems=400):
    """From ``{(lag, simulations): (accuracy, cost)}``."""
    found = []
    for (lag, simulations), (accuracy, cost) in cells.items():
        right = round(accuracy * problems)
        counts = tally(right, problems, multiply_adds=cost * problems, system1_multiply_adds=problems)
        found.append(Pooled({"lag": lag, "simulations": simulations}, counts))
    return found


CELLS = {
    (0, 8): (0.80, 10),
    (0, 64): (0.99, 50),
    (1, 8): (0.80, 11),
    (1, 64): (0.98, 51),
    (2, 8): (0.40, 12),
    (2, 64): (0.97, 52),
}


def test_two_settings_of_few_values_are_fitted_cell_by_cell():
    found = fit(points(CELLS))
    measured = [accuracy for accuracy, _ in CELLS.values()]
    assert found.accuracy == pytest.approx(measured, abs=0.01)
    assert (found.low < found.accuracy).all() and (found.accuracy < found.high).all()
    wider = fit(points(CELLS, problems=40))
    assert (wider.high - wider.low > found.high - found.low).all()


def test_the_cheapest_setting_that_surely_reaches_the_target_is_named():
    answers = cheapest(points(CELLS), [0.7, 0.95, 0.9999])["targets"]
    assert answers[0]["cheapest"]["setting"] == {"lag": 0, "simulations": 8}
    assert answers[0]["longest_lag"]["setting"] == {"lag": 2, "simulations": 64}
    # Of 50, 51 and 52 the first: within 1 % no other is as accurate; 0.97 of 400 is not surely 0.95.
    assert answers[1]["cheapest"]["setting"] == {"lag": 0, "simulations": 64}
    assert answers[1]["longest_lag"]["setting"]["lag"] == 1
    assert answers[2]["cheapest"] is None and answers[2]["reached_by"] == 0
    assert answers[1]["cheapest"]["over_system1"] == 50


def test_of_settings_that_cost_the_same_the_most_accurate_is_named():
    same = {(0, 8): (0.92, 100.4), (1, 8): (0.96, 100.0), (0, 64): (0.99, 100.9), (1, 64): (0.98, 150.0)}
    assert cheapest(points(same), [0.8])["targets"][0]["cheapest"]["setting"] == {"lag": 0, "simulations": 64}


def test_answers_that_are_all_right_or_all_wrong_keep_the_fit_finite():
    found = fit(points({(0, 8): (1.0, 1), (0, 64): (1.0, 2), (1, 8): (0.0, 1), (1, 64): (1.0, 2)}, problems=1500))
    assert np.isfinite(found.accuracy).all()
    assert found.accuracy == pytest.approx([1, 1, 0, 1], abs=0.01)


def test_a_setting_with_many_values_enters_as_a_number():
    many = [Pooled({"injection_rate": index / 40, "channel": "state"}, tally(5)) for index in range(40)]
    assert design(many).shape == (40, 3)  # 1, the number, its square; a setting with one value says nothing
    few = [Pooled({"injection_rate": index / 4, "channel": "state"}, tally(5)) for index in range(4)]
    assert design(few).shape == (4, 5)


@given(st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_the_fit_ends_for_any_counts_and_stays_a_probability(right):
    cells = [(0, 8), (0, 64), (1, 8), (1, 64)]
    found = fit(
        [Pooled({"lag": lag, "simulations": sims}, tally(n, 20)) for (lag, sims), n in zip(cells, right, strict=True)]
    )
    assert ((found.low >= 0) & (found.high <= 1) & (found.low <= found.accuracy) & (found.accuracy <= found.high)).all()


# -------------------------------------------------------------------------------------------------- pictures and report


def concluded(tmp_path, found, controls=("oracle",), at=None):
    settings = AblationConfig(space={"lag": [0]}, controls=controls)
    sweep = ablate.Sweep(settings, tiny_checkpoint(), {}, at)
    return ablate.conclude(sweep, found, tmp_path, "python -m jobs.ablate"), settings


def test_a_sweep_leaves_a_table_pictures_and_a_report(tmp_path):
    found = records(lambda lag, rate: 9 - 2 * lag if rate else 3)
    results, settings = concluded(tmp_path, found, at={"lag": 1, "injection_rate": 0.1})
    assert results["files"] == ["table.parquet", "table.csv", "heat_map.png", "lag.png", "compute.png", "report.md"]
    for name in results["files"]:
        assert (tmp_path / name).stat().st_size > 0
    text = (tmp_path / "report.md").read_text()
    assert "    python -m jobs.ablate\n" in text
    assert "bit for bit: yes (3 points, 60 problems)" in text
    assert "does not rise with the lag by more than its 95 % interval, whatever" in text
    assert "![Right answers by two settings](heat_map.png)" in text
    assert text.count("\n| ") == 1 + 1 + 2 + 1 + 1 + 6  # headers, rules, groups of equal rates, points
    assert results["trials"] == len(results["table"]) == 12
    assert report(results, settings, ["heat_map.png"]).startswith("# Ablation ablation\n")
    json.dumps(results)


def test_what_does_not_hold_is_said():
    found = pool(records(lambda lag, rate: 2 + 3 * lag))
    broken = [Pooled(point.point, dataclasses.replace(point.tally, identical=False)) for point in found]
    lines = list(verdicts({"silence": silence(broken, SETTINGS), "lag_trend": lag_trend(broken)}))
    assert "NO, not at {'lag': 0, 'injection_rate': 0.0}" in lines[0]
    assert "but for 2 of 2 groups: injection rate 0; injection rate 0.1" in lines[1]


def test_drawn_points_and_single_settings_have_their_pictures(tmp_path):
    drawn = [
        Pooled({"simulations": index + 1, "search_policy": "puct" if index % 2 else "gumbel"}, tally(index % 10))
        for index in range(30)
    ]
    assert heat_map_keys(drawn) is None
    fitted = cheapest(drawn, [0.5])
    assert draw_all(drawn, None, (), fitted, "path_star", tmp_path) == ["compute.png", "settings.png"]
    alone = [Pooled({"channel": name}, tally(5)) for name in ("state", "off")]
    assert draw_all(alone, {"channel": "off"}, (), cheapest(alone, [0.9]), "t", tmp_path) == [
        "compute.png",
        "settings.png",
    ]
    check_figure_path(tmp_path / "compute.png")


# ------------------------------------------------------------------------------------------------------------- the job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(tiny_checkpoint(), path / "tiny")
    return path / "tiny"


@pytest.fixture
def job(folder, tmp_path, capsys, monkeypatch):
    """Runs the job up to where Ray would start: exit status, standard error."""

    def stop(*args):
        raise RuntimeError("all that can be checked was right")

    monkeypatch.setattr(ablate, "measure", stop)

    def call(text, *args):
        path = write(tmp_path, text)
        status = invoke(
            ablate.main, ["--config", str(path), "--checkpoint", str(folder), "--output", str(tmp_path / "out"), *args]
        )
        return status, capsys.readouterr().err

    return call


SPACE = "ablation: {space: {lag: [0, 1]}}"


@pytest.mark.parametrize(
    ("text", "args", "expected"),
    [
        (SPACE, ["--checkpoint", "nowhere"], "nowhere"),
        ("ablation: {space: {lag: [0]}, task: chess}", [], "task = 'chess'; allowed: path_star"),
        ("ablation: {space: {depth: [0]}}", [], "ablation.space: unknown key 'depth'; allowed: lag, injection_rate"),
        (
            "ablation: {space: {simulations: [0]}}",
            [],
            "search.simulations = 0: Input should be greater than or equal to 1",
        ),
        (SPACE, ["--set", "model.backbone.n_layer=3"], "n_layer = 3; allowed: 2, for which"),
        (SPACE, ["--set", "search.simulations=none"], "search.simulations = 'none': Input should be a valid integer"),
        (SPACE, ["--resume"], "nothing to resume in .*out; allowed: an output folder of this job"),
        (SPACE, ["--output", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_a_mistake_is_one_line(job, text, args, expected):
    status, err = job(text, *args)
    assert status == 2
    assert err.count("\n") == 1, err
    assert re.match(rf"error: .*{expected}", err), err


def test_optuna_that_is_not_installed_is_named_with_how_to_get_it(job, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, err = job("ablation: {space: {lag: [0, 1]}, method: optuna}")
    assert status == 2
    assert "Optuna is not installed; allowed: grid, random, or optuna after pip install 'crsm[tune]'" in err


def test_settings_of_another_sweep_are_not_resumed(job, tmp_path):
    with pytest.raises(RuntimeError, match="all that can be checked was right"):
        job(SPACE)
    status, err = job(SPACE, "--resume", "--set", "ablation.problems=9")
    assert status == 2
    assert "out was made with ablation.problems = 500; the settings ask 9; allowed: the same settings" in err
    status, err = job(SPACE, "--resume", "--set", "search.simulations=9")
    assert status == 2 and "search.simulations = 8; the settings ask 9" in err
    with pytest.raises(RuntimeError):  # what changes no trial may differ
        job(SPACE, "--resume", "--set", "ablation.concurrent=1", "--set", "ablation.targets=[0.5]")


def test_a_sweep_that_is_there_is_put_aside_and_anything_else_is_left_alone(job, tmp_path):
    with pytest.raises(RuntimeError):
        job(SPACE)
    (tmp_path / "out" / "table.csv").write_text("old")
    with pytest.raises(RuntimeError):
        job(SPACE)
    assert (tmp_path / "out.old-1" / "table.csv").read_text() == "old"
    (tmp_path / "out" / "sweep.json").unlink()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    status, err = job(SPACE)
    assert status == 2 and "holds something else; allowed: a new or empty folder" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_too_few_resources_are_named_at_once():
    nodes = [{"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}]
    check_resources(ResourcesConfig(num_cpus=8, num_gpus=1), nodes)
    with pytest.raises(
        ValueError, match="a trial asks 2 CPU and 2 GPU; the nodes of the cluster have 2 CPU and 0 GPU, 8 CPU and 1 GPU"
    ):
        check_resources(ResourcesConfig(num_cpus=2, num_gpus=2), nodes)
    with pytest.raises(
        ValueError, match=r"a trial asks 9 CPU; the nodes of the cluster have 2 CPU, 8 CPU. Allowed: what"
    ):
        check_resources(ResourcesConfig(num_cpus=9), nodes)
