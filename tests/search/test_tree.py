"""Exact arithmetic, consensus, and what is read from a tree."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import SearchConfig
from crsm.search import Tree, consensus, export_tree, search, summarize
from crsm.search.numerics import exp, softmax, sum_actions
from tests.search.fakes import HashEvaluator, TableEvaluator, bandit


def f32(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def hash_tree(**changes: object) -> Tree:
    arguments: dict = {
        "consensus_weights_L": [0.5, 0.3, 0.2],
        "uncertainty_penalty": 0.25,
        "terminal_tokens": [3],
        "simulations": 30,
        **changes,
    }
    return search(HashEvaluator([1, 2], 4, 3), SearchConfig(max_depth=5), **arguments)


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = -np.geomspace(1e-6, 87.0, 20001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp(x) - exact) / np.spacing(exact.astype(np.float32))).max() <= 2.0


def test_exp_at_its_ends() -> None:
    np.testing.assert_array_equal(exp(f32(0.0, -0.0, -88.0, -1e9, -np.inf)), f32(1.0, 1.0, 0.0, 0.0, 0.0))


def test_sum_is_added_from_the_first_to_the_last() -> None:
    # 1 is lost in 2^24 unless the large numbers cancel first.
    big = 2.0**24
    np.testing.assert_array_equal(sum_actions(f32([1.0, big, -big], [big, -big, 1.0])), f32(0.0, 1.0))


def test_softmax_sums_to_one_and_gives_minus_infinity_nothing() -> None:
    probs = softmax(f32([0.0, np.log(3.0), -np.inf], [1e30, -1e30, 0.0]))
    np.testing.assert_allclose(probs, f32([0.25, 0.75, 0.0], [1.0, 0.0, 0.0]), rtol=1e-6)


def test_consensus_by_hand() -> None:
    # Weighted mean 0.5·0.2 + 0.25·0.4 + 0.25·0.9 = 0.425; mean 0.5, variance (0.09 + 0.01 + 0.16) / 3.
    value = consensus(f32([0.2, 0.4, 0.9]), f32(0.5, 0.25, 0.25), 0.5)
    assert value[0] == pytest.approx(0.425 - 0.5 * np.sqrt(0.26 / 3), rel=1e-6)
    assert value.dtype == np.float32


def test_consensus_of_one_layer_is_its_value() -> None:
    values = np.random.default_rng(0).uniform(size=(50, 1)).astype(np.float32)
    np.testing.assert_array_equal(consensus(values, f32(1.0), 3.0), values[:, 0])


def test_consensus_of_layers_that_agree_has_no_penalty() -> None:
    assert consensus(f32([0.5, 0.5, 0.5, 0.5]), f32(0.25, 0.25, 0.25, 0.25), 100.0) == np.float32(0.5)


@given(st.integers(1, 6), st.floats(0, 2, width=32), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_consensus_is_the_formula(num_layers: int, penalty: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.uniform(size=(7, num_layers)).astype(np.float32)
    weights = rng.uniform(size=num_layers).astype(np.float32)
    expected = values.astype(np.float64) @ weights - penalty * values.astype(np.float64).std(axis=1)
    np.testing.assert_allclose(consensus(values, weights, penalty), expected, atol=1e-5)


def test_a_new_tree_holds_its_root_only() -> None:
    tree = hash_tree(simulations=0)
    assert tree.num_slots == 1
    assert tree.node_visits_BS.tolist() == [[1], [1]]
    np.testing.assert_array_equal(tree.node_values_BSL, tree.raw_values_BSL)


def test_summary_of_a_root_without_visits_is_the_prior() -> None:
    tree = hash_tree(simulations=0)
    summary = summarize(tree)
    assert summary.root_visits_BA.sum() == 0
    np.testing.assert_array_equal(summary.root_probs_BA, tree.children_prior_probs_BSA[:, 0])
    np.testing.assert_allclose(summary.root_probs_BA.sum(axis=1), 1.0, rtol=1e-6)
    assert (summary.line_tokens_BD == Tree.NO_TOKEN).all()
    assert summary.line_lengths_B.tolist() == [0, 0]
    np.testing.assert_array_equal(summary.root_values_BL, summary.root_raw_values_BL)


def test_principal_variation_prefers_value_then_index_among_equally_visited() -> None:
    tree = search(
        bandit([0.2] * 5, [0.3, 0.6, 0.9, 0.9, 0.1]),
        SearchConfig(simulations=5, max_depth=1, puct_c_init=100.0),
        consensus_weights_L=[1.0],
        uncertainty_penalty=0.0,
        terminal_tokens=[],
    )
    assert tree.children_visits_BSA[0, 0].tolist() == [1, 1, 1, 1, 1]
    assert summarize(tree).line_tokens_BD.tolist() == [[2]]
    tree.children_visits_BSA[0, 0, 4] += 1
    assert summarize(tree).line_tokens_BD.tolist() == [[4]]


def test_principal_variation_ends_after_a_terminal_token() -> None:
    # One chain 0 → 1 → 2 → …; the token of every edge is 0 or 1, and 1 ends the text.
    next_state_ZA = np.minimum(np.arange(6)[:, np.newaxis] + 1, 5).repeat(2, axis=1)
    logits_ZA = np.log(f32(*[[0.9, 0.1]] * 2, *[[0.1, 0.9]] * 4))
    evaluator = TableEvaluator(np.zeros(1), next_state_ZA, logits_ZA, np.full((6, 1), 0.5))
    tree = search(
        evaluator,
        SearchConfig(simulations=40, max_depth=5),
        consensus_weights_L=[1.0],
        uncertainty_penalty=0.0,
        terminal_tokens=[1],
    )
    summary = summarize(tree)
    assert summary.line_tokens_BD.tolist() == [[0, 0, 1, -1, -1]]
    assert summary.line_lengths_B.tolist() == [3]
    assert (summary.line_nodes_BD[0, 3:] == Tree.UNVISITED).all()
    assert (summary.line_values_BDL[0, 3:] == 0).all()


@pytest.mark.parametrize("length", [1, 2, 9])
def test_principal_variation_has_the_length_asked_for(length: int) -> None:
    whole, part = summarize(hash_tree()), summarize(hash_tree(), length)
    assert part.line_tokens_BD.shape == (2, length)
    common = min(length, 5)
    np.testing.assert_array_equal(part.line_tokens_BD[:, :common], whole.line_tokens_BD[:, :common])
    assert (part.line_tokens_BD[:, common:] == Tree.NO_TOKEN).all()


def test_line_values_are_those_of_its_nodes() -> None:
    tree = hash_tree()
    summary = summarize(tree)
    for row in range(2):
        for depth in range(int(summary.line_lengths_B[row])):
            slot = summary.line_nodes_BD[row, depth]
            np.testing.assert_array_equal(summary.line_values_BDL[row, depth], tree.node_values_BSL[row, slot])


def test_exported_tree_is_plain_data_and_complete() -> None:
    tree = hash_tree()
    exported = json.loads(json.dumps(export_tree(tree, 1)))
    nodes = []

    def walk(node: dict) -> None:
        nodes.append(node)
        assert node["visits"] >= 1 + sum(child["visits"] for child in node["children"])
        for child in node["children"]:
            walk(child)

    walk(exported)
    assert exported["token"] is None
    assert exported["visits"] == 31
    assert len(nodes) == (tree.node_visits_BS[1] > 0).sum()
    slots = sorted(node["node"] for node in nodes)
    assert slots == np.flatnonzero(tree.node_visits_BS[1]).tolist()
    for node in nodes[1:]:
        slot = node["node"]
        parent, action = tree.parents_BS[1, slot], tree.action_from_parent_BS[1, slot]
        assert node["token"] == tree.children_tokens_BSA[1, parent, action]
        assert node["prior"] == pytest.approx(np.exp(tree.children_prior_logits_BSA[1, parent, action]))
        assert node["value"] == tree.node_consensus_BS[1, slot]
        assert node["terminal"] == (node["token"] == 3)
        assert len(node["values"]) == 3


def test_exported_children_are_in_the_order_of_their_actions() -> None:
    # PUCT follows the prior and visits 1, 1, 0 (0.5 + sqrt(3)·0.3 > 0.5 + sqrt(3)·0.7/3): listed as 0, 1.
    tree = search(
        bandit([0.3, 0.7], [0.5, 0.5]),
        SearchConfig(simulations=4, max_depth=1),
        consensus_weights_L=[1.0],
        uncertainty_penalty=0.0,
        terminal_tokens=[],
    )
    children = export_tree(tree, 0)["children"]
    assert [child["node"] for child in children] == [3, 1]
    assert [child["token"] for child in children] == [0, 1]
