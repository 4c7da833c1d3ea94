"""The native search: the definition of ``crsm.search.search`` in C++, array for array equal to it.

It needs no GIL while it runs, but for the calls of an evaluator, a clock or a ``should_stop`` that are Python.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from crsm import native
from crsm.search.cancel import CancelToken
from crsm.search.evaluator import Evaluation, Evaluator, TreeShape
from crsm.search.numerics import BoolArray, FloatArray, TokenArray
from crsm.search.puct import exploration_table
from crsm.search.reroot import Rerooted, check_reuse
from crsm.search.search import check_arguments
from crsm.search.tree import Tree

if TYPE_CHECKING:
    from crsm.config import SearchConfig

_POLL_MICROSECONDS = 200.0
"""How often a Python ``should_stop`` is asked when nothing else of the search is Python."""


_FREE = {
    "parents_BS": Tree.NO_PARENT,
    "action_from_parent_BS": Tree.NO_PARENT,
    "children_index_BSA": Tree.UNVISITED,
    "children_tokens_BSA": Tree.NO_TOKEN,
}
"""What a free slot holds where it is not 0."""


class NativeEvaluator(TreeShape, Protocol):
    """An evaluator in C++: an instance of ``_crsm_native.Evaluator``."""

    def bytes_per_tree(self, slots: int) -> int:
        """Bytes that the latents of one tree take with that many node slots."""
        ...

    def evaluate_roots(self, slots: int) -> tuple[TokenArray, FloatArray, FloatArray]:
        """Makes room for ``slots`` nodes per tree and evaluates the roots: the three arrays of an ``Evaluation``."""
        ...

    def evaluate_leaves(
        self, tree_R: TokenArray, parent_R: TokenArray, action_R: TokenArray, node_R: TokenArray
    ) -> tuple[TokenArray, FloatArray, FloatArray]:
        """Evaluates leaves: the three arrays of an ``Evaluation``, a row per leaf."""
        ...


class PythonView:
    """A native evaluator as one of the Python protocol, for the Python search."""

    def __init__(self, evaluator: NativeEvaluator, slots: int) -> None:
        self._evaluator, self._slots = evaluator, slots

    @property
    def num_trees(self) -> int:
        return self._evaluator.num_trees

    @property
    def num_actions(self) -> int:
        return self._evaluator.num_actions

    @property
    def num_layers(self) -> int:
        return self._evaluator.num_layers

    def root(self) -> Evaluation:
        return Evaluation(*self._evaluator.evaluate_roots(self._slots))

    def expand(self, parent_B: TokenArray, action_B: TokenArray, node_B: TokenArray, active_B: BoolArray) -> Evaluation:
        batch, actions, layers = self.num_trees, self.num_actions, self.num_layers
        wholes: tuple[np.ndarray, ...] = (
            np.zeros((batch, actions), np.int64),
            np.zeros((batch, actions), np.float32),
            np.zeros((batch, layers), np.float32),
        )
        trees = np.flatnonzero(active_B)
        rows = self._evaluator.evaluate_leaves(trees, parent_B[trees], action_B[trees], node_B[trees])
        for whole, part in zip(wholes, rows, strict=True):
            whole[trees] = part
        return Evaluation(*wholes)


def is_native(evaluator: object) -> bool:
    """Whether an evaluator is one of the native core."""
    return native.core is not None and isinstance(evaluator, native.core.Evaluator)


def bytes_per_tree(slots: int, actions: int, layers: int) -> int:
    """Bytes that the arrays of one tree take.

    Args:
        slots: S, one more than the simulations.
        actions: A.
        layers: L.

    Raises:
        ValueError: A size is below 1.
        RuntimeError: There is no native core.
    """
    return int(native.require().bytes_per_tree(slots, actions, layers))


def native_search(
    evaluator: Evaluator | NativeEvaluator,
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
    microseconds: float | None = None,
    cancel: CancelToken | None = None,
    reuse: Rerooted | None = None,
    threads: int = 0,
) -> Tree:
    """``crsm.search.search`` in C++; see there for what is not said here.

    A deadline on the default clock is kept without Python. ``should_stop`` is asked before each simulation if the
    evaluator or the clock is Python, else before the first one and then every 200 µs.

    Args:
        evaluator: The network, native or in Python.
        microseconds: As in ``crsm.search.search``; so are ``cancel`` and ``reuse``.
        threads: Threads at most; 0: those of ``crsm.native``.

    Raises:
        RuntimeError: There is no native core.
        ValueError: As in ``crsm.search.search``.
    """
    core = native.require()
    given = check_arguments(
        evaluator, settings, consensus_weights_L, uncertainty_penalty, terminal_tokens, max_depth, seed, simulations
    )
    first_B: TokenArray | None = None
    root_tokens: list[int] = []
    slots = most_visits = int(given.budget_B.max()) + 1
    if reuse is not None:
        first_B = check_reuse(reuse, evaluator, given.weights_L, uncertainty_penalty)
        root_tokens = reuse.tree.children_tokens_BSA[:, Tree.ROOT, 0].tolist()
        slots = max(reuse.tree.num_slots, int((first_B + given.budget_B).max()))
        most_visits = int((reuse.tree.node_visits_BS[:, Tree.ROOT] + given.budget_B).max())
    block, arrays = _allocate(core, evaluator.num_trees, slots, evaluator.num_actions, evaluator.num_layers)
    if reuse is not None:
        for name, array in arrays.items():
            old = getattr(reuse.tree, name)
            if "_BS" not in name:
                array[...] = old
                continue
            array[:, : old.shape[1]] = old
            if name in _FREE:
                array[:, old.shape[1] :] = _FREE[name]
    arrays["root_gumbel_BA"][...] = given.root_gumbel_BA

    python_clock = deadline is not None and clock is not time.monotonic
    if deadline is not None and not python_clock:
        left = (deadline - clock()) * 1e6
        microseconds = left if microseconds is None else min(left, microseconds)
    evaluator_is_native = is_native(evaluator)
    core.search(
        evaluator if evaluator_is_native else core.CallbackEvaluator(evaluator, root_tokens),
        block=block,
        slots=slots,
        gumbel=settings.policy == "gumbel",
        minmax=settings.q_transform == "minmax",
        exploration=_exploration(
            most_visits + settings.leaves * settings.virtual_loss, settings.puct_c_init, settings.puct_c_base
        ),
        value_scale=settings.gumbel_value_scale,
        maxvisit_init=settings.gumbel_maxvisit_init,
        weights_L=given.weights_L,
        penalty=uncertainty_penalty,
        root_prior_mass=settings.root_prior_mass,
        max_considered=settings.max_considered_actions,
        max_depth=given.max_depth,
        budget_B=given.budget_B,
        terminal_tokens=given.terminal_tokens,
        leaves=settings.leaves,
        virtual_loss=settings.virtual_loss if settings.leaves > 1 else 0,
        first_slot_B=first_B,
        new_from_old_BS=None if reuse is None else np.ascontiguousarray(reuse.new_from_old_BS, np.int64),
        cancel=None if cancel is None else cancel.flag,
        microseconds=microseconds,
        ask=_question(deadline if python_clock else None, clock, should_stop),
        ask_interval=_POLL_MICROSECONDS if evaluator_is_native and not python_clock else 0.0,
        interruptible=threading.current_thread() is threading.main_thread(),
        threads=threads,
    )
    return Tree(
        **arrays,
        consensus_weights_L=given.weights_L,
        uncertainty_penalty=np.float32(uncertainty_penalty),
        max_depth=given.max_depth,
    )


def _question(
    deadline: float | None, clock: Callable[[], float], should_stop: Callable[[], bool] | None
) -> Callable[[], bool] | None:
    """What is asked of Python before a simulation, in the order of the Python search; None: nothing."""
    if deadline is None:
        return None if should_stop is None else lambda: bool(should_stop())
    return lambda: bool((should_stop is not None and should_stop()) or clock() >= deadline)


def _exploration(max_visits: int, c_init: float, c_base: float) -> FloatArray:
    # Rounded up, so that few tables are made.
    return _exploration_table(-(-max_visits // 256) * 256, c_init, c_base)


@functools.lru_cache(maxsize=64)
def _exploration_table(max_visits: int, c_init: float, c_base: float) -> FloatArray:
    return exploration_table(max_visits, c_init=c_init, c_base=c_base)


def _allocate(
    core: ModuleType, trees: int, slots: int, actions: int, layers: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One block of memory, all zero, and the arrays of a tree in it."""
    size, fields = _layout(core, trees, slots, actions, layers)
    block = np.zeros(size, np.uint8)
    return block, {name: np.ndarray(shape, dtype, block, offset) for name, dtype, shape, offset in fields}


@functools.lru_cache(maxsize=256)
def _layout(core: ModuleType, trees: int, slots: int, actions: int, layers: int) -> tuple[int, list[Any]]:
    size, fields = core.tree_layout(trees, slots, actions, layers)
    return size, [(name, np.dtype(dtype), shape, offset) for name, dtype, shape, offset in fields]
