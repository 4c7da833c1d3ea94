"""The small parts that judge: fusion of layers, values and their consensus, the gate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crsm.config import CriticConfig
from crsm.critic import Critic
from crsm.fusion import Fusion
from crsm.gate import Gate
from crsm.search import consensus
from tests.fixtures import tiny_checkpoint


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), dtype=torch.float32)


# Fusion ---------------------------------------------------------------------------------------------------------------


def test_all_weight_on_the_last_layer_is_the_plain_language_model_bit_for_bit() -> None:
    model = tiny_checkpoint().model
    hidden = normal(5, 2, 16) * 1e3
    assert not torch.equal(model.fusion(hidden), hidden[:, -1])
    model.fusion.use_last_layer()
    assert torch.equal(model.fusion(hidden), hidden[:, -1])
    plain = torch.nn.functional.linear(model.backbone.norm_f(hidden[:, -1]), model.lm_head.weight)
    assert torch.equal(model.logits(hidden), plain)
    assert model.fusion.weights_L.tolist() == [0.0, 1.0] and float(model.fusion.entropy()) == 0.0


def test_layers_are_mixed_by_the_softmax_of_their_weights() -> None:
    fusion = Fusion(3).requires_grad_(False)
    fusion.logits_L.copy_(torch.tensor([0.0, math.log(2), math.log(5)]))
    hidden = normal(4, 3, 6)
    want = (1 * hidden[:, 0] + 2 * hidden[:, 1] + 5 * hidden[:, 2]) / 8
    np.testing.assert_allclose(fusion(hidden), want, atol=1e-6)
    p = np.array([1, 2, 5]) / 8
    assert float(fusion.entropy()) == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)


def test_the_entropy_bonus_pushes_towards_all_layers() -> None:
    fusion = Fusion(4)
    before = float(fusion.entropy().detach())
    fusion.entropy().backward()
    assert fusion.logits_L.grad is not None
    with torch.no_grad():
        fusion.logits_L.add_(0.1 * fusion.logits_L.grad)
    assert before < float(fusion.entropy().detach()) < math.log(4)


def test_the_last_layer_alone_still_has_finite_gradients() -> None:
    fusion = Fusion(3)
    fusion.use_last_layer()
    (fusion(normal(2, 3, 4)).sum() + fusion.entropy()).backward()
    assert fusion.logits_L.grad is not None and fusion.logits_L.grad.isfinite().all()


# Critic ---------------------------------------------------------------------------------------------------------------


def critic_of(layers: int, penalty: float = 0.25, seed: int = 0) -> Critic:
    critic = Critic(layers, 6, CriticConfig(uncertainty_penalty=penalty)).requires_grad_(False)
    critic.weight_LD.copy_(normal(layers, 6, seed=seed))
    critic.bias_L.copy_(normal(layers, seed=seed + 1))
    critic.consensus_logits_L.copy_(normal(layers, seed=seed + 2))
    return critic


def test_values_are_logistic_in_the_layers_direction_whatever_its_scale() -> None:
    critic = critic_of(3)
    hidden = normal(4, 3, 6, seed=9)
    direction = hidden / hidden.pow(2).mean(dim=-1, keepdim=True).sqrt()
    want = 1 / (1 + np.exp(-((direction * critic.weight_LD).sum(dim=-1) + critic.bias_L).numpy()))
    np.testing.assert_allclose(critic(hidden), want, atol=1e-5)
    np.testing.assert_allclose(critic(100 * hidden), want, atol=1e-4)
    np.testing.assert_allclose(critic.logits(hidden).sigmoid(), critic(hidden))


def test_the_consensus_by_hand() -> None:
    critic = critic_of(2, penalty=0.5)
    critic.consensus_logits_L.copy_(torch.tensor([0.0, math.log(3)]))
    # 1/4 · 0.2 + 3/4 · 0.6 − 0.5 · 0.2
    assert float(critic.consensus(torch.tensor([0.2, 0.6]))) == pytest.approx(0.05 + 0.45 - 0.1)


@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 2))
def test_the_consensus_is_that_of_the_search(layers: int, seed: int, penalty: float) -> None:
    critic = critic_of(layers, penalty, seed)
    values = torch.rand(7, layers, generator=torch.Generator().manual_seed(seed))
    want = consensus(values.numpy(), critic.consensus_weights_L.numpy(), penalty)
    np.testing.assert_allclose(critic.consensus(values), want, atol=1e-6)


def test_disagreement_costs_and_agreement_does_not() -> None:
    critic = critic_of(2)
    critic.consensus_logits_L.zero_()
    agreed, disputed = critic.consensus(torch.tensor([[0.5, 0.5], [0.1, 0.9]]))
    assert float(agreed) == pytest.approx(0.5) and float(disputed) == pytest.approx(0.5 - 0.25 * 0.4)


# Gate -----------------------------------------------------------------------------------------------------------------


def gate_of(
    slope: tuple[float, ...] = (2.0, 5.0), bias: tuple[float, ...] = (0.0, -1.0), threshold: float = 0.1
) -> Gate:
    gate = Gate(2)
    gate.calibrate(torch.tensor(slope), torch.tensor(bias), threshold)
    return gate


def confidence(gate: Gate, advantage: float, uncertainty: float = 0.0, gain: float = 1.0) -> np.ndarray:
    return gate(torch.full((1, 2), advantage), torch.tensor([uncertainty]), torch.tensor([gain]), penalty=0.5).numpy()[
        0
    ]


def test_the_gate_by_hand() -> None:
    got = confidence(gate_of(), 0.6, uncertainty=0.2)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-np.array([2 * 0.5, 5 * 0.5 - 1]))), atol=1e-6)


def test_an_uncalibrated_gate_is_exactly_zero_and_so_is_one_shut_again() -> None:
    gate = gate_of()
    assert confidence(gate, 1.0).all()
    gate.shut()
    assert (confidence(gate, 1.0) == 0.0).all() and (confidence(Gate(2), 1.0) == 0.0).all()


def test_under_the_threshold_every_layer_is_exactly_zero() -> None:
    gate = gate_of(threshold=0.25)
    assert (confidence(gate, 1.0, gain=0.2499) == 0.0).all()
    assert (confidence(gate, 1.0, gain=0.25) > 0.0).all()
    assert (confidence(gate, 1.0, gain=math.nan) == 0.0).all()


def test_rows_are_gated_on_their_own() -> None:
    got = gate_of()(torch.full((2, 2), 0.5), torch.zeros(2), torch.tensor([0.0, 0.2]), 0.5)
    assert not got[0].any() and got[1].all()


def test_more_advantage_never_lowers_and_more_uncertainty_never_raises_the_confidence() -> None:
    gate = gate_of(slope=(0.0, 4.0))
    advantages = np.stack([confidence(gate, x) for x in np.linspace(-1, 1, 21)])
    doubts = np.stack([confidence(gate, 0.5, uncertainty=x) for x in np.linspace(0, 0.5, 21)])
    assert (np.diff(advantages[:, 1]) > 0).all() and (np.diff(doubts[:, 1]) < 0).all()
    assert (np.diff(advantages[:, 0]) == 0).all()
    assert (advantages >= 0).all() and (advantages <= 1).all()


@pytest.mark.parametrize(
    ("slope", "bias", "threshold"),
    [
        ((math.nan, 1.0), (0.0, 0.0), 0.0),
        ((1.0, math.inf), (0.0, 0.0), 0.0),
        ((1.0, 1.0), (0.0, math.nan), 0.0),
        ((1.0, -0.1), (0.0, 0.0), 0.0),
        ((1.0, 1.0), (0.0, 0.0), math.nan),
    ],
)
def test_a_calibration_that_is_none_is_refused_and_opens_nothing(
    slope: tuple[float, ...], bias: tuple[float, ...], threshold: float
) -> None:
    gate = Gate(2)
    with pytest.raises(ValueError, match="allowed: finite, slopes ≥ 0"):
        gate.calibrate(torch.tensor(slope), torch.tensor(bias), threshold)
    assert not gate.calibrated and not gate.slope_L.any()


def test_no_gradient_moves_a_gate_and_a_saved_one_comes_back() -> None:
    gate, other = gate_of(), Gate(2)
    assert not list(gate.parameters())
    other.load_state_dict(gate.state_dict())
    np.testing.assert_array_equal(confidence(other, 0.4), confidence(gate, 0.4))
