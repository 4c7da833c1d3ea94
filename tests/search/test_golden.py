"""Whole trees, node by node: those of mctx where the rule is the same, and our own to the last bit."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from crsm.config import SearchConfig
from crsm.search import Tree, gumbel_action_weights, search, summarize
from tests.search.fakes import TableEvaluator
from tests.search.golden import make_golden

MCTX_FILES = sorted(make_golden.FOLDER.glob("mctx_*.json"))


@pytest.fixture(params=MCTX_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def run(golden: dict, rows: slice, monkeypatch: pytest.MonkeyPatch) -> tuple[Tree, SearchConfig]:
    tables = golden["tables"]
    settings = SearchConfig(**golden["settings"])
    if settings.gumbel_scale:
        # The noise is no part of the rule; take the very numbers that mctx drew.
        noise_BA = np.array(golden["root_gumbel_BA"], np.float32)[rows]
        module = importlib.import_module("crsm.search.search")
        monkeypatch.setattr(module, "sample_gumbel", lambda seed_B, num_actions, scale: noise_BA)
    evaluator = TableEvaluator(
        np.array(tables["roots_B"])[rows],
        np.array(tables["next_state_ZA"]),
        np.array(tables["prior_logits_ZA"], np.float32),
        np.array(tables["values_Z"], np.float32)[:, np.newaxis],
    )
    tree = search(evaluator, settings, consensus_weights_L=[1.0], uncertainty_penalty=0.0, terminal_tokens=[])
    return tree, settings


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2)], ids=["batch", "alone"])
def test_tree_equals_mctx(golden: dict, rows: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, settings = run(golden, rows, monkeypatch)
    for row, expected in enumerate(golden["trees"][rows]):
        np.testing.assert_array_equal(tree.node_visits_BS[row], expected["node_visits"])
        np.testing.assert_array_equal(tree.parents_BS[row], expected["parents"])
        np.testing.assert_array_equal(tree.action_from_parent_BS[row], expected["action_from_parent"])
        np.testing.assert_array_equal(tree.children_index_BSA[row], expected["children_index"])
        np.testing.assert_array_equal(tree.children_visits_BSA[row], expected["children_visits"])
        np.testing.assert_allclose(tree.node_values_BSL[row, :, 0], expected["node_values"], atol=1e-5)
    weights_BA = summarize(tree).root_probs_BA if settings.policy == "puct" else gumbel_action_weights(tree, settings)
    np.testing.assert_allclose(weights_BA, golden["action_weights_BA"][rows], atol=1e-5)


def test_mctx_golden_trees_are_worth_comparing(golden: dict) -> None:
    """Each holds a node below the root's children, and actions that were treated differently."""
    for tree in golden["trees"]:
        assert max(tree["parents"]) > 0
        assert len(set(tree["children_visits"][0])) > 1


def test_mctx_golden_trees_are_all_there() -> None:
    assert len(MCTX_FILES) == 7


@pytest.mark.parametrize("name", make_golden.SETTINGS)
def test_tree_equals_golden_tree_bit_by_bit(name: str) -> None:
    expected = json.loads((make_golden.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    arrays = make_golden.array_fields(make_golden.run(name))
    assert arrays.keys() == expected.keys()
    for field, array in arrays.items():
        np.testing.assert_array_equal(array, np.array(expected[field], array.dtype), err_msg=field, strict=True)


@pytest.mark.parametrize("name", make_golden.SETTINGS)
def test_tree_of_a_batch_equals_the_tree_alone(name: str) -> None:
    batch = make_golden.array_fields(make_golden.run(name))
    for row in range(len(make_golden.SEEDS)):
        alone = make_golden.array_fields(make_golden.run(name, [row]))
        for field, array in alone.items():
            # The last tree has a smaller budget: alone it has fewer slots, and in the batch the rest stays empty.
            together = batch[field][row]
            if "_BS" in field:
                together = together[: array.shape[1]]
            np.testing.assert_array_equal(array[0], together, err_msg=field, strict=True)


def test_golden_trees_reach_what_they_should_cover() -> None:
    """Terminal nodes, the depth cap, simulations that expand nothing, and root actions that were cut."""
    for name in make_golden.SETTINGS:
        tree = make_golden.run(name)
        assert tree.terminal_BS.any()
        assert not tree.root_actions_BA.all()
        assert ((tree.node_visits_BS == 0).sum(axis=1)[:2] > 0).any()
    assert any((make_golden.run(name).depth_BS == 4).any() for name in make_golden.SETTINGS)
