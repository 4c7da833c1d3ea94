"""A sketch is the tree's most visited part, and nothing that came from elsewhere passes for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.search import Tree, export_tree, sketch_tree
from crsm.search.sketch import SKETCH_NODES, nested, unfit_sketch
from tests.search.test_tree import hash_tree


def simplified(node: dict[str, Any]) -> dict[str, Any]:
    """A node of an exported tree as a sketch tells it."""
    children = sorted(node["children"], key=lambda child: (-child["visits"], child["node"]))
    return {
        "token": node["token"],
        "visits": node["visits"],
        "value": pytest.approx(node["value"], rel=1e-6),
        "prior": pytest.approx(node["prior"], rel=1e-6),
        "terminal": node["terminal"],
        "children": [simplified(child) for child in children],
    }


def size(node: dict[str, Any]) -> int:
    return 1 + sum(map(size, node["children"]))


@pytest.mark.parametrize("index", [0, 1])
def test_with_room_for_all_it_is_the_whole_tree(index: int) -> None:
    tree = hash_tree()
    sketch = sketch_tree(tree, index)
    assert len(sketch) == (tree.node_visits_BS[index] > 0).sum() <= SKETCH_NODES
    assert nested(sketch) == simplified(export_tree(tree, index))
    assert unfit_sketch(sketch) == ""


@given(st.integers(1, 40), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_with_less_room_the_most_visited_stay_and_each_with_its_parent(room: int, simulations: int) -> None:
    tree = hash_tree(simulations=simulations)
    sketch = sketch_tree(tree, 0, room)
    visits = np.sort(tree.node_visits_BS[0][tree.node_visits_BS[0] > 0])[::-1]
    assert sketch[:, 2].tolist() == visits[:room].tolist()
    assert unfit_sketch(sketch) == "" and size(nested(sketch)) == len(sketch)


def test_a_root_alone() -> None:
    tree = hash_tree(simulations=1)
    (root,) = sketch_tree(tree, 0, 1)
    assert root[:3].tolist() == [-1, -1, tree.node_visits_BS[0, Tree.ROOT]] and root[3] == tree.node_consensus_BS[0, 0]


def changed(row: int, column: int, value: float) -> np.ndarray:
    sketch = sketch_tree(hash_tree(), 0)
    sketch[row, column] = value
    return sketch


@pytest.mark.parametrize(
    ("sketch", "reason"),
    [
        (None, "no float32"),
        (np.zeros((2, 6)), "no float32"),
        (np.zeros((2, 5), np.float32), "shape"),
        (np.zeros((0, 6), np.float32), "shape"),
        (np.zeros((SKETCH_NODES + 1, 6), np.float32), "shape"),
        (changed(2, 3, np.nan), "NaN"),
        (changed(2, 0, 2.0), "before its parent"),
        (changed(2, 0, -1.0), "before its parent"),
        (changed(0, 0, 0.0), "before its parent"),
    ],
)
def test_what_is_no_sketch_is_named(sketch: Any, reason: str) -> None:
    assert reason in unfit_sketch(sketch)
