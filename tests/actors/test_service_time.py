"""The estimate of search times against times that are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.service_time import ServiceTime


def seconds(steps: int, work: int) -> float:
    return 0.002 + steps * 50e-6 + work * 10e-6


def test_before_the_first_answer_everything_takes_no_time_and_after_it_that_search_takes_what_it_took() -> None:
    service = ServiceTime()
    assert service.estimate(64, 64) == 0.0 and service.affordable(1.0, 1) == float("inf")
    service.observe(64, 128, 0.01)
    assert service.mean(64, 128) == pytest.approx(0.01)
    assert 0 < service.mean(16, 32) < 0.01


def test_searches_of_several_sizes_tell_the_three_terms_apart() -> None:
    service, rng = ServiceTime(), random.Random(0)
    for _ in range(2000):
        steps, trees = rng.choice([16, 32, 64, 128]), rng.randint(1, 128)
        service.observe(steps, steps * trees, seconds(steps, steps * trees))
    for steps, trees in ((64, 1), (16, 128), (100, 30)):
        assert service.mean(steps, steps * trees) == pytest.approx(seconds(steps, steps * trees), rel=0.1)


def test_a_lasting_change_is_followed_and_a_single_outlier_is_not_believed() -> None:
    service = ServiceTime(rate=0.2, outlier=4.0)
    for _ in range(50):
        service.observe(64, 64, 0.01)
    service.observe(64, 64, 3600.0)
    # A fifth of the error, and the error at most three times the expected time: 0.01 + 0.2 · 0.03.
    assert service.mean(64, 64) == pytest.approx(0.016)
    for _ in range(60):
        service.observe(64, 64, 0.1)
    assert service.mean(64, 64) == pytest.approx(0.1, rel=0.01)
    for _ in range(60):
        service.observe(64, 64, 0.001)
    assert service.mean(64, 64) == pytest.approx(0.001, rel=0.01)


def test_a_cheap_search_corrects_most_of_an_estimate_that_was_far_too_high() -> None:
    service = ServiceTime(rate=0.2)
    service._per_work, service.answers = 1000.0, 1
    for searches in range(1, 4):
        service.observe(16, 16, 0.0)
        assert service.mean(16, 16) == pytest.approx(250 * 0.4**searches)


def test_after_a_stall_a_few_answers_bring_the_estimate_back() -> None:
    """Ten searches that hung for ten seconds each; eight ordinary ones, and plans are expected in time again."""
    service = ServiceTime()
    for _ in range(20):
        service.observe(64, 64, 0.003)
    for _ in range(10):
        service.observe(64, 64, 10.0)
    assert service.estimate(64, 64) > 0.05
    for _ in range(8):
        service.observe(64, 64, 0.003)
    assert service.estimate(64, 64) < 0.015


@given(
    st.lists(st.tuples(st.integers(1, 256), st.integers(1, 128), st.floats(0, 10)), min_size=1),
    st.floats(0, 20),
    st.integers(1, 128),
)
def test_what_is_affordable_is_back_in_time_and_no_estimate_is_negative(
    answers: list[tuple[int, int, float]], limit: float, trees: int
) -> None:
    service = ServiceTime()
    for steps, number, took in answers:
        service.observe(steps, steps * number, took)
    simulations = service.affordable(limit, trees)
    assert simulations >= 0 and service.mean(1, 1) >= 0 and service.deviation >= 0
    if 1 <= simulations < 1e6:
        whole = int(simulations)
        assert service.estimate(whole, whole * trees) <= limit * (1 + 1e-6) + 1e-9
