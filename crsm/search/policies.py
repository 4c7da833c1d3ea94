"""The search policies: which scoring rule is applied at the root and which below it, with which settings.

A rule gathers what it needs of some nodes from the tree, and calls the pure functions of its file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crsm.search import gumbel
from crsm.search.numerics import FloatArray, IntArray, TokenArray
from crsm.search.puct import exploration_table, minmax_value_scores, puct_scores, raw_value_scores
from crsm.search.seq_halving import considered_visits_table
from crsm.search.tree import Tree

if TYPE_CHECKING:
    from crsm.config import SearchConfig

_MINUS_INFINITY = np.float32(-np.inf)

Rule = Callable[[Tree, TokenArray], FloatArray]


class Policy(NamedTuple):
    """Scores over the actions of some nodes; the highest is taken, the first among equals."""

    root: Rule
    """From the trees' indices, `[R]`, to scores of their roots' actions, `[R, A]`; -inf for those that were cut."""
    interior: Rule
    """From flat node indices, `[R]`, to scores of their actions, `[R, A]`."""


def make_policy(tree: Tree, settings: SearchConfig, num_simulations_B: IntArray) -> Policy:
    """The policy that the settings name.

    Args:
        tree: The tree it will be used on, for its sizes and the number of root actions that were not cut.
        settings: Settings of the search.
        num_simulations_B: Each tree's budget. Shape `[B]`.

    Returns:
        The two rules.
    """
    if settings.policy == "puct":
        rule = functools.partial(
            _puct_rule,
            exploration=exploration_table(tree.num_slots, c_init=settings.puct_c_init, c_base=settings.puct_c_base),
            value_scores=minmax_value_scores if settings.q_transform == "minmax" else raw_value_scores,
        )
        return Policy(root=functools.partial(_considered_only, rule=rule), interior=rule)
    considered_B = np.minimum(tree.root_actions_BA.sum(axis=1), settings.max_considered_actions).astype(np.int32)
    transform = functools.partial(
        gumbel.completed_values,
        value_scale=settings.gumbel_value_scale,
        maxvisit_init=settings.gumbel_maxvisit_init,
    )
    return Policy(
        root=functools.partial(
            _gumbel_root_rule,
            considered_visits_BS=considered_visits_table(considered_B, num_simulations_B),
            transform=transform,
        ),
        interior=functools.partial(_gumbel_interior_rule, transform=transform),
    )


def gumbel_action_weights(tree: Tree, settings: SearchConfig) -> FloatArray:
    """The improved root policy of Gumbel MuZero: a training target that is sound at any budget, and a softer policy.

    Args:
        tree: A finished search, by either policy.
        settings: Settings of the search.

    Returns:
        Probabilities of the root actions, 0 where they were cut. Shape `[B, A]`.
    """
    root = Tree.ROOT
    completed_BA = gumbel.completed_values(
        tree.children_values_BSA[:, root],
        tree.children_visits_BSA[:, root],
        tree.children_prior_probs_BSA[:, root],
        tree.raw_consensus_BS[:, root],
        value_scale=settings.gumbel_value_scale,
        maxvisit_init=settings.gumbel_maxvisit_init,
    )
    return gumbel.action_weights(completed_BA, tree.children_prior_logits_BSA[:, root], tree.root_actions_BA)


def edges(array_BSA: np.ndarray, nodes: TokenArray) -> np.ndarray:
    """The rows of a per-edge array at flat node indices, `[R, A]`."""
    return array_BSA.reshape(-1, array_BSA.shape[2]).take(nodes, axis=0)


def _considered_only(tree: Tree, trees: TokenArray, *, rule: Rule) -> FloatArray:
    scores: FloatArray = np.where(tree.root_actions_BA[trees], rule(tree, trees * tree.num_slots), _MINUS_INFINITY)
    return scores


def _puct_rule(
    tree: Tree,
    nodes: TokenArray,
    *,
    exploration: FloatArray,
    value_scores: Callable[[FloatArray, IntArray, FloatArray], FloatArray],
) -> FloatArray:
    visits = edges(tree.children_visits_BSA, nodes)
    values = edges(tree.children_values_BSA, nodes)
    return puct_scores(
        value_scores(values, visits, tree.node_consensus_BS.reshape(-1).take(nodes)),
        edges(tree.children_prior_probs_BSA, nodes),
        visits,
        exploration.take(tree.node_visits_BS.reshape(-1).take(nodes)),
    )


def _gumbel_root_rule(
    tree: Tree, trees: TokenArray, *, considered_visits_BS: IntArray, transform: Callable[..., FloatArray]
) -> FloatArray:
    nodes = trees * tree.num_slots
    visits = edges(tree.children_visits_BSA, nodes)
    return gumbel.root_scores(
        _completed_values(tree, nodes, visits, transform),
        edges(tree.children_prior_logits_BSA, nodes),
        tree.root_gumbel_BA[trees],
        visits,
        # A tree's simulations so far are the visits of its root's children.
        considered_visits_BS[trees, tree.num_simulations_B[trees]],
        tree.root_actions_BA[trees],
    )


def _gumbel_interior_rule(tree: Tree, nodes: TokenArray, *, transform: Callable[..., FloatArray]) -> FloatArray:
    visits = edges(tree.children_visits_BSA, nodes)
    completed = _completed_values(tree, nodes, visits, transform)
    return gumbel.interior_scores(completed, edges(tree.children_prior_logits_BSA, nodes), visits)


def _completed_values(
    tree: Tree, nodes: TokenArray, visits: IntArray, transform: Callable[..., FloatArray]
) -> FloatArray:
    return transform(
        edges(tree.children_values_BSA, nodes),
        visits,
        edges(tree.children_prior_probs_BSA, nodes),
        tree.raw_consensus_BS.reshape(-1).take(nodes),
    )
