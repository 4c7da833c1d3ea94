"""The search tree: a batch of trees as preallocated arrays, and what is read from them.

Suffixes: `B` trees, `S` node slots (a budget of n simulations needs n + 1), `A` children per node, `L` layers, `D`
depth. Node slot 0 is the root; simulation i (from 0) owns slot i + 1 and leaves it empty if it ended at a node that
already was in the tree. A parent's slot is thus always lower than its children's. Where many nodes of many trees are
handled at once, a node is named by its flat index ``tree · S + slot``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from crsm.search.consensus import consensus
from crsm.search.evaluator import Evaluation
from crsm.search.numerics import BoolArray, FloatArray, IntArray, TokenArray, softmax


@dataclass(frozen=True, slots=True)
class Tree:
    """Statistics of a batch of searches. The search writes into the arrays; everyone else reads them."""

    node_visits_BS: IntArray
    """Simulations that went through the node, its own evaluation included; 0: the slot is empty."""
    node_values_BSL: FloatArray
    """Mean over those simulations of the leaf's value, per layer."""
    node_consensus_BS: FloatArray
    """The consensus of ``node_values_BSL``."""
    raw_values_BSL: FloatArray
    """What the evaluator said of the node itself, per layer."""
    raw_consensus_BS: FloatArray
    """The consensus of ``raw_values_BSL``."""
    parents_BS: IntArray
    """Slot of the parent; ``NO_PARENT`` at the root and in empty slots."""
    action_from_parent_BS: IntArray
    """Index (below A) of the parent's edge that leads here; ``NO_PARENT`` likewise."""
    depth_BS: IntArray
    """Edges from the root."""
    terminal_BS: BoolArray
    """The token that leads here ends the text; such a node is evaluated and never expanded."""
    children_index_BSA: IntArray
    """Slot of the child; ``UNVISITED`` if it has none yet."""
    children_tokens_BSA: TokenArray
    """Token id of the edge; ``NO_TOKEN`` in empty slots."""
    children_prior_logits_BSA: FloatArray
    """Log-probability of the token under the policy over the full vocabulary."""
    children_prior_probs_BSA: FloatArray
    """The prior of the selection rules: renormalised over the node's children, at the root over those not cut."""
    children_visits_BSA: IntArray
    """Simulations that took the edge."""
    children_values_BSA: FloatArray
    """Q: the child's ``node_consensus_BS``; 0 if unvisited."""
    root_actions_BA: BoolArray
    """Root actions that the search considers; the others are cut."""
    root_gumbel_BA: FloatArray
    """Gumbel noise of the root actions; 0 without noise."""
    num_simulations_B: IntArray
    """Simulations run so far."""
    consensus_weights_L: FloatArray
    """The weights k of the consensus."""
    uncertainty_penalty: np.float32
    """The penalty λ of the consensus."""
    max_depth: int
    """Nodes at this depth are evaluated and never expanded."""

    ROOT: ClassVar[int] = 0
    NO_PARENT: ClassVar[int] = -1
    UNVISITED: ClassVar[int] = -1
    NO_TOKEN: ClassVar[int] = -1

    @property
    def num_trees(self) -> int:
        """B."""
        return int(self.children_index_BSA.shape[0])

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self.children_index_BSA.shape[1])

    @property
    def num_actions(self) -> int:
        """A."""
        return int(self.children_index_BSA.shape[2])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.node_values_BSL.shape[2])


@dataclass(frozen=True, slots=True)
class SearchSummary:
    """What a caller normally wants of a finished search."""

    root_tokens_BA: TokenArray
    """Token ids of the root actions. `[B, A]` int64"""
    root_visits_BA: IntArray
    """Simulations that took each. `[B, A]` int32"""
    root_probs_BA: FloatArray
    """Their visit distribution; the prior where no simulation was run. `[B, A]` float32"""
    root_raw_values_BL: FloatArray
    """What the evaluator says of the root. `[B, L]` float32"""
    root_values_BL: FloatArray
    """Mean value of the root after the search. `[B, L]` float32"""
    line_tokens_BD: TokenArray
    """Principal variation, padded with ``Tree.NO_TOKEN``. `[B, D]` int64"""
    line_nodes_BD: TokenArray
    """Node slots along it (the evaluator's latents have the same), padded with ``Tree.UNVISITED``. `[B, D]` int64"""
    line_lengths_B: TokenArray
    """Its number of tokens. `[B]` int64"""
    line_values_BDL: FloatArray
    """Mean values of its nodes, padded with 0. `[B, D, L]` float32"""
    num_simulations_B: IntArray
    """Simulations run. `[B]` int32"""


