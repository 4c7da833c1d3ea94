"""Operations of a token, against sums made by hand and against the parameters of a large model."""

from __future__ import annotations

import pytest

from crsm.config import BackboneConfig
from crsm.scaling.arithmetic import token_cost

SMALL = BackboneConfig(vocab_size=10, d_model=4, n_layer=2, d_state=3, headdim=2, expand=2, d_conv=4)
"""E = 8, H = 4, C = 14, I = 26."""


def test_the_terms_of_a_small_model_are_those_of_the_formula():
    cost = token_cost(SMALL, chunk=6)
    assert cost.projections == 2 * (4 * 26 + 8 * 4)
    assert cost.convolution == 2 * 4 * 14
    # Inside a chunk 6/2 · (3 + 8); states and their outputs 2 · 8 · 3; passed on 8 · 3 / 6.
    assert cost.scan == 2 * (33 + 48 + 4)
    assert cost.head == 2 * 4 + 4 * 10
    assert cost.forward == 272 + 112 + 170 + 48


def test_training_is_three_passes_and_checkpointed_layers_run_once_more():
    cost = token_cost(SMALL, chunk=6)
    assert cost.train_flops() == 2 * 3 * 602
    assert cost.train_flops(recomputed=True) == 2 * (3 * 602 + 554)


def test_only_positions_that_are_targets_have_logits():
    assert token_cost(SMALL, chunk=6, targets=0.25).head == 0.25 * 48


def test_a_large_model_costs_six_operations_a_parameter_and_a_little_more_for_its_scan():
    sizes = BackboneConfig(vocab_size=50288, d_model=2560, n_layer=64, d_state=128, headdim=64)
    cost = token_cost(sizes, chunk=256)
    parameters = 2.7026e9
    assert cost.train_flops() == pytest.approx(6 * parameters, rel=0.1)
    assert cost.train_flops() > 6 * parameters
    # The scan is linear in the width, the projections are quadratic.
    assert cost.scan < 0.06 * cost.projections
