"""What a search leaves is used again: the subtree of an accepted token becomes a tree of its own.

Suffixes: `B` trees, `S` node slots of the old tree, `K` of the new one, `A` children per node.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from crsm.search.evaluator import TreeShape
from crsm.search.numerics import FloatArray, TokenArray, softmax
from crsm.search.root_actions import root_actions_by_prior_mass
from crsm.search.tree import Tree

_DROPPED = -1


@dataclass(frozen=True, slots=True)
class Rerooted:
    """The trees that are left when one action of each root is taken, and where their nodes were."""

    tree: Tree
    """Nodes in their old order without gaps, visits and values as they were, depths one less. The root's own evaluation
    counts as its first visit, as in a new tree: ``num_simulations_B`` is the visits of the root less one."""
    new_from_old_BS: TokenArray
    """The new slot of every old one, -1 where a node is dropped; never higher than the old one. `[B, S]` int64"""


def reroot(tree: Tree, action: int | ArrayLike, *, root_prior_mass: float = 1.0) -> Rerooted:
    """Takes one root action of every tree; the child becomes the root, and all that is not below it is dropped.

    Args:
        tree: A finished search.
        action: Indices (below A) of root actions: one for every tree, or one each. Shape `[B]`.
        root_prior_mass: New root actions outside the smallest set that holds this prior mass are cut; the new root's
            priors are renormalised over the others. Visits that cut actions have had stay.

    Returns:
        The new trees, which ``search`` takes as ``reuse``; without root noise.

    Raises:
        ValueError: An action is out of range, was never visited, or ends the text; or ``root_prior_mass`` is not in
            (0, 1]. The message names the tree.
    """
    batch, actions = tree.num_trees, tree.num_actions
    given = np.asarray(action)
    if given.shape not in ((), (batch,)) or given.dtype.kind not in "iu":
        raise ValueError(f"action = {given}; allowed: an integer, or one for each of the {batch} trees")
    if not 0.0 < root_prior_mass <= 1.0:
        raise ValueError(f"root_prior_mass = {root_prior_mass}; allowed: above 0, at most 1")
    rows_B = np.arange(batch)
    action_B = np.broadcast_to(given, (batch,)).astype(np.int64)
    for row in np.flatnonzero((action_B < 0) | (action_B >= actions)):
        raise ValueError(f"tree {row}: action = {action_B[row]}; allowed: 0 to {actions - 1}")
    root_B = tree.children_index_BSA[rows_B, Tree.ROOT, action_B]
    for row in np.flatnonzero(root_B == Tree.UNVISITED):
        raise ValueError(f"tree {row}: action = {action_B[row]} was not visited; allowed: an action that was")
    for row in np.flatnonzero(tree.terminal_BS[rows_B, root_B]):
        raise ValueError(f"tree {row}: action = {action_B[row]} ends the text; allowed: an action that goes on")

    # The root's mark goes down one level at a time; an empty slot has no parent to get it from.
    has_parent_BS = tree.parents_BS != Tree.NO_PARENT
    parents_BS = np.maximum(tree.parents_BS, 0)
    kept_BS = np.arange(tree.num_slots) == root_B[:, np.newaxis]
    while True:
        more_BS = kept_BS | (has_parent_BS & np.take_along_axis(kept_BS, parents_BS, axis=1))
        if (more_BS == kept_BS).all():
            break
        kept_BS = more_BS
    new_from_old_BS = np.where(kept_BS, kept_BS.cumsum(axis=1) - 1, _DROPPED)
    count_B = kept_BS.sum(axis=1)
    filled_BK = np.arange(int(count_B.max())) < count_B[:, np.newaxis]
    # Kept slots first, in their order.
    old_BK = np.argsort(~kept_BS, axis=1, kind="stable")[:, : filled_BK.shape[1]]

    first_B = rows_B * tree.num_slots
    flat_BK = old_BK + first_B[:, np.newaxis]

    def moved(name: str, empty: int) -> np.ndarray:
        array = getattr(tree, name)
        rows = array.reshape(-1, *array.shape[2:]).take(flat_BK, axis=0)
        rows[~filled_BK] = empty
        return rows

    # One more entry, which -1 finds: no node stays no node.
    names_BS = np.full(batch * tree.num_slots + 1, Tree.UNVISITED, np.int32)
    names_BS[:-1] = new_from_old_BS.reshape(-1)

    def renamed(slots: np.ndarray) -> np.ndarray:
        """Old slots, by tree, as new ones."""
        first = first_B.astype(np.int32).reshape(-1, *[1] * (slots.ndim - 1))
        return names_BS.take(np.where(slots < 0, slots, slots + first))

    empty_values = {
        "parents_BS": Tree.NO_PARENT,
        "action_from_parent_BS": Tree.NO_PARENT,
        "children_index_BSA": Tree.UNVISITED,
        "children_tokens_BSA": Tree.NO_TOKEN,
    }
    names = [field.name for field in dataclasses.fields(Tree) if "_BS" in field.name]
    arrays = {name: moved(name, empty_values.get(name, 0)) for name in names}
    arrays["children_index_BSA"] = renamed(arrays["children_index_BSA"])
    arrays["parents_BS"] = renamed(arrays["parents_BS"])
    arrays["parents_BS"][:, Tree.ROOT] = Tree.NO_PARENT
    arrays["action_from_parent_BS"][:, Tree.ROOT] = Tree.NO_PARENT
    arrays["depth_BS"][filled_BK] -= 1
    logits_BA = arrays["children_prior_logits_BSA"][:, Tree.ROOT]
    root_actions_BA = root_actions_by_prior_mass(logits_BA, root_prior_mass)
    arrays["children_prior_probs_BSA"][:, Tree.ROOT] = softmax(
        np.where(root_actions_BA, logits_BA, np.float32(-np.inf))
    )
    new = Tree(
        **arrays,
        root_actions_BA=root_actions_BA,
        root_gumbel_BA=np.zeros((batch, actions), np.float32),
        num_simulations_B=arrays["node_visits_BS"][:, Tree.ROOT] - np.int32(1),
        consensus_weights_L=tree.consensus_weights_L,
        uncertainty_penalty=tree.uncertainty_penalty,
        max_depth=tree.max_depth,
    )
    return Rerooted(new, new_from_old_BS.astype(np.int64))


def check_reuse(reuse: Rerooted, evaluator: TreeShape, weights_L: FloatArray, penalty: float) -> TokenArray:
    """Refuses trees that do not go with the evaluator or were judged otherwise.

    Args:
        reuse: The trees to go on with.
        evaluator: For its sizes.
        weights_L: The weights k of the consensus of the new search.
        penalty: Its penalty λ.

    Returns:
        The first free slot of every tree. Shape `[B]`.

    Raises:
        ValueError: Sizes differ, or the consensus does.
    """
    tree = reuse.tree
    sizes = tree.num_trees, tree.num_actions, tree.num_layers
    wanted = evaluator.num_trees, evaluator.num_actions, evaluator.num_layers
    if sizes != wanted:
        raise ValueError(f"reuse: trees, actions, layers = {sizes}; allowed: {wanted}, those of the evaluator")
    if reuse.new_from_old_BS.shape[:1] != (tree.num_trees,) or reuse.new_from_old_BS.ndim != 2:
        raise ValueError(f"reuse: new_from_old_BS has shape {reuse.new_from_old_BS.shape}; allowed: a row per tree")
    if not np.array_equal(tree.consensus_weights_L, weights_L) or tree.uncertainty_penalty != np.float32(penalty):
        raise ValueError(
            f"reuse: consensus weights {tree.consensus_weights_L.tolist()} and penalty {tree.uncertainty_penalty}; "
            f"allowed: those of this search, {weights_L.tolist()} and {np.float32(penalty)}"
        )
    free_BK = tree.node_visits_BS == 0
    filled_B: TokenArray = (tree.num_slots - np.argmin(free_BK[:, ::-1], axis=1)).astype(np.int64)
    return filled_B
