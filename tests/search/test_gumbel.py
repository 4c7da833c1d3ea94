"""Gumbel MuZero and Sequential Halving on numbers that are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from crsm.config import SearchConfig
from crsm.search import Tree, considered_visits, gumbel_action_weights, search, summarize
from crsm.search import gumbel as rules
from crsm.search.seq_halving import considered_visits_table
from tests.search.fakes import TableEvaluator, bandit


def f32(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def i32(*rows: object) -> np.ndarray:
    return np.array(rows, np.int32)


def run(evaluator: TableEvaluator, **settings: object) -> Tree:
    return search(
        evaluator,
        SearchConfig(policy="gumbel", **settings),
        consensus_weights_L=[1.0],
        uncertainty_penalty=0.0,
        terminal_tokens=[],
    )


@pytest.mark.parametrize(
    ("considered", "simulations", "sequence"),
    [
        (1, 4, (0, 1, 2, 3)),
        (2, 5, (0, 0, 1, 1, 2)),
        # 2 rounds: 16 // (2 · 4) = 2 visits for each of the four, then 16 // (2 · 2) = 4 for each of two.
        (4, 16, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)),
        # A budget too small for everyone: one visit each as far as it goes.
        (8, 6, (0, 0, 0, 0, 0, 0)),
        (4, 0, ()),
    ],
)
def test_considered_visits(considered: int, simulations: int, sequence: tuple[int, ...]) -> None:
    assert considered_visits(considered, simulations) == sequence


def test_considered_visits_of_trees_with_budgets_of_their_own() -> None:
    table = considered_visits_table(i32(*[2, 1]), i32(*[3, 5]))
    assert table.tolist() == [[0, 0, 1, -1, -1], [0, 1, 2, 3, 4]]


def test_sequential_halving_gives_the_better_half_the_second_half_of_the_budget() -> None:
    # 4 actions, 16 simulations: two visits each, then four more for the two of highest value.
    tree = run(bandit([0.25] * 4, [0.1, 0.8, 0.3, 0.6]), simulations=16, max_depth=1)
    assert summarize(tree).root_visits_BA.tolist() == [[2, 6, 2, 6]]
    assert summarize(tree).line_tokens_BD.tolist() == [[1]]


def test_only_considered_actions_are_visited() -> None:
    # The three of highest prior; the fourth would be the best.
    tree = run(
        bandit([0.3, 0.25, 0.25, 0.2], [0.1, 0.2, 0.3, 0.9]), simulations=12, max_depth=1, max_considered_actions=3
    )
    assert summarize(tree).root_visits_BA[0, 3] == 0
    assert (summarize(tree).root_visits_BA[0, :3] > 0).all()


def test_interior_visits_follow_the_prior_where_values_are_equal() -> None:
    # Below a root of one action: argmax(p − n/(1 + N)) for p = (1/2, 1/4, 1/4) takes 0, 1, 2, 0 and again.
    # State 0: the root (its first action has nearly all mass), 1: the node looked at, 2: its children.
    logits = np.log(f32([0.98, 0.01, 0.01], [0.5, 0.25, 0.25], [0.4, 0.3, 0.3]))
    evaluator = TableEvaluator(np.zeros(1), np.array([[1, 1, 1], [2, 2, 2], [2, 2, 2]]), logits, np.full((3, 1), 0.5))
    # The first simulation makes the node itself, the other eight choose among its children.
    tree = run(evaluator, simulations=9, max_depth=2, root_prior_mass=0.9)
    assert summarize(tree).root_visits_BA.tolist() == [[9, 0, 0]]
    assert tree.children_visits_BSA[0, 1].tolist() == [4, 2, 2]
    assert tree.action_from_parent_BS[0, 2:5].tolist() == [0, 1, 2]


def test_mixed_value_interpolates_raw_value_and_visited_children() -> None:
    # Visited mass 0.5 + 0.3: weighted Q = (0.5·0.2 + 0.3·0.6) / 0.8 = 0.35; N = 3: (0.7 + 3·0.35) / 4 = 0.4375.
    value = rules.mixed_value(f32([0.2, 0.6, 0.0]), i32([2, 1, 0]), f32([0.5, 0.3, 0.2]), f32(0.7))
    assert value[0] == pytest.approx(0.4375)


def test_mixed_value_without_visits_is_the_raw_value() -> None:
    value = rules.mixed_value(f32([0.0, 0.0]), i32([0, 0]), f32([0.5, 0.5]), f32(0.7))
    assert value[0] == np.float32(0.7)


def test_mixed_value_survives_a_visited_child_of_prior_zero() -> None:
    value = rules.mixed_value(f32([0.2, 0.0]), i32([1, 0]), f32([0.0, 1.0]), f32(0.6))
    assert value[0] == pytest.approx(0.4)


def test_completed_values_are_rescaled_and_scaled_by_visits() -> None:
    # Completed by 0.4375 (above): range 0.2 … 0.6; scale (50 + 2)·0.1.
    values = rules.completed_values(
        f32([0.2, 0.6, 0.0]),
        i32([2, 1, 0]),
        f32([0.5, 0.3, 0.2]),
        f32(0.7),
        value_scale=0.1,
        maxvisit_init=50.0,
    )
    np.testing.assert_allclose(values, f32([0.0, 5.2, 5.2 * 0.2375 / 0.4]), rtol=1e-5)


def test_root_scores_let_only_those_race_whose_turn_it_is() -> None:
    scores = rules.root_scores(
        f32([1.0, 2.0, 0.0, 9.0]),
        f32([-1.0, -2.0, -1.5, -0.5]),
        f32([0.0, 0.5, 0.0, 0.0]),
        i32([1, 1, 2, 1]),
        i32(*[1]),
        np.array([[True, True, True, False]]),
    )
    np.testing.assert_allclose(scores, f32([1.0, 1.5, -np.inf, -np.inf]))


def test_a_hopeless_action_is_visited_if_it_alone_is_considered() -> None:
    scores = rules.root_scores(
        f32([0.0, 0.0]), f32([0.0, -np.inf]), f32([0.0, 0.0]), i32([1, 0]), i32(*[0]), np.array([[True, True]])
    )
    assert scores.argmax() == 1
    assert np.isfinite(scores[0, 1])


def test_noise_of_scale_zero_is_none() -> None:
    assert (rules.sample_gumbel(np.arange(3), 4, 0.0) == 0).all()


def test_noise_depends_on_a_trees_own_seed_only() -> None:
    noise_BA = rules.sample_gumbel(np.array([5, 6, 5]), 4, 1.0)
    np.testing.assert_array_equal(noise_BA[0], noise_BA[2])
    assert (noise_BA[0] != noise_BA[1]).any()
    np.testing.assert_array_equal(rules.sample_gumbel(np.array([6]), 4, 1.0)[0], noise_BA[1])


def test_action_weights_are_the_softmax_of_logit_plus_value() -> None:
    tree = run(bandit([0.6, 0.4], [0.2, 0.8]), simulations=8, max_depth=1)
    # Both visited 4 times: rescaled values 0 and 1 times (50 + 4)·0.1 = 5.4.
    odds = 0.4 / 0.6 * np.exp(5.4)
    np.testing.assert_allclose(
        gumbel_action_weights(tree, SearchConfig(policy="gumbel"))[0], [1 / (1 + odds), odds / (1 + odds)], rtol=1e-5
    )


def test_action_weights_of_a_root_without_visits_are_the_prior() -> None:
    evaluator = bandit([0.6, 0.4], [0.2, 0.8])
    settings = SearchConfig(policy="gumbel")
    tree = search(
        evaluator, settings, consensus_weights_L=[1.0], uncertainty_penalty=0.0, terminal_tokens=[], simulations=0
    )
    np.testing.assert_allclose(gumbel_action_weights(tree, settings)[0], [0.6, 0.4], rtol=1e-6)
