"""Monte Carlo tree search over a batch of trees: simulate, expand, backward.

A pure function from an evaluator and settings to a finished tree. Each simulation goes down every tree to one leaf,
evaluates all leaves in one call of the evaluator, and adds their values to the nodes on the way back. Trees never look
at one another: a tree in a batch is, bit by bit, the tree that it would be alone.

Suffixes: `B` trees, `S` node slots, `A` children per node, `L` layers, `D` depth, `R` some of the trees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from crsm.search.consensus import consensus
from crsm.search.evaluator import Evaluator, TreeShape, check_evaluation
from crsm.search.gumbel import sample_gumbel
from crsm.search.numerics import BoolArray, FloatArray, TokenArray, softmax
from crsm.search.policies import Policy, make_policy
from crsm.search.root_actions import root_actions_by_prior_mass
from crsm.search.tree import Tree, new_tree

if TYPE_CHECKING:
    from crsm.config import SearchConfig

_OFF_PATH = -1


def search(
    evaluator: Evaluator,
    settings: SearchConfig,
    *,
    consensus_weights_L: ArrayLike,
    uncertainty_penalty: float,
    terminal_tokens: Sequence[int],
    max_depth: int | None = None,
    seed: int | ArrayLike = 0,
    simulations: int | ArrayLike | None = None,
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    should_stop: Callable[[], bool] | None = None,
) -> Tree:
    """Searches a batch of trees.

    A simulation that ends at a terminal or depth-capped node already in the tree backs up that node's own evaluation
    once more and asks the evaluator nothing. A search can be stopped between any two simulations, even before the
    first, and what it returns is then the tree of a smaller budget (under Sequential Halving: of a race broken off).

    Args:
        evaluator: The network.
        settings: Settings of the search; ``num_actions`` is the evaluator's business and not read here.
        consensus_weights_L: The weights k of the consensus. Shape `[L]`.
        uncertainty_penalty: The penalty λ of the consensus.
        terminal_tokens: Token ids after which a text has ended.
        max_depth: A depth cap (the world model's trust horizon) beside that of the settings; the lower one holds.
        seed: Seed of the root noise: one for every tree (equal trees then get equal noise), or one each. Shape `[B]`.
        simulations: Budget: one for every tree, or one each; None: that of the settings. Shape `[B]`.
        deadline: Time on ``clock`` from which no further simulation is begun.
        clock: The clock of the deadline, read before each simulation.
        should_stop: Asked before each simulation; True ends the search.

    Returns:
        The tree. Slots of simulations that were not run are empty.

    Raises:
        ValueError: An argument is out of range, or the evaluator returned something that is not an evaluation (the
            message names the tree and the layer). What the evaluator itself raises passes through unchanged.
    """
    given = check_arguments(
        evaluator, settings, consensus_weights_L, uncertainty_penalty, terminal_tokens, max_depth, seed, simulations
    )
    if settings.leaves > 1:
        raise ValueError(f"leaves = {settings.leaves}; allowed without the native core: 1")
    root = evaluator.root()
    check_evaluation(root, evaluator, np.arange(evaluator.num_trees))
    budget_B = given.budget_B
    num_simulations = int(budget_B.max())
    tree = new_tree(
        root,
        num_simulations=num_simulations,
        max_depth=given.max_depth,
        consensus_weights_L=given.weights_L,
        uncertainty_penalty=uncertainty_penalty,
        root_actions_BA=root_actions_by_prior_mass(root.prior_logits_BA, settings.root_prior_mass),
        root_gumbel_BA=given.root_gumbel_BA,
    )
    policy = make_policy(tree, settings, budget_B.astype(np.int32))
    for simulation in range(num_simulations):
        if (should_stop is not None and should_stop()) or (deadline is not None and clock() >= deadline):
            break
        trees = np.flatnonzero(budget_B > simulation)
        paths = simulate(tree, policy, trees, simulation + 1)
        expand(tree, evaluator, paths, simulation + 1, given.terminal_tokens)
        backward(tree, paths)
        tree.num_simulations_B[trees] += 1
    return tree


class Arguments(NamedTuple):
    """The arguments of a search, checked, as arrays."""

    weights_L: FloatArray
    budget_B: TokenArray
    root_gumbel_BA: FloatArray
    max_depth: int
    terminal_tokens: TokenArray


def check_arguments(
    evaluator: TreeShape,
    settings: SearchConfig,
    consensus_weights_L: ArrayLike,
    uncertainty_penalty: float,
    terminal_tokens: Sequence[int],
    max_depth: int | None,
    seed: int | ArrayLike,
    simulations: int | ArrayLike | None,
) -> Arguments:
    """What every engine makes of the arguments of ``search``, root noise included.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """
    batch = evaluator.num_trees
    if batch < 1:
        raise ValueError(f"num_trees = {batch}; allowed: at least 1")
    weights_L = _check_weights(consensus_weights_L, evaluator.num_layers)
    budget_B = _per_tree("simulations", settings.simulations if simulations is None else simulations, batch)
    seed_B = _per_tree("seed", seed, batch)
    depth_cap = settings.max_depth if max_depth is None else min(settings.max_depth, max_depth)
    if depth_cap < 1:
        raise ValueError(f"max_depth = {depth_cap}; allowed: at least 1")
    if settings.leaves > 1 and not settings.virtual_loss:
        raise ValueError(f"virtual_loss = 0; allowed with leaves = {settings.leaves}: at least 1")
    if not 0.0 <= uncertainty_penalty < np.inf:
        raise ValueError(f"uncertainty_penalty = {uncertainty_penalty}; allowed: finite, at least 0")
    noise = settings.gumbel_scale if settings.policy == "gumbel" else 0.0
    return Arguments(
        weights_L=weights_L,
        budget_B=budget_B,
        root_gumbel_BA=sample_gumbel(seed_B, evaluator.num_actions, noise),
        max_depth=depth_cap,
        terminal_tokens=np.array(terminal_tokens, np.int64),
    )


class Paths(NamedTuple):
    """The way of one simulation through every tree."""

    nodes_DB: TokenArray
    """Node slots from the root (row 0) to the leaf; -1 below the leaf, and in trees that rest."""
    actions_DB: TokenArray
    """Action taken at each of them but the leaf; row d leads from depth d to d + 1."""
    depth_B: TokenArray
    """Depth of the leaf."""
    expands_B: BoolArray
    """The leaf is new: it has a slot and no evaluation yet."""


def simulate(tree: Tree, policy: Policy, trees: TokenArray, slot: int) -> Paths:
    """Goes down from the roots until an unvisited action, a terminal node or the depth cap.

    Args:
        tree: The trees.
        policy: Rules of selection.
        trees: Trees that take part. Shape `[R]`.
        slot: Slot of the leaves that are new.

    Returns:
        The paths; no array of the tree is changed.
    """
    batch = tree.num_trees
    # The tree of i simulations is at most i deep.
    rows = min(tree.max_depth, slot)
    nodes_DB = np.full((rows + 1, batch), _OFF_PATH, np.int64)
    actions_DB = np.zeros((rows, batch), np.int64)
    depth_B = np.zeros(batch, np.int64)
    expands_B = np.zeros(batch, np.bool_)
    children_index = tree.children_index_BSA.reshape(-1)
    terminal = tree.terminal_BS.reshape(-1)
    nodes_DB[0, trees] = Tree.ROOT
    nodes = trees * tree.num_slots
    for depth in range(rows):
        scores = policy.interior(tree, nodes) if depth else policy.root(tree, trees)
        actions = scores.argmax(axis=1)
        children = children_index.take(nodes * tree.num_actions + actions)
        unvisited = children == Tree.UNVISITED
        actions_DB[depth, trees] = actions
        nodes_DB[depth + 1, trees] = np.where(unvisited, slot, children)
        depth_B[trees] = depth + 1
        expands_B[trees[unvisited]] = True
        nodes = trees * tree.num_slots + children
        # An unvisited child's flat index points at a neighbour, whose flag is then not looked at.
        goes_on = ~(unvisited | terminal.take(nodes, mode="clip"))
        trees, nodes = trees[goes_on], nodes[goes_on]
        if not trees.size:
            break
    return Paths(nodes_DB, actions_DB, depth_B, expands_B)


def expand(tree: Tree, evaluator: Evaluator, paths: Paths, slot: int, terminal_tokens: TokenArray) -> None:
    """Evaluates the new leaves in one call and enters them into the tree.

    Args:
        tree: The trees; slot ``slot`` and the edges that lead to it are written.
        evaluator: The network; not called if no leaf is new.
        paths: The paths of this simulation.
        slot: Slot of the new leaves.
        terminal_tokens: Token ids after which a text has ended. Shape `[E]`.
    """
    trees = np.flatnonzero(paths.expands_B)
    if not trees.size:
        return
    batch = tree.num_trees
    depth = paths.depth_B[trees]
    parent_B = np.full(batch, Tree.ROOT, np.int64)
    parent_B[trees] = paths.nodes_DB[depth - 1, trees]
    edge_B = np.zeros(batch, np.int64)
    edge_B[trees] = paths.actions_DB[depth - 1, trees]
    action_B = tree.children_tokens_BSA[np.arange(batch), parent_B, edge_B]
    evaluation = evaluator.expand(parent_B, action_B, np.full(batch, slot, np.int64), paths.expands_B.copy())
    check_evaluation(evaluation, evaluator, trees)

    parents, edges, tokens = parent_B[trees], edge_B[trees], action_B[trees]
    values = evaluation.values_BL[trees]
    logits = evaluation.prior_logits_BA[trees]
    tree.raw_values_BSL[trees, slot] = values
    tree.raw_consensus_BS[trees, slot] = consensus(values, tree.consensus_weights_L, tree.uncertainty_penalty)
    tree.parents_BS[trees, slot] = parents
    tree.action_from_parent_BS[trees, slot] = edges
    tree.depth_BS[trees, slot] = depth
    tree.terminal_BS[trees, slot] = (tokens[:, np.newaxis] == terminal_tokens).any(axis=1)
    tree.children_tokens_BSA[trees, slot] = evaluation.actions_BA[trees]
    tree.children_prior_logits_BSA[trees, slot] = logits
    tree.children_prior_probs_BSA[trees, slot] = softmax(logits)
    tree.children_index_BSA[trees, parents, edges] = slot


def backward(tree: Tree, paths: Paths) -> None:
    """Adds the leaves' evaluations to every node and edge of their paths.

    The mean is updated as ``mean + (leaf − mean) / (n + 1)``, n the visits before: it never leaves the range of what
    was backed up, not even by rounding, and a node that backs up its own evaluation again keeps it bit by bit.

    A path has one node per depth, so that all nodes of all paths are updated at once.

    Args:
        tree: The trees; visits and values on the paths are written.
        paths: The paths of this simulation.
    """
    depths, trees = np.nonzero(paths.nodes_DB != _OFF_PATH)
    slots = paths.nodes_DB[depths, trees]
    leaves = paths.nodes_DB[paths.depth_B[trees], trees]
    num_slots, num_layers = tree.num_slots, tree.num_layers
    nodes = trees * num_slots + slots

    visits_flat = tree.node_visits_BS.reshape(-1)
    means_flat = tree.node_values_BSL.reshape(-1, num_layers)
    visits = visits_flat.take(nodes) + np.int32(1)
    means = means_flat.take(nodes, axis=0)
    leaf_values = tree.raw_values_BSL.reshape(-1, num_layers).take(trees * num_slots + leaves, axis=0)
    means = means + (leaf_values - means) / visits.astype(np.float32)[:, np.newaxis]
    values = consensus(means, tree.consensus_weights_L, tree.uncertainty_penalty)
    visits_flat[nodes] = visits
    means_flat[nodes] = means
    tree.node_consensus_BS.reshape(-1)[nodes] = values

    # np.nonzero goes row by row: the roots, which no edge leads to, come first.
    below = int(np.count_nonzero(depths == 0))
    depths, trees, values = depths[below:], trees[below:], values[below:]
    edges = (trees * num_slots + paths.nodes_DB[depths - 1, trees]) * tree.num_actions + paths.actions_DB[
        depths - 1, trees
    ]
    tree.children_visits_BSA.reshape(-1)[edges] += 1
    tree.children_values_BSA.reshape(-1)[edges] = values


def _check_weights(weights: ArrayLike, num_layers: int) -> FloatArray:
    weights_L = np.array(weights, np.float32)
    if weights_L.shape != (num_layers,) or not np.isfinite(weights_L).all():
        raise ValueError(
            f"consensus_weights_L = {weights_L.tolist()}; allowed: {num_layers} finite numbers, one a layer"
        )
    return weights_L


def _per_tree(name: str, value: int | ArrayLike, batch: int) -> TokenArray:
    if type(value) is int and value >= 0:
        return np.full(batch, value, np.int64)
    array = np.asarray(value)
    if array.shape not in ((), (batch,)) or array.dtype.kind not in "iu" or (array.astype(np.int64) < 0).any():
        raise ValueError(f"{name} = {array}; allowed: an integer of at least 0, or one for each of the {batch} trees")
    return np.broadcast_to(array, (batch,)).astype(np.int64)
