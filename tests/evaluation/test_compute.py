"""Multiply-adds against a count by hand."""

import dataclasses

import pytest

from crsm.evaluation.compute import costs
from crsm.evaluation.equal_compute import Spent, paired_with_best_of
from tests.fixtures import tiny_checkpoint, tiny_config

# d_model 16, 2 layers, d_state 8, head dimension 8, expand 2 (so inner width 32 and 4 heads), 4 taps of 48 channels;
# world model 24 wide with a decoder of 32; writer 16 wide, rank 1.
STATE = 4 * 8 * 8
LAYER = 16 * (2 * 32 + 2 * 8 + 4) + 48 * 4 + 3 * STATE + 32 * 16
GRU = 3 * (24 * (16 + 24) + 24 * 24)
IMAGINE = (24 + 16) * 2 * 8 + 2 * STATE + 2 * 32 * 24 + GRU + 24 * 32 + 24 * 32 + 32 * 32


@pytest.fixture(scope="module")
def counted():
    checkpoint = tiny_checkpoint()
    return costs(checkpoint.model), checkpoint.tokenizer.vocab_size


def test_a_token_costs_its_projections_its_convolution_its_recurrence_and_the_head(counted):
    found, vocabulary = counted
    assert found.backbone == 2 * LAYER
    assert found.policy == 2 * 16 + vocabulary * 16
    assert found.token == 2 * LAYER + 2 * 16 + vocabulary * 16


def test_an_imagined_token_costs_the_memory_reads_the_cell_and_the_decoder(counted):
    found, _ = counted
    assert found.encode == 2 * 16 * 24
    assert found.imagine == IMAGINE
    assert found.critic == 2 * 16 + 2
    assert found.simulation == found.imagine + found.policy + found.critic


def test_a_plan_costs_projection_search_and_writing(counted):
    found, _ = counted
    assert found.write_token == 3 * (16 * 16 + 16 * 16)
    assert found.write == 16 * 2 * 32 + 16 * 2 * 8
    assert found.inject == 2 * 2 * STATE
    expected = (
        found.encode
        + 3 * IMAGINE  # the known token and two assumed ones
        + 2 * found.policy
        + found.policy
        + found.critic
        + 10 * found.simulation
        + 4 * found.write_token
        + found.write
        + found.inject
    )
    assert found.plan(simulations=10, lag=2, line=4) == expected


def test_the_exact_world_model_costs_a_backbone_token_per_imagined_token():
    found = costs(tiny_checkpoint(tiny_config(kind="exact")).model)
    assert (found.encode, found.imagine) == (0, found.backbone)


def test_a_tied_head_costs_as_much_as_one_of_its_own(counted):
    tied = costs(tiny_checkpoint(tiny_config(tied=True)).model)
    assert dataclasses.asdict(tied) == dataclasses.asdict(counted[0])


def test_system_2_is_paired_with_the_cheapest_best_of_n_that_costs_as_much_or_more():
    """5 against 1 of 8 problems, 4 of them told apart one way and 0 the other: McNemar's exact p is 2 · (1/2)^4."""
    right = [True] * 5 + [False] * 3
    points = {
        ("best_of", 1): ([False] * 8, [10.0] * 8),
        ("best_of", 2): ([True] + [False] * 7, [20.0] * 8),
        ("best_of", 4): ([True] * 8, [40.0] * 8),
        ("beam_search", 2): ([True] * 8, [15.0] * 8),
        ("system_2", 8): (right, [12.0] * 8),
        ("system_2", 64): (right, [41.0] * 8),
    }
    (pair,) = paired_with_best_of(Spent(points, [10.0] * 8, [5] * 8))
    assert (pair["simulations"], pair["best_of"], pair["difference"]) == (8, 2, 0.5)
    assert pair["times_the_cost"] == pytest.approx(20 / 12) and pair["mcnemar_p"] == pytest.approx(0.125)