def new_tree(
    root: Evaluation,
    *,
    num_simulations: int,
    max_depth: int,
    consensus_weights_L: FloatArray,
    uncertainty_penalty: float,
    root_actions_BA: BoolArray,
    root_gumbel_BA: FloatArray,
) -> Tree:
    """Allocates everything that the search will need and fills in the roots.

    Args:
        root: Evaluation of the roots.
        num_simulations: The largest budget of the batch.
        max_depth: Depth at which nodes are no longer expanded.
        consensus_weights_L: The weights k of the consensus. Shape `[L]`.
        uncertainty_penalty: The penalty λ of the consensus.
        root_actions_BA: Root actions to consider, at least one per tree. Shape `[B, A]`.
        root_gumbel_BA: Gumbel noise of the root actions. Shape `[B, A]`.

    Returns:
        A tree whose roots have been visited once (by their own evaluation) and have no children.
    """
    batch, actions = root.actions_BA.shape
    slots = num_simulations + 1
    layers = root.values_BL.shape[1]
    tree = Tree(
        node_visits_BS=np.zeros((batch, slots), np.int32),
        node_values_BSL=np.zeros((batch, slots, layers), np.float32),
        node_consensus_BS=np.zeros((batch, slots), np.float32),
        raw_values_BSL=np.zeros((batch, slots, layers), np.float32),
        raw_consensus_BS=np.zeros((batch, slots), np.float32),
        parents_BS=np.full((batch, slots), Tree.NO_PARENT, np.int32),
        action_from_parent_BS=np.full((batch, slots), Tree.NO_PARENT, np.int32),
        depth_BS=np.zeros((batch, slots), np.int32),
        terminal_BS=np.zeros((batch, slots), np.bool_),
        children_index_BSA=np.full((batch, slots, actions), Tree.UNVISITED, np.int32),
        children_tokens_BSA=np.full((batch, slots, actions), Tree.NO_TOKEN, np.int64),
        children_prior_logits_BSA=np.zeros((batch, slots, actions), np.float32),
        children_prior_probs_BSA=np.zeros((batch, slots, actions), np.float32),
        children_visits_BSA=np.zeros((batch, slots, actions), np.int32),
        children_values_BSA=np.zeros((batch, slots, actions), np.float32),
        root_actions_BA=root_actions_BA,
        root_gumbel_BA=root_gumbel_BA,
        num_simulations_B=np.zeros(batch, np.int32),
        consensus_weights_L=consensus_weights_L,
        uncertainty_penalty=np.float32(uncertainty_penalty),
        max_depth=max_depth,
    )
    tree.node_visits_BS[:, Tree.ROOT] = 1
    tree.node_values_BSL[:, Tree.ROOT] = root.values_BL
    tree.raw_values_BSL[:, Tree.ROOT] = root.values_BL
    value_B = consensus(root.values_BL, consensus_weights_L, tree.uncertainty_penalty)
    tree.node_consensus_BS[:, Tree.ROOT] = value_B
    tree.raw_consensus_BS[:, Tree.ROOT] = value_B
    tree.children_tokens_BSA[:, Tree.ROOT] = root.actions_BA
    tree.children_prior_logits_BSA[:, Tree.ROOT] = root.prior_logits_BA
    kept_logits_BA = np.where(root_actions_BA, root.prior_logits_BA, np.float32(-np.inf))
    tree.children_prior_probs_BSA[:, Tree.ROOT] = softmax(kept_logits_BA)
    return tree


