"""The most visited nodes of a search tree as one small array: what crosses processes to be drawn.

Columns: row of the parent (-1: the root), token (-1: the root's), visits, value, prior, terminal (0 or 1). Parents come
before their children.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crsm.search.tree import Tree

SKETCH_NODES = 96
"""Nodes of a sketch at most."""
_COLUMNS = 6
SKETCH_BYTES = SKETCH_NODES * _COLUMNS * 4


def sketch_tree(tree: Tree, index: int, max_nodes: int = SKETCH_NODES) -> np.ndarray:
    """The most visited nodes of one tree of the batch. (S, 6) float32

    A node has at least its children's visits and a lower slot, so that whoever is kept has its parent kept as well.
    """
    visits_S = tree.node_visits_BS[index]
    slots = np.flatnonzero(visits_S)
    kept = slots[np.lexsort((slots, -visits_S[slots]))][:max_nodes]
    row_of = {int(slot): row for row, slot in enumerate(kept)}
    sketch_S6 = np.empty((len(kept), _COLUMNS), np.float32)
    for row, slot in enumerate(kept.tolist()):
        parent, token, prior = -1, -1, 1.0
        if slot != Tree.ROOT:
            above, action = int(tree.parents_BS[index, slot]), int(tree.action_from_parent_BS[index, slot])
            parent, token = row_of[above], int(tree.children_tokens_BSA[index, above, action])
            prior = math.exp(tree.children_prior_logits_BSA[index, above, action])
        value, terminal = tree.node_consensus_BS[index, slot], tree.terminal_BS[index, slot]
        sketch_S6[row] = (parent, token, visits_S[slot], value, prior, terminal)
    return sketch_S6


def unfit_sketch(sketch_S6: Any) -> str:
    """What is wrong with the form of a sketch that comes from another process; empty: nothing."""
    if not isinstance(sketch_S6, np.ndarray) or sketch_S6.dtype != np.float32:
        return "is no float32 array"
    if sketch_S6.ndim != 2 or sketch_S6.shape[1] != _COLUMNS or not 1 <= len(sketch_S6) <= SKETCH_NODES:
        return f"has shape {list(sketch_S6.shape)}; allowed: [1 to {SKETCH_NODES}, {_COLUMNS}]"
    parents_S = sketch_S6[:, 0]
    if not np.isfinite(sketch_S6).all() or (parents_S >= np.arange(len(parents_S))).any() or (parents_S[1:] < 0).any():
        return "holds NaN, infinity, or a node before its parent"
    return ""


def nested(sketch_S6: np.ndarray) -> dict[str, Any]:
    """A sketch as nested plain data: ``{"token", "visits", "value", "prior", "terminal", "children"}``, the root's
    token None, children from the most visited to the least."""
    nodes: list[dict[str, Any]] = []
    for parent, token, visits, value, prior, terminal in sketch_S6.tolist():
        node: dict[str, Any] = {
            "token": int(token) if token >= 0 else None,
            "visits": int(visits),
            "value": value,
            "prior": prior,
            "terminal": bool(terminal),
            "children": [],
        }
        if parent >= 0:
            nodes[int(parent)]["children"].append(node)
        nodes.append(node)
    return nodes[0]
