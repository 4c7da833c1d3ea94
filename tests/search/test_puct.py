"""PUCT on numbers that are worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crsm.config import SearchConfig
from crsm.search import Tree, search, summarize
from crsm.search.puct import exploration_table, minmax_value_scores, puct_scores, raw_value_scores
from tests.search.fakes import bandit


def f32(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def chosen_actions(tree: Tree) -> list[int]:
    """The root action that each simulation expanded, -1 where it ended at a node already in the tree."""
    return tree.action_from_parent_BS[0, 1:].tolist()


def test_exploration_table_is_the_formula_of_muzero() -> None:
    table = exploration_table(100, c_init=1.25, c_base=50.0)
    assert table[0] == 0.0
    assert table[1] == pytest.approx(1.25 + math.log(52 / 50))
    assert table[100] == pytest.approx(10 * (1.25 + math.log(151 / 50)))


def test_unvisited_children_take_the_parents_value_when_values_are_raw() -> None:
    scores = raw_value_scores(f32([0.2, 0.0, 0.9]), np.array([[1, 0, 4]], np.int32), f32(0.6))
    np.testing.assert_array_equal(scores, f32([0.2, 0.6, 0.9]))


def test_minmax_uses_the_range_of_parent_and_visited_children() -> None:
    # Range from 0.2 (a child) to 0.6 (the parent): the second child is in its middle, the third is unvisited.
    scores = minmax_value_scores(f32([0.2, 0.4, 0.0]), np.array([[1, 2, 0]], np.int32), f32(0.6))
    np.testing.assert_allclose(scores, f32([0.0, 0.5, 0.0]), atol=1e-6)


def test_minmax_of_equal_values_is_zero_and_not_nan() -> None:
    scores = minmax_value_scores(f32([0.5, 0.5]), np.array([[1, 0]], np.int32), f32(0.5))
    np.testing.assert_array_equal(scores, f32([0.0, 0.0]))


def test_score_adds_exploration_that_falls_with_visits() -> None:
    scores = puct_scores(f32([0.5, 0.5]), f32([0.8, 0.2]), np.array([[3, 0]], np.int32), f32(2.0))
    np.testing.assert_allclose(scores, f32([0.5 + 2.0 * 0.8 / 4, 0.5 + 2.0 * 0.2]))


# c = 1 (the base is so large that the logarithm is 0): score = Q + sqrt(N)·P/(1 + n), unvisited: Q = the root's mean.
#   N = 1, mean 0.5:     1.000  0.800  0.700   take 0 (0.2)
#   N = 2, mean 0.35:    0.554  0.774  0.633   take 1 (0.9)
#   N = 3, mean 0.5333:  0.633  1.160  0.880   take 1
#   N = 4, mean 0.625:   0.700  1.100  1.025   take 1
#   N = 5, mean 0.68:    0.759  1.068  1.127   take 2 (0.4)
PRIORS = [0.5, 0.3, 0.2]
VALUES = [0.2, 0.9, 0.4]


@pytest.mark.parametrize(
    ("simulations", "visits", "mean"),
    [(1, [1, 0, 0], 0.35), (2, [1, 1, 0], 1.6 / 3), (4, [1, 3, 0], 3.4 / 5), (5, [1, 3, 1], 3.8 / 6)],
)
def test_bandit_with_raw_values(simulations: int, visits: list[int], mean: float) -> None:
    settings = SearchConfig(policy="puct", simulations=simulations, max_depth=1, puct_c_init=1.0, puct_c_base=1e12)
    tree = search(
        bandit(PRIORS, VALUES), settings, consensus_weights_L=[1.0], uncertainty_penalty=0.0, terminal_tokens=[]
    )
    summary = summarize(tree)
    assert summary.root_visits_BA.tolist() == [visits]
    assert summary.root_values_BL[0, 0] == pytest.approx(mean)
    np.testing.assert_allclose(summary.root_probs_BA[0], np.array(visits) / simulations)


def test_bandit_with_minmax_values_is_mctxs_rule() -> None:
    # c = 1, unvisited: 0.
    #   N = 1: 0.500 0.300 0.200 take 0 (0.2), mean 0.35: range 0.2 … 0.35
    #   N = 2: 0.354 0.424 0.283 take 1 (0.9), mean 0.533: range 0.2 … 0.9
    #   N = 3: 0.433 1.260 0.346 take 1
    settings = SearchConfig(
        policy="puct", q_transform="minmax", simulations=3, max_depth=1, puct_c_init=1.0, puct_c_base=1e12
    )
    tree = search(
        bandit(PRIORS, VALUES), settings, consensus_weights_L=[1.0], uncertainty_penalty=0.0, terminal_tokens=[]
    )
    assert summarize(tree).root_visits_BA.tolist() == [[1, 2, 0]]
    assert chosen_actions(tree) == [0, 1, Tree.NO_PARENT]


def test_without_exploration_the_best_known_child_is_taken_forever() -> None:
    # c = 0: the first choice is a tie, broken by the lowest index; its value 0.7 is above the root's mean ever after.
    settings = SearchConfig(policy="puct", simulations=9, max_depth=1, puct_c_init=0.0, puct_c_base=1e12)
    tree = search(
        bandit([0.2, 0.8], [0.7, 0.9]), settings, consensus_weights_L=[1.0], uncertainty_penalty=0.0, terminal_tokens=[]
    )
    assert summarize(tree).root_visits_BA.tolist() == [[9, 0]]


def test_prior_is_renormalised_over_the_expanded_children() -> None:
    # The vocabulary holds more than the two children, which have 0.3 and 0.1 of its mass.
    settings = SearchConfig(policy="puct", simulations=1, max_depth=1)
    tree = search(
        bandit([0.3, 0.1], [0.5, 0.5]), settings, consensus_weights_L=[1.0], uncertainty_penalty=0.0, terminal_tokens=[]
    )
    np.testing.assert_allclose(tree.children_prior_probs_BSA[0, Tree.ROOT], [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(np.exp(tree.children_prior_logits_BSA[0, Tree.ROOT]), [0.3, 0.1], rtol=1e-6)