def summarize(tree: Tree, max_length: int | None = None) -> SearchSummary:
    """Reads the plan off a tree.

    The principal variation starts at the root and follows the most visited child; among equals the one of higher
    consensus value, then the lower index. It stops where no child was visited; a terminal node has none.

    Args:
        tree: A finished search.
        max_length: D, tokens of the principal variation at most; None: the tree's depth cap.

    Returns:
        The summary; its arrays are copies.
    """
    batch = tree.num_trees
    length = tree.max_depth if max_length is None else max_length
    line_tokens_BD = np.full((batch, length), Tree.NO_TOKEN, np.int64)
    line_nodes_BD = np.full((batch, length), Tree.UNVISITED, np.int64)
    line_lengths_B = np.zeros(batch, np.int64)
    line_values_BDL = np.zeros((batch, length, tree.num_layers), np.float32)
    rows = np.arange(batch)
    nodes = np.full(batch, Tree.ROOT, np.int64)
    for depth in range(length):
        visits = tree.children_visits_BSA[rows, nodes]
        most = visits.max(axis=1)
        values = np.where(visits == most[:, np.newaxis], tree.children_values_BSA[rows, nodes], np.float32(-np.inf))
        best = values.argmax(axis=1)
        goes_on = most > 0
        rows, nodes, best = rows[goes_on], nodes[goes_on], best[goes_on]
        if not rows.size:
            break
        line_tokens_BD[rows, depth] = tree.children_tokens_BSA[rows, nodes, best]
        nodes = tree.children_index_BSA[rows, nodes, best].astype(np.int64)
        line_nodes_BD[rows, depth] = nodes
        line_values_BDL[rows, depth] = tree.node_values_BSL[rows, nodes]
        line_lengths_B[rows] += 1
    root_visits_BA = tree.children_visits_BSA[:, Tree.ROOT].copy()
    total_B1 = root_visits_BA.sum(axis=1, keepdims=True)
    visit_probs_BA = root_visits_BA.astype(np.float32) / np.maximum(total_B1, 1).astype(np.float32)
    prior_probs_BA = tree.children_prior_probs_BSA[:, Tree.ROOT]
    return SearchSummary(
        root_tokens_BA=tree.children_tokens_BSA[:, Tree.ROOT].copy(),
        root_visits_BA=root_visits_BA,
        root_probs_BA=np.where(total_B1 > 0, visit_probs_BA, prior_probs_BA),
        root_raw_values_BL=tree.raw_values_BSL[:, Tree.ROOT].copy(),
        root_values_BL=tree.node_values_BSL[:, Tree.ROOT].copy(),
        line_tokens_BD=line_tokens_BD,
        line_nodes_BD=line_nodes_BD,
        line_lengths_B=line_lengths_B,
        line_values_BDL=line_values_BDL,
        num_simulations_B=tree.num_simulations_B.copy(),
    )


def export_tree(tree: Tree, index: int) -> dict[str, object]:
    """One tree of the batch as plain data, for drawing and for JSON.

    Args:
        tree: A batch of trees.
        index: Which of them.

    Returns:
        The root: ``{"token", "node", "visits", "prior", "value", "values", "raw_values", "terminal", "children"}``,
        with the visited children as a list of the same, in the order of their actions. ``prior`` is the probability
        under the full vocabulary, ``value`` the consensus of ``values``; the root has token None and prior 1.
    """

    def describe(slot: int, token: int | None, prior: float) -> dict[str, object]:
        return {
            "token": token,
            "node": slot,
            "visits": int(tree.node_visits_BS[index, slot]),
            "prior": prior,
            "value": float(tree.node_consensus_BS[index, slot]),
            "values": tree.node_values_BSL[index, slot].tolist(),
            "raw_values": tree.raw_values_BSL[index, slot].tolist(),
            "terminal": bool(tree.terminal_BS[index, slot]),
        }

    root = describe(Tree.ROOT, None, 1.0)
    children_of: dict[int, list[dict[str, object]]] = {Tree.ROOT: []}
    root["children"] = children_of[Tree.ROOT]
    edges = sorted(
        (int(tree.parents_BS[index, slot]), int(tree.action_from_parent_BS[index, slot]), int(slot))
        for slot in np.flatnonzero(tree.node_visits_BS[index])
        if slot != Tree.ROOT
    )
    # In the order of parents' slots every parent comes before its children.
    for parent, action, slot in edges:
        token = int(tree.children_tokens_BSA[index, parent, action])
        prior = math.exp(tree.children_prior_logits_BSA[index, parent, action])
        node = describe(slot, token, prior)
        node["children"] = children_of[slot] = []
        children_of[parent].append(node)
    return root
