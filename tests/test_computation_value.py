"""The value of computation against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crsm.computation_value import EPSILON, ExpectedGate, disagreement, entropy, value_of_computation

UNIT = st.floats(0, 1)


def test_the_entropy_is_in_nats_and_an_impossible_token_adds_nothing() -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(entropy(log_probs), [np.log(4), np.log(2), 0.0], atol=1e-12)


def test_the_disagreement_is_the_standard_deviation_over_layers() -> None:
    np.testing.assert_allclose(disagreement(np.array([[0.2, 0.6], [0.5, 0.5]])), [0.2, 0.0])


def test_the_value_is_the_product_of_the_three_factors() -> None:
    log_probs = np.log(np.full((2, 4), 0.25, dtype=np.float32))
    values = np.array([[0.2, 0.6], [0.2, 0.6]], dtype=np.float32)
    expected = (np.log(4) + EPSILON) * (0.2 + EPSILON) * (np.array([0.5, 0.1]) + EPSILON)
    np.testing.assert_allclose(value_of_computation(log_probs, values, np.array([0.5, 0.1])), expected, rtol=1e-6)


def test_a_factor_of_0_or_one_that_is_no_number_ranks_by_the_others_and_above_nothing() -> None:
    sure, unsure = np.array([0.0, -np.inf]), np.log([0.5, 0.5])
    agree, differ = np.array([0.5, 0.5]), np.array([0.1, 0.9])
    rows = [(sure, agree, 0.0), (sure, differ, 0.0), (unsure, differ, 0.0), (unsure, differ, 0.5)]
    values = value_of_computation(
        np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]), np.array([row[2] for row in rows])
    )
    assert values[0] == pytest.approx(EPSILON**3) and (np.diff(values) > 0).all()
    broken = value_of_computation(np.full((1, 2), np.nan), np.array([[np.nan, 0.5]]), np.nan)
    assert broken == pytest.approx(EPSILON**3)


@given(UNIT, UNIT, UNIT, UNIT)
def test_more_of_any_factor_is_never_worth_less(p: float, low: float, gate: float, more: float) -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[p, 1 - p]]))
    values = np.array([[low, 1.0]])
    value = value_of_computation(log_probs, values, gate)
    assert 0 < value < np.inf
    assert value_of_computation(np.log([[0.5, 0.5]]), values, gate) >= value * (1 - 1e-12)
    assert value_of_computation(log_probs, np.array([[low * more, 1.0]]), gate) >= value * (1 - 1e-12)
    assert value_of_computation(log_probs, values, gate + more) >= value


def test_a_new_generation_is_expected_to_be_as_all_were_and_then_as_it_is() -> None:
    gates = ExpectedGate(0.5, prior_weight=2)
    assert gates.expected("a") == 0.5
    gates.observe("a", np.array([0.0, 0.4]))
    # Overall: (2 · 0.5 + 0.2) / 3 = 0.4; "a": (1 · 0.2 + 2 · 0.4) / 3.
    assert gates.expected("b") == pytest.approx(0.4)
    assert gates.expected("a") == pytest.approx(1 / 3)
    for _ in range(1000):
        gates.observe("a", 0.9)
    assert gates.expected("a") == pytest.approx(0.9, abs=0.01)
    np.testing.assert_array_equal(gates.expected_all(["a", "b"]), [gates.expected("a"), gates.expected("b")])


def test_a_mean_forgets_what_is_longer_ago_than_its_memory() -> None:
    gates = ExpectedGate(0.5, prior_weight=1, memory=4, pool_memory=4)
    for gate in [1.0] * 50 + [0.0] * 50:
        gates.observe("a", gate)
    assert gates.expected("a") < 1e-3


def test_an_ended_generation_is_forgotten_and_what_it_taught_about_all_stays() -> None:
    gates = ExpectedGate(0.5)
    for _ in range(100):
        gates.observe("a", 0.0)
    overall = gates.expected("b")
    gates.end("a")
    gates.end("never seen")
    assert len(gates) == 0 and gates.expected("a") == overall == gates.expected("b") < 0.1
