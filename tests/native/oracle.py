"""The search once more, one tree, one simulation and one node at a time, with what only the native search can do:
several leaves in flight, and trees that go on from what an earlier search left.

It is written after the description and shares with the search under test the pure scoring rules of ``crsm.search`` and
the enter-and-back-up of a single row, both tested by themselves.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from crsm.config import SearchConfig
from crsm.search import Rerooted, Tree, considered_visits, gumbel
from crsm.search.consensus import consensus
from crsm.search.numerics import softmax
from crsm.search.puct import exploration_table, minmax_value_scores, puct_scores, raw_value_scores


class Flight(NamedTuple):
    path: list[tuple[int, int]]
    """(node, action) from the root on."""
    node: int
    expands: bool


def grow(tree: Tree, slots: int) -> Tree:
    """A copy with room for ``slots`` nodes."""
    empty = {"parents_BS": -1, "action_from_parent_BS": -1, "children_index_BSA": -1, "children_tokens_BSA": -1}
    arrays = {}
    for field in dataclasses.fields(tree):
        array = getattr(tree, field.name)
        if "_BS" in field.name:
            shape = (array.shape[0], slots, *array.shape[2:])
            grown = np.full(shape, empty.get(field.name, 0), array.dtype)
            grown[:, : array.shape[1]] = array
            arrays[field.name] = grown
        elif isinstance(array, np.ndarray):
            arrays[field.name] = array.copy()
    return dataclasses.replace(tree, **arrays)


class Oracle:
    """Goes on with one tree of a batch of one."""

    def __init__(self, evaluator: object, tree: Tree, config: SearchConfig, budget: int, terminal: list[int]) -> None:
        first = int(np.flatnonzero(tree.node_visits_BS[0])[-1]) + 1
        self.evaluator, self.config, self.terminal, self.budget = evaluator, config, terminal, budget
        self.tree = grow(tree, max(tree.num_slots, first + budget))
        self.first = first
        self.visits_before_A = tree.children_visits_BSA[0, 0].copy()
        self.race = considered_visits(
            min(int(tree.root_actions_BA.sum()), config.max_considered_actions), max(budget, 1)
        )
        most = int(tree.node_visits_BS[0, 0]) + budget + config.leaves * config.virtual_loss
        self.exploration = exploration_table(most, c_init=config.puct_c_init, c_base=config.puct_c_base)
        self.pending_SA = np.zeros(self.tree.children_visits_BSA.shape[1:], np.int32)
        self.most_in_flight = 0

    def run(self) -> Tree:
        begun = 0
        while begun < self.budget:
            flights: list[Flight] = []
            while len(flights) < self.config.leaves and begun < self.budget:
                flight = self.descend(begun, len(flights))
                if flight is None:
                    break
                for node, action in flight.path:
                    self.pending_SA[node, action] += 1
                flights.append(flight)
                begun += 1
            self.most_in_flight = max(self.most_in_flight, len(flights))
            for flight in flights:
                self.land(flight)
        assert (self.pending_SA == 0).all()
        return self.tree

    def descend(self, begun: int, in_flight: int) -> Flight | None:
        tree = self.tree
        path: list[tuple[int, int]] = []
        node, pending = 0, in_flight
        while True:
            action = int(self.scores(node, pending, begun).argmax())
            path.append((node, action))
            pending = int(self.pending_SA[node, action])
            child = int(tree.children_index_BSA[0, node, action])
            if child == Tree.UNVISITED:
                return None if pending else Flight(path, self.first + begun, True)
            if tree.terminal_BS[0, child] or len(path) >= tree.max_depth:
                return Flight(path, child, False)
            node = child

    def scores(self, node: int, pending: int, begun: int) -> np.ndarray:
        tree, config = self.tree, self.config
        visits = tree.children_visits_BSA[0, node]
        values = tree.children_values_BSA[0, node]
        probs, logits = tree.children_prior_probs_BSA[0, node], tree.children_prior_logits_BSA[0, node]
        count = int(tree.node_visits_BS[0, node])
        if config.policy == "gumbel" and node == 0:
            turn = visits - self.visits_before_A + self.pending_SA[0]
            return gumbel.root_scores(
                self.completed(values, visits, probs, node),
                logits[None],
                tree.root_gumbel_BA,
                turn[None],
                np.array([self.race[begun]], np.int32),
                tree.root_actions_BA,
            )[0]
        lost = self.pending_SA[node] * np.int32(config.virtual_loss if pending else 0)
        shared = values * visits.astype(np.float32) / np.maximum(visits + lost, 1).astype(np.float32)
        values = np.where(lost > 0, shared, values)
        visits = visits + lost
        if config.policy == "gumbel":
            return gumbel.interior_scores(self.completed(values, visits, probs, node), logits[None], visits[None])[0]
        transform = minmax_value_scores if config.q_transform == "minmax" else raw_value_scores
        scores = puct_scores(
            transform(values[None], visits[None], tree.node_consensus_BS[:, node]),
            probs[None],
            visits[None],
            self.exploration[[count + pending * config.virtual_loss]],
        )[0]
        return np.where(tree.root_actions_BA[0], scores, np.float32(-np.inf)) if node == 0 else scores

    def completed(self, values: np.ndarray, visits: np.ndarray, probs: np.ndarray, node: int) -> np.ndarray:
        return gumbel.completed_values(
            values[None],
            visits[None],
            probs[None],
            self.tree.raw_consensus_BS[:, node],
            value_scale=self.config.gumbel_value_scale,
            maxvisit_init=self.config.gumbel_maxvisit_init,
        )

    def land(self, flight: Flight) -> None:
        tree, node = self.tree, flight.node
        parent, action = flight.path[-1]
        if flight.expands:
            token = tree.children_tokens_BSA[0, parent, action]
            one = np.ones(1, np.int64)
            said = self.evaluator.expand(parent * one, token * one, node * one, np.ones(1, np.bool_))
            tree.raw_values_BSL[:, node] = said.values_BL
            tree.raw_consensus_BS[:, node] = self.judge(said.values_BL)
            tree.parents_BS[0, node], tree.action_from_parent_BS[0, node] = parent, action
            tree.depth_BS[0, node] = len(flight.path)
            tree.terminal_BS[0, node] = token in self.terminal
            tree.children_tokens_BSA[:, node] = said.actions_BA
            tree.children_prior_logits_BSA[:, node] = said.prior_logits_BA
            tree.children_prior_probs_BSA[:, node] = softmax(said.prior_logits_BA)
            tree.children_index_BSA[0, parent, action] = node
        leaf_values_L = tree.raw_values_BSL[0, node]
        nodes = [*(node for node, _ in flight.path), flight.node]
        for seen, edge in reversed([*zip(nodes, [None, *flight.path], strict=True)]):
            tree.node_visits_BS[0, seen] += 1
            mean_L = tree.node_values_BSL[0, seen]
            mean_L += (leaf_values_L - mean_L) / np.float32(tree.node_visits_BS[0, seen])
            tree.node_consensus_BS[0, seen] = self.judge(mean_L[None])[0]
            if edge is not None:
                self.pending_SA[edge] -= 1
                tree.children_visits_BSA[0, *edge] += 1
                tree.children_values_BSA[0, *edge] = tree.node_consensus_BS[0, seen]
        tree.num_simulations_B[0] += 1

    def judge(self, values_BL: np.ndarray) -> np.ndarray:
        return consensus(values_BL, self.tree.consensus_weights_L, self.tree.uncertainty_penalty)


def take_subtree(tree: Tree, row: int, action: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """What ``reroot`` should make of one tree, by a walk over its nodes; and the old slots of the new ones."""
    kept = [int(tree.children_index_BSA[row, 0, action])]
    for slot in range(kept[0] + 1, tree.num_slots):
        if tree.parents_BS[row, slot] in kept:
            kept.append(slot)
    new_of = {old: new for new, old in enumerate(kept)} | {-1: -1}
    arrays = {
        field.name: getattr(tree, field.name)[row][kept] for field in dataclasses.fields(tree) if "_BS" in field.name
    }
    arrays["parents_BS"] = np.array([new_of.get(int(old), -1) for old in arrays["parents_BS"]], np.int32)
    arrays["action_from_parent_BS"][0] = -1
    arrays["depth_BS"] -= 1
    children = arrays["children_index_BSA"]
    arrays["children_index_BSA"] = np.vectorize(lambda old: new_of[int(old)])(children).astype(np.int32)
    return arrays, kept


def rows_of(reuse: Rerooted, row: int) -> Tree:
    """One of the trees as a batch of one, without its empty slots."""
    filled = int(np.flatnonzero(reuse.tree.node_visits_BS[row])[-1]) + 1
    arrays = {}
    for field in dataclasses.fields(reuse.tree):
        array = getattr(reuse.tree, field.name)
        if "_BS" in field.name:
            arrays[field.name] = array[row : row + 1, :filled].copy()
        elif "_B" in field.name:
            arrays[field.name] = array[row : row + 1].copy()
    return dataclasses.replace(reuse.tree, **arrays)
