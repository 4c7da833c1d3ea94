"""The interface between the search and the network.

The tree holds statistics only. What the network remembers of a node (its latent) stays with the evaluator, in a store
indexed by tree and node slot, and never passes through the search: a PyTorch module, a native core and a table of a
test stand behind the same two calls.

`B` denotes the trees of a batch, `A` the children expanded per node, `L` the layers that give a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from crsm.search.numerics import BoolArray, FloatArray, TokenArray


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the network says of one node per tree."""

    actions_BA: TokenArray
    """Token ids of the children, the most likely first. `[B, A]` int64"""
    prior_logits_BA: FloatArray
    """Their log-probabilities under the policy over the full vocabulary. `[B, A]` float32"""
    values_BL: FloatArray
    """Value of the node according to each layer, in [0, 1]. `[B, L]` float32"""


class TreeShape(Protocol):
    """The sizes that an evaluator, in Python or native, declares."""

    @property
    def num_trees(self) -> int:
        """B."""
        ...

    @property
    def num_actions(self) -> int:
        """A."""
        ...

    @property
    def num_layers(self) -> int:
        """L."""
        ...


class Evaluator(TreeShape, Protocol):
    """A network that evaluates one leaf of every tree per call.

    Two more methods are used where they are there. ``expand_rows(tree_R, parent_R, action_R, node_R)`` evaluates
    several leaves of a tree in one call; the arrays of what it returns have a row per leaf. ``remap(new_from_old_BS,
    slots)`` makes the latents follow a tree that is used again, see ``crsm.search.reroot``.
    """

    def root(self) -> Evaluation:
        """Evaluates the root of every tree, and keeps its latent in node slot 0."""
        ...

    def expand(self, parent_B: TokenArray, action_B: TokenArray, node_B: TokenArray, active_B: BoolArray) -> Evaluation:
        """Takes one action from one evaluated node of every tree, and evaluates the node it leads to.

        Args:
            parent_B: Node slots to start from. Shape `[B]`, int64.
            action_B: Token ids, each from the parent's ``actions_BA``. Shape `[B]`, int64.
            node_B: Node slots in which to keep the new latents. Shape `[B]`, int64.
            active_B: Trees that want the evaluation. In the other rows nothing may be stored and what is returned is
                ignored; they hold a valid parent (the root) and one of its tokens, so that a batched evaluator may
                compute them along. Shape `[B]`, bool.

        Returns:
            The evaluation of the new nodes.
        """
        ...


def check_evaluation(evaluation: Evaluation, evaluator: Evaluator, rows: TokenArray) -> None:
    """Refuses an evaluation that would spoil the statistics.

    Args:
        evaluation: What the evaluator returned.
        evaluator: The evaluator, for its declared sizes.
        rows: Trees whose rows are used. Shape `[R]`.

    Raises:
        ValueError: An array has the wrong shape or type, a value is NaN or outside [0, 1] (the tree and the layer are
            named), or a prior logit is NaN or +inf, or all of a node's are -inf (the tree is named).
    """
    batch, actions, layers = evaluator.num_trees, evaluator.num_actions, evaluator.num_layers
    _check_array("actions_BA", evaluation.actions_BA, (batch, actions), np.int64)
    _check_array("prior_logits_BA", evaluation.prior_logits_BA, (batch, actions), np.float32)
    _check_array("values_BL", evaluation.values_BL, (batch, layers), np.float32)
    values = evaluation.values_BL[rows]
    # Written so that a NaN fails it too.
    valid = (values >= 0.0) & (values <= 1.0)
    if not valid.all():
        row, layer = np.argwhere(~valid)[0]
        raise ValueError(f"evaluator: tree {rows[row]}, layer {layer}: value = {values[row, layer]}; allowed: [0, 1]")
    best = evaluation.prior_logits_BA[rows].max(axis=1)
    finite = np.isfinite(best)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise ValueError(
            f"evaluator: tree {rows[row]}: prior logits = {evaluation.prior_logits_BA[rows[row]].tolist()}; "
            "allowed: log-probabilities, at least one finite"
        )


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"evaluator: {name} is {array.dtype}{list(array.shape)}; allowed: {np.dtype(dtype)}{list(shape)}"
        )
