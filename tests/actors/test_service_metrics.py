"""What a replica reads out of a generator's counters: differences, rates, and a restart that takes nothing back."""

from __future__ import annotations

from typing import Any

import pytest

from actors.service_metrics import METRICS, GeneratorCounts, ServiceTelemetry, compare


def counters(tokens: int = 0, requests: int = 0, **changes: Any) -> dict[str, Any]:
    pool = {"planners": {"ready": 2}, "batches": 0, "search_seconds": 0.01, "restarts": 0} | changes.pop("pool", {})
    return {"tokens": tokens, "requests": requests, "outcomes": {}, "injections_per_layer": {}, "pool": pool} | changes


class Noted:
    """Stands for Ray's metrics."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], float] = {}
        self.gauges: dict[tuple[str, ...], float] = {}
        self.seen: list[tuple[str, float]] = []

    def add(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "counter" and set(tags) == set(METRICS[name].tags)
        key = (name, *tags.values())
        self.sums[key] = self.sums.get(key, 0) + value

    def set(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "gauge" and set(tags) == set(METRICS[name].tags)
        self.gauges[name, *tags.values()] = value

    def observe(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "histogram" and set(tags) == set(METRICS[name].tags)
        self.seen.append((name, value))


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


def test_tokens_are_summed_up_and_handed_on_together() -> None:
    noted, now = Noted(), [0.0]
    telemetry = ServiceTelemetry(noted, clock=lambda: now[0])  # type: ignore[arg-type]
    telemetry.first_token(0.05)
    telemetry.tokens(3, None)
    telemetry.tokens(4, 0.02)
    telemetry.tokens(1, 0.03)  # at the same time: times are sampled, tokens are not
    telemetry.generations(2, 1)
    telemetry.request("/v1/completions", 200, 1.5)
    assert ("crsm_tokens",) not in noted.sums
    telemetry.flush()
    assert noted.sums[("crsm_tokens",)] == 8
    assert noted.gauges == {("crsm_generations_running",): 2, ("crsm_generations_waiting",): 1}
    assert noted.sums["crsm_requests", "/v1/completions", "200"] == 1
    assert noted.seen == [
        ("crsm_first_token_seconds", 0.05),
        ("crsm_inter_token_seconds", 0.02),
        ("crsm_request_seconds", 1.5),
    ]
    telemetry.flush()
    assert noted.sums[("crsm_tokens",)] == 8
