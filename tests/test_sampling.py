"""From logits to a token: every distribution is read off by trying the whole unit interval."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crsm.config import SamplingConfig
from crsm.sampling import choose_token, mix_policy

PROBS = (0.1, 0.4, 0.05, 0.3, 0.15)
STEPS = 2000


def log_probs(*probs: float) -> Tensor:
    return torch.tensor(probs or PROBS, dtype=torch.float64).log()


def shares(config: SamplingConfig, logits: Tensor) -> np.ndarray:
    """Share of the uniform numbers, evenly spaced over [0, 1), that pick each token."""
    picked = [choose_token(logits, config, (step + 0.5) / STEPS) for step in range(STEPS)]
    return np.bincount(picked, minlength=len(logits)) / STEPS


def renormalised(*kept: int) -> np.ndarray:
    probs = np.where(np.isin(np.arange(5), kept), PROBS, 0.0)
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"temperature": 1.0}, np.array(PROBS)),
        ({"temperature": 0.5}, np.array(PROBS) ** 2 / (np.array(PROBS) ** 2).sum()),
        ({"temperature": 2.0}, np.array(PROBS) ** 0.5 / (np.array(PROBS) ** 0.5).sum()),
        ({"temperature": 1.0, "top_k": 1}, renormalised(1)),
        ({"temperature": 1.0, "top_k": 3}, renormalised(1, 3, 4)),
        ({"temperature": 1.0, "top_k": 99}, np.array(PROBS)),
        ({"temperature": 1.0, "top_p": 0.3}, renormalised(1)),
        ({"temperature": 1.0, "top_p": 0.5}, renormalised(1, 3)),
        ({"temperature": 1.0, "top_p": 0.75}, renormalised(1, 3, 4)),
        # Of the three most likely, 0.4, 0.3 and 0.15 of 0.85, two reach 0.8.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, renormalised(1, 3)),
    ],
)
def test_tokens_are_drawn_from_the_distribution_worked_out_by_hand(config: dict[str, Any], want: np.ndarray) -> None:
    np.testing.assert_allclose(shares(SamplingConfig(**config), log_probs()), want, atol=1.5 / STEPS)


def test_greedy_takes_the_most_likely_and_needs_no_luck() -> None:
    assert {choose_token(log_probs(), SamplingConfig(), uniform) for uniform in (0.0, 0.5, 0.999)} == {1}


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 5.0]), min_size=2, max_size=6).filter(any),
    st.sampled_from([1e-310, 1e-3, 1.0, 1e6]),
    st.integers(0, 6),
    st.sampled_from([1e-9, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 1 - 2**-53]),
)
def test_an_impossible_token_is_never_drawn(
    weights: list[float], temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    picked = choose_token(torch.tensor(weights).log_softmax(0) + torch.tensor(weights).log(), config, uniform)
    assert weights[picked] > 0


def test_a_tiny_temperature_is_greedy() -> None:
    for temperature in (1e-310, 1e-12):
        config = SamplingConfig(temperature=temperature)
        assert {choose_token(log_probs(), config, uniform) for uniform in (0.0, 0.5, 1 - 2**-53)} == {1}


def test_mixing_a_policy_by_hand() -> None:
    mixed = mix_policy(log_probs(), torch.tensor([3, 0]), torch.tensor([0.75, 0.25], dtype=torch.float64), 0.2)
    want = 0.8 * np.array(PROBS) + 0.2 * np.array([0.25, 0, 0, 0.75, 0])
    np.testing.assert_allclose(mixed.exp(), want, rtol=1e-12)
    assert float(mixed.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_weight_of_zero_leaves_the_same_bits_and_of_one_nothing_else() -> None:
    logits = log_probs()
    tokens, probs = torch.tensor([2]), torch.tensor([1.0], dtype=torch.float64)
    assert mix_policy(logits, tokens, probs, 0.0) is logits
    only = mix_policy(logits, tokens, probs, 1.0)
    assert int(only.argmax()) == 2 and float(only.exp()[2]) == 1.0 and float(only.exp().sum()) == pytest.approx(1.0)
    np.testing.assert_array_equal(logits, log_probs())
