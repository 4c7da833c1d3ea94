"""The native search is the Python search: every array of every tree, bit by bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from crsm import native
from crsm.config import SearchConfig
from crsm.search import Tree, python_search, search
from crsm.search.native import bytes_per_tree
from tests.native.searches import POLICIES, RandomTables, assert_same, cases, of_case, run
from tests.search.fakes import HashEvaluator

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)
core = native.core
each_policy = pytest.mark.parametrize("policy", POLICIES)


@given(cases)
@settings(max_examples=150, deadline=None)
def test_the_native_search_is_the_python_search(case: dict) -> None:
    config, tables, arguments = of_case(case)
    expected = run(tables.python(), config, "python", **arguments)
    assert_same(run(tables.native(), config, **arguments), expected)
    assert_same(run(tables.python(), config, **arguments), expected)


@given(cases)
@settings(max_examples=20, deadline=None)
def test_the_python_search_takes_a_native_evaluator(case: dict) -> None:
    config, tables, arguments = of_case(case)
    expected = run(tables.python(), config, "python", **arguments)
    assert_same(run(tables.native(), config, "python", **arguments), expected)


@given(cases)
@settings(max_examples=20, deadline=None)
def test_an_evaluator_in_python_gets_the_same_calls(case: dict) -> None:
    config, tables, arguments = of_case(case)
    evaluators = tables.python(), tables.python()
    for evaluator, engine in zip(evaluators, ("python", "native"), strict=True):
        run(evaluator, config, engine, **arguments)
    for one, other in zip(evaluators[0].calls, evaluators[1].calls, strict=True):
        for array, again in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, again, strict=True)


@each_policy
def test_many_trees_are_shared_by_threads_without_a_difference(policy: str) -> None:
    tables = RandomTables(3, 900, 5, 3, holes=False, coarse=False)
    config = SearchConfig(**POLICIES[policy], simulations=12)
    threads = core.num_threads()
    try:
        native.set_num_threads(1)
        alone = run(tables.native(), config)
        native.set_num_threads(4)
        assert_same(run(tables.native(), config), alone)
    finally:
        native.set_num_threads(threads)


def test_without_a_choice_the_native_search_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("crsm.search.engines.native_search", lambda *_, **__: called.append("native"))
    search(
        HashEvaluator([1], 4, 2), SearchConfig(), consensus_weights_L=[1, 1], uncertainty_penalty=0, terminal_tokens=[]
    )
    assert called == ["native"]


def test_an_engine_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="engine = 'rust'; allowed: auto, native, python"):
        run(HashEvaluator([1], 4, 2), SearchConfig(), "rust")


def test_python_search_is_the_definition() -> None:
    tables = RandomTables(2, 2, 4, 2, holes=False, coarse=False)
    arguments: dict = {"consensus_weights_L": [0.5, 0.5], "uncertainty_penalty": 0.1, "terminal_tokens": [1]}
    assert_same(
        python_search(tables.python(), SearchConfig(), **arguments),
        search(tables.native(), SearchConfig(), engine="native", **arguments),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("slots", "actions", "layers"), [(65, 6, 4), (2, 1, 1), (10, 3, 7)])
def test_the_stated_size_is_that_of_the_arrays(slots: int, actions: int, layers: int) -> None:
    tables = RandomTables(1, 3, actions, layers, holes=False, coarse=False)
    tree = run(tables.native(), SearchConfig(simulations=slots - 1))
    arrays = [getattr(tree, field.name) for field in dataclasses.fields(Tree) if "_B" in field.name]
    assert sum(array.nbytes for array in arrays) == 3 * bytes_per_tree(slots, actions, layers)
    # Views of one block, in which nothing but alignment is added.
    assert len({id(array.base) for array in arrays}) == 1
    assert 0 <= arrays[0].base.nbytes - sum(array.nbytes for array in arrays) < 64 * len(arrays)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-5, 1, 1), (2**40, 1, 1)])
def test_sizes_that_no_tree_has_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        bytes_per_tree(*sizes)
