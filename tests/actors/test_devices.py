"""The device of an actor is what Ray reserves for it; what can never be had is refused before anything starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.devices import generator_device, gpus_needed, planner_device
from crsm.config import EngineConfig, PlannersConfig


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local cluster to come has one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def planners(**fields: Any) -> PlannersConfig:
    return PlannersConfig(**fields)


def test_what_is_not_reserved_is_not_used() -> None:
    assert planner_device(planners(device="auto")) == "cpu"
    assert generator_device(EngineConfig(device="auto"), 0.0, planners()) == "cpu"


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_what_is_reserved_is_used_as_the_settings_say(device: Any) -> None:
    assert planner_device(planners(device=device, num_gpus=0.25)) == device
    assert generator_device(EngineConfig(device=device), 0.5, planners()) == device


def test_a_gpu_that_is_asked_for_and_not_reserved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"planners\.device = 'cuda' with planners\.num_gpus = 0; allowed: a GPU or a"):
        planner_device(planners(device="cuda"))
    with pytest.raises(ValueError, match=r"engine\.device = 'cuda' with the generator's num_gpus = 0; allowed"):
        generator_device(EngineConfig(device="cuda"), 0.0, planners())


def test_shares_of_one_gpu_are_counted_together() -> None:
    four = planners(device="cuda", num_gpus=0.25, count=4)
    assert planner_device(four) == "cuda"
    assert generator_device(EngineConfig(device="cuda"), 0.5, planners(device="cuda", num_gpus=0.25, count=2)) == "cuda"
    with pytest.raises(
        ValueError, match=r"a generator with 0\.5 GPU and 4 planners with 0\.25 each asks 2 GPU; .* has 1"
    ):
        generator_device(EngineConfig(device="cuda"), 0.5, four)
    with pytest.raises(
        ValueError, match=r"planners\.count = 5, num_gpus = 0\.25 asks 2 GPU; the cluster has 1\. Allowed"
    ):
        planner_device(planners(num_gpus=0.25, count=5))


@pytest.mark.parametrize("share", [1.5, 2.25])
def test_several_gpus_and_a_part_of_one_are_not_to_be_had(share: float) -> None:
    with pytest.raises(ValueError, match=rf"planners\.num_gpus = {share:g}; allowed: a share of one, or a whole"):
        planners(num_gpus=share)
    with pytest.raises(ValueError, match=rf"the generator's num_gpus = {share:g}; allowed: 0, a share of one, or a"):
        generator_device(EngineConfig(), share, planners())


@pytest.mark.parametrize(
    ("shares", "want"),
    [([], 0), ([0.0, 0.0], 0), ([1 / 3] * 3, 1), ([0.6, 0.6], 2), ([0.6, 0.4, 0.5], 2), ([2.0, 0.5, 0.5], 3)],
)
def test_no_share_lies_on_two_gpus(shares: list[float], want: int) -> None:
    assert gpus_needed(shares) == want


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 2.0]), max_size=20))
def test_gpus_hold_what_is_asked_and_are_at_most_twice_that(shares: list[float]) -> None:
    need = gpus_needed(shares)
    assert need >= math.ceil(sum(shares) - 1e-6)
    assert need <= 2 * math.ceil(sum(shares))
