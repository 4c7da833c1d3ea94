"""Several leaves of one tree in flight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm import native
from crsm.config import SearchConfig
from crsm.search import Evaluation
from tests.native.oracle import Oracle
from tests.native.searches import POLICIES, assert_same, cases, of_case, run
from tests.search.fakes import HashEvaluator

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)
each_policy = pytest.mark.parametrize("policy", POLICIES)


def oracle_of(evaluator: object, config: SearchConfig, budget: int, **arguments: object) -> Oracle:
    root = run(evaluator, config, "native", **{**arguments, "simulations": 0})
    return Oracle(evaluator, root, config, budget, list(arguments["terminal_tokens"]))  # type: ignore[call-overload]


@given(cases, st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_several_leaves_are_the_search_written_out(case: dict, leaves: int, virtual_loss: int) -> None:
    case = {**case, "simulations": case["simulations"][:1]}
    config, tables, arguments = of_case(case)
    config = config.model_copy(update={"leaves": leaves, "virtual_loss": virtual_loss})
    oracle = oracle_of(tables.python(), config, case["simulations"][0], **arguments)
    assert_same(run(tables.native(), config, **arguments), oracle.run())


@given(cases, st.integers(2, 9), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_several_leaves_leave_no_virtual_visits(case: dict, leaves: int, virtual_loss: int) -> None:
    config, tables, arguments = of_case(case)
    tree = run(tables.native(), config.model_copy(update={"leaves": leaves, "virtual_loss": virtual_loss}), **arguments)
    np.testing.assert_array_equal(tree.num_simulations_B, case["simulations"])
    np.testing.assert_array_equal(tree.node_visits_BS[:, 0], tree.num_simulations_B + 1)
    np.testing.assert_array_equal(tree.children_visits_BSA[:, 0].sum(axis=1), tree.num_simulations_B)
    for row in range(tree.num_trees):
        # The value of a node is the mean of its own evaluation and of all leaves below; a node that cannot go on backs
        # up its own evaluation once per visit.
        sums_SL = np.zeros(tree.node_values_BSL.shape[1:])
        for slot in reversed(np.flatnonzero(tree.node_visits_BS[row])):
            visits, below = tree.node_visits_BS[row, slot], tree.children_visits_BSA[row, slot].sum()
            sums_SL[slot] += (visits - below) * tree.raw_values_BSL[row, slot].astype(np.float64)
            np.testing.assert_allclose(tree.node_values_BSL[row, slot], sums_SL[slot] / visits, rtol=1e-5, atol=1e-6)
            if slot:
                parent, action = tree.parents_BS[row, slot], tree.action_from_parent_BS[row, slot]
                assert tree.children_visits_BSA[row, parent, action] == visits
                assert tree.children_values_BSA[row, parent, action] == tree.node_consensus_BS[row, slot]
                sums_SL[parent] += sums_SL[slot]


@each_policy
def test_leaves_are_evaluated_together(policy: str) -> None:
    rows: list[int] = []

    class ByRows(HashEvaluator):
        def expand_rows(
            self, tree_R: np.ndarray, parent_R: np.ndarray, action_R: np.ndarray, node_R: np.ndarray
        ) -> Evaluation:
            rows.append(len(tree_R))
            # No slot twice, none another one's parent.
            slots = set(zip(tree_R.tolist(), node_R.tolist(), strict=True))
            assert len(slots) == len(tree_R) and not slots & set(zip(tree_R.tolist(), parent_R.tolist(), strict=True))
            parents = np.array([self.latents[t][n] for t, n in zip(tree_R, parent_R, strict=True)])
            states = self.next_states(parents, action_R)
            for tree, node, state in zip(tree_R, node_R, states, strict=True):
                self.latents[tree][int(node)] = state
            return self.evaluate(states)

    config = SearchConfig(**POLICIES[policy], simulations=40, leaves=4, virtual_loss=1)
    together = ByRows([1, 2, 3], 6, 2)
    tree = run(together, config)
    assert max(rows) == 12
    assert len(rows) + len(together.calls) < 30
    # The same leaves one after the other.
    apart = HashEvaluator([1, 2, 3], 6, 2)
    assert_same(run(apart, config), tree)
    assert len(apart.calls) > 35


def test_several_leaves_need_the_native_search() -> None:
    with pytest.raises(ValueError, match="leaves = 2; allowed without the native core: 1"):
        run(HashEvaluator([1], 4, 2), SearchConfig(leaves=2, virtual_loss=1), "python")


def test_rows_that_do_not_fit_are_refused() -> None:
    class Narrow(HashEvaluator):
        def expand_rows(self, tree_R: np.ndarray, *_: np.ndarray) -> Evaluation:
            return Evaluation(*(np.zeros((len(tree_R), 4), np.int64) for _ in range(3)))

    with pytest.raises(ValueError, match=r"prior_logits_BA is int64\[\d, 4\]; allowed: float32\[\d, 4\]"):
        run(Narrow([1], 4, 2), SearchConfig(leaves=3, virtual_loss=1))
