"""What is read out of the counters of an engine and its planners: differences, rates, and a restart that takes nothing
back; and, on Ray, what Prometheus finds of a generator that no Serve started."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from actors.metrics import METRICS, Counts, GeneratorCounts, compare, exported, hand_on_run
from crsm.metrics import PlanMetrics
from crsm.types import Reason
from tests.actors.noted import Noted


def counters(tokens: int = 0, requests: int = 0, **changes: Any) -> dict[str, Any]:
    pool = {"planners": {"ready": 2}, "batches": 0, "search_seconds": 0.01, "restarts": 0} | changes.pop("pool", {})
    return {"tokens": tokens, "requests": requests, "outcomes": {}, "injections_per_layer": {}, "pool": pool} | changes


def test_between_two_looks_are_the_differences() -> None:
    before = counters(100, 10, outcomes={"on_time": 5}, injections_per_layer={"0": 5, "3": 2}, pool={"batches": 10})
    after = counters(
        160,
        20,
        outcomes={"on_time": 8, "shut": 2, "stale": 4, "ended": 7},
        injections_per_layer={"0": 7, "3": 2},
        pool={"batches": 110, "restarts": 1},
    )
    found = compare(before, after, 2.0)
    assert (found.tokens, found.requests, found.restarts) == (60, 10, 1)
    assert found.outcomes == {"on_time": 3, "shut": 2, "stale": 4, "ended": 7}
    assert found.injections == {"0": 2}
    assert found.hit_rate == pytest.approx(5 / 9), "what has ended counts neither way"
    assert found.utilisation == pytest.approx(100 * 0.01 / (2 * 2.0))


def test_utilisation_is_a_share_and_0_without_planners() -> None:
    assert compare(None, counters(pool={"batches": 10**6}), 1.0).utilisation == 1.0
    assert compare(None, counters(pool={"batches": 10, "planners": {}}), 1.0).utilisation == 0.0
    assert compare(None, counters(), 0.0).hit_rate is None


def test_a_generator_that_was_started_again_counts_from_nothing() -> None:
    old = counters(1000, 100, outcomes={"on_time": 90})
    new = counters(30, 3, outcomes={"on_time": 2})
    found = compare(old, new, 1.0)
    assert (found.tokens, found.requests, found.outcomes) == (30, 3, {"on_time": 2})


def test_what_is_handed_on_adds_up_to_the_generators_own_counters_over_a_restart() -> None:
    noted, now = Noted(), [0.0]
    generator = GeneratorCounts(noted, clock=lambda: now[0])  # type: ignore[arg-type]
    for found in (
        counters(10, 1, outcomes={"late": 1}, injections_per_layer={"1": 1}, pool={"planners": {"starting": 2}}),
        counters(50, 4, outcomes={"late": 3}, injections_per_layer={"1": 2}),
        counters(7, 1, outcomes={"late": 1}),  # another process
    ):
        now[0] += 5.0
        generator.look(found)
    assert noted.sums[("crsm_generator_tokens",)] == 57
    assert noted.sums["crsm_plan_outcomes", "late"] == 4 and noted.sums["crsm_injections", "1"] == 2
    assert noted.gauges["crsm_planners", "starting"] == 0, "a phase that nobody is in any more"
    assert noted.gauges[("crsm_planners_ready",)] == 2


def test_planners_without_an_engine_count_what_they_settled_and_nothing_else() -> None:
    noted = Noted()
    planners = GeneratorCounts(noted, clock=iter([0.0, 10.0]).__next__)  # type: ignore[arg-type]
    pool = {"planners": {"ready": 1}, "batches": 40, "search_seconds": 0.1, "restarts": 1, "in_time": 30, "shed": 4}
    planners.look({"pool": pool})
    assert noted.sums == {
        ("crsm_planner_answers", "in_time"): 30,
        ("crsm_planner_answers", "shed"): 4,
        ("crsm_planner_restarts",): 1,
    }
    assert noted.gauges[("crsm_planner_utilisation",)] == pytest.approx(0.4)
    assert ("crsm_plan_hit_rate",) not in noted.gauges


def test_an_engine_without_planner_actors_hands_on_its_whole_life() -> None:
    noted, metrics = Noted(), PlanMetrics(requests=5, tokens=9)
    metrics.outcomes.update({Reason.ON_TIME: 3, Reason.STALE: 1, Reason.ENDED: 1})
    metrics.injections_per_layer.update({0: 3, 2: 1})
    hand_on_run(noted, metrics.summary())  # type: ignore[arg-type]
    assert noted.sums == {
        ("crsm_generator_tokens",): 9,
        ("crsm_plan_requests",): 5,
        ("crsm_plan_outcomes", "on_time"): 3,
        ("crsm_plan_outcomes", "stale"): 1,
        ("crsm_plan_outcomes", "ended"): 1,
        ("crsm_injections", "0"): 3,
        ("crsm_injections", "2"): 1,
    }
    assert noted.gauges == {("crsm_plan_hit_rate",): pytest.approx(3 / 4)}


def test_where_there_is_no_ray_nothing_is_counted_and_nothing_fails() -> None:
    counts = Counts("nobody")
    for name, metric in METRICS.items():
        tags = dict.fromkeys(metric.tags, "x")
        {"counter": counts.add, "gauge": counts.set, "histogram": counts.observe}[metric.kind](name, 1.0, **tags)


def test_what_is_exported_is_looked_at_once_more_at_the_end_and_a_failed_look_is_not_the_last() -> None:
    looks, second = [], threading.Event()

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 1:
            raise RuntimeError("it is being restarted")
        second.set()

    with exported(look, interval=0.001):
        assert second.wait(10)
        before = len(looks)
    assert len(looks) > before


@pytest.mark.ray
def test_prometheus_finds_the_plans_of_a_generator_outside_of_serve() -> None:
    import ray

    from actors.cluster import start_ray
    from actors.generator import start_generator, stop_generator
    from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
    from tests.fixtures import tiny_checkpoint

    with start_ray("local", num_cpus=4, system_config={"metrics_report_interval_ms": 500}):
        (node,) = ray.nodes()
        endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        generator = start_generator(
            tiny_checkpoint(), PlannersConfig(count=1), EngineConfig(clock="virtual"), application="here"
        )
        try:
            ray.get(generator.wait_until_ready.remote())
            stream = generator.generate.remote([1, 2, 3], SamplingConfig(max_tokens=12), DeliberationConfig(lag=1))
            said = sum(len(ray.get(item)) for item in stream)
            asked = ray.get(generator.metrics.remote())["requests"]
            assert said and asked
            end = time.monotonic() + 60
            while (found := series(httpx.get(endpoint, timeout=10).text)).get("crsm_plan_requests_total") != asked:
                assert time.monotonic() < end, found
                time.sleep(0.2)
            assert found["crsm_generator_tokens_total"] == said
            assert found["crsm_plan_outcomes_total"] == asked
            assert found["crsm_planner_answers_total"] == asked
            assert found["crsm_planners_ready"] == 1
            assert 0 <= found["crsm_planner_utilisation"] <= 1
        finally:
            stop_generator(generator)


def series(text: str) -> dict[str, float]:
    """Of the application ``here``: the sum of a metric's series, by its name without ``ray_``."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("ray_crsm_") and 'application="here"' in line:
            name = line.removeprefix("ray_").partition("{")[0]
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found
