"""A tree that is used again after one of its tokens was taken."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm import native
from crsm.config import SearchConfig
from crsm.search import Evaluation, Tree, reroot
from tests.native.oracle import Oracle, rows_of, take_subtree
from tests.native.searches import RandomTables, assert_same, bits, cases, of_case, run
from tests.search.fakes import HashEvaluator, TableEvaluator

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)
core = native.core


class Moving(TableEvaluator):
    """Its latents follow the tree."""

    def remap(self, new_from_old_BS: np.ndarray, slots: int) -> None:
        assert new_from_old_BS.dtype == np.int64 and new_from_old_BS.shape[0] == self.num_trees
        for tree, latents in enumerate(self.latents):
            moved = {int(new_from_old_BS[tree, old]): state for old, state in latents.items()}
            moved.pop(-1, None)
            assert max(moved) < slots
            self.latents[tree] = moved


def first_search(case: dict) -> tuple[SearchConfig, RandomTables, dict, Tree, np.ndarray]:
    """A search, and an action of every root that can be taken (visited, and not the end)."""
    case = {**case, "num_terminal": min(case["num_terminal"], case["num_actions"] - 1)}
    case["simulations"] = [max(count, 40) for count in case["simulations"]]
    config, tables, arguments = of_case({**case, "root_prior_mass": 1.0, "max_considered_actions": 9, "holes": False})
    tree = run(tables.native(), config, **arguments)
    allowed_BA = tree.children_visits_BSA[:, 0] > 0
    allowed_BA[:, : case["num_terminal"]] = False
    return config, tables, arguments, tree, np.where(allowed_BA.any(axis=1), allowed_BA.argmax(axis=1), -1)


@given(cases)
@settings(max_examples=40, deadline=None)
def test_a_taken_subtree_keeps_its_statistics(case: dict) -> None:
    *_, tree, action_B = first_search(case)
    if (action_B < 0).any():
        return
    reuse = reroot(tree, action_B, root_prior_mass=0.6)
    np.testing.assert_array_equal(reuse.tree.num_simulations_B + 1, reuse.tree.node_visits_BS[:, 0])
    np.testing.assert_array_equal(
        reuse.tree.node_visits_BS[:, 0], tree.children_visits_BSA[np.arange(len(action_B)), 0, action_B]
    )
    np.testing.assert_allclose(reuse.tree.children_prior_probs_BSA[:, 0].sum(axis=1), 1.0, rtol=1e-5)
    assert (reuse.tree.children_prior_probs_BSA[:, 0][~reuse.tree.root_actions_BA] == 0).all()
    for row in range(tree.num_trees):
        expected, kept = take_subtree(tree, row, int(action_B[row]))
        np.testing.assert_array_equal(np.flatnonzero(reuse.new_from_old_BS[row] >= 0), kept)
        np.testing.assert_array_equal(reuse.new_from_old_BS[row, kept], np.arange(len(kept)))
        for name, array in expected.items():
            found = getattr(reuse.tree, name)[row]
            if name == "children_prior_probs_BSA":
                found, array = found[1:], array[1:]
            np.testing.assert_array_equal(found[: len(array)], array, err_msg=name, strict=True)
            assert name != "node_visits_BS" or (found[len(array) :] == 0).all()


@given(cases, st.lists(st.integers(0, 25), min_size=4, max_size=4), st.sampled_from([(1, 0), (3, 2)]))
@settings(max_examples=60, deadline=None)
def test_a_search_goes_on_from_a_taken_subtree(case: dict, budgets: list[int], flight: tuple[int, int]) -> None:
    config, tables, arguments, _, action_B = first_search(case)
    if (action_B < 0).any():
        return
    config = config.model_copy(update={"leaves": flight[0], "virtual_loss": flight[1]})
    first = {**arguments}
    evaluator, same = tables.native(), Moving(*tables.tables)
    trees = [run(network, config.model_copy(update={"leaves": 1}), **first) for network in (evaluator, same)]
    assert_same(*trees)
    reuse = reroot(trees[0], action_B, root_prior_mass=0.8)
    again = {**arguments, "simulations": budgets[: len(action_B)]}
    further = run(evaluator, config, reuse=reuse, **again)
    assert_same(run(same, config, reuse=reuse, **again), further)
    for row in range(len(action_B)):
        alone = rows_of(reuse, row)
        alone = dataclasses.replace(
            alone, root_gumbel_BA=further.root_gumbel_BA[row : row + 1], max_depth=config.max_depth
        )
        network = Moving(*tables.tables)
        network.num_trees, network.latents = 1, [same.latents[row]]
        expected = Oracle(network_at(network), alone, config, budgets[row], list(arguments["terminal_tokens"])).run()
        for field in dataclasses.fields(Tree):
            if "_B" in field.name:
                found, array = getattr(further, field.name)[row], getattr(expected, field.name)[0]
                if "_BS" in field.name:
                    found = found[: len(array)]
                np.testing.assert_array_equal(bits(found), bits(array), err_msg=field.name)


def network_at(evaluator: Moving) -> Moving:
    """The evaluator with the latents of the old tree only: later ones are made again."""
    evaluator.latents = [dict(evaluator.latents[0])]
    evaluator.expand = _forgiving(evaluator)  # type: ignore[method-assign]
    return evaluator


def _forgiving(evaluator: Moving) -> object:
    def expand(parent_B: np.ndarray, action_B: np.ndarray, node_B: np.ndarray, active_B: np.ndarray) -> Evaluation:
        evaluator.latents[0].pop(int(node_B[0]), None)
        return TableEvaluator.expand(evaluator, parent_B, action_B, node_B, active_B)

    return expand


def test_an_evaluator_that_cannot_move_its_latents_is_refused() -> None:
    evaluator = HashEvaluator([1], 4, 2)
    tree = run(evaluator, SearchConfig(simulations=30))
    with pytest.raises(ValueError, match="evaluator: it cannot move its latents"):
        run(evaluator, SearchConfig(simulations=5), reuse=reroot(tree, int(tree.children_visits_BSA[0, 0].argmax())))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (4, "tree 0: action = 4; allowed: 0 to 3"),
        (-1, "tree 0: action = -1; allowed"),
        ([0, 1, 2], "allowed: an integer, or one for each of the 2 trees"),
        (0.5, "action = 0.5; allowed"),
        ([1, 3], "tree 1: action = 3 was not visited"),
        ([1, 0], "tree 1: action = 0 ends the text"),
    ],
)
def test_actions_that_cannot_be_taken_are_refused(action: object, message: str) -> None:
    # Action 3 has no prior, token 0 ends the text.
    logits_ZA = np.log(np.array([[0.4, 0.35, 0.25, 1e-30]], np.float32))
    evaluator = core.TableEvaluator(
        np.zeros(2, np.int64), np.zeros((1, 4), np.int64), logits_ZA, np.full((1, 1), 0.5, np.float32)
    )
    tree = run(evaluator, SearchConfig(simulations=20), terminal_tokens=[0])
    with pytest.raises(ValueError, match=message):
        reroot(tree, action)  # type: ignore[arg-type]


def test_trees_of_another_search_are_refused() -> None:
    tables = RandomTables(2, 2, 4, 2, holes=False, coarse=False)
    tree = run(tables.native(), SearchConfig(simulations=30))
    reuse = reroot(tree, tree.children_visits_BSA[:, 0].argmax(axis=1))
    other = RandomTables(2, 3, 4, 2, holes=False, coarse=False).native()
    with pytest.raises(ValueError, match=r"reuse: trees, actions, layers = \(2, 4, 2\); allowed: \(3, 4, 2\)"):
        run(other, SearchConfig(), reuse=reuse)
    with pytest.raises(ValueError, match=r"reuse: consensus weights .* allowed: those of this search"):
        run(tables.native(), SearchConfig(), reuse=reuse, uncertainty_penalty=0.9)
    with pytest.raises(ValueError, match=r"reuse: a tree was given; allowed without the native core: None"):
        run(tables.native(), SearchConfig(), "python", reuse=reuse)


@pytest.mark.parametrize(
    ("name", "slot", "value", "message"),
    [
        ("children_index_BSA", 0, 999, "reuse: tree 1, slot 0: child = 999; allowed"),
        ("children_index_BSA", 2, 1, "reuse: tree 1, slot 2: child = 1; allowed"),
        ("parents_BS", 2, 7, "reuse: tree 1, slot 2: parent = 7; allowed"),
        ("action_from_parent_BS", 1, -4, "reuse: tree 1, slot 1: action = -4; allowed"),
        ("node_visits_BS", 1, 10**6, "reuse: tree 1, slot 1: visits = 1000000; allowed"),
        ("node_visits_BS", 1, 0, "reuse: tree 1, slot 1: visits = 0; allowed"),
    ],
)
@pytest.mark.parametrize("policy", ["puct", "gumbel"])
def test_trees_that_no_search_has_left_are_refused(name: str, slot: int, value: int, message: str, policy: str) -> None:
    tables = RandomTables(2, 2, 4, 2, holes=False, coarse=False)
    evaluator, config = tables.native(), SearchConfig(policy=policy, simulations=60)
    tree = run(evaluator, config)
    reuse = reroot(tree, tree.children_visits_BSA[:, 0].argmax(axis=1))
    getattr(reuse.tree, name)[1, slot] = value
    with pytest.raises(ValueError, match=message):
        run(evaluator, config, reuse=reuse)
