"""The one entry to the search: the native core where it is installed, the Python definition elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from crsm import native
from crsm.search.cancel import CancelToken
from crsm.search.evaluator import Evaluator
from crsm.search.native import NativeEvaluator, PythonView, is_native, native_search
from crsm.search.reroot import Rerooted
from crsm.search.search import search as python_search
from crsm.search.tree import Tree

if TYPE_CHECKING:
    from crsm.config import SearchConfig

Engine = Literal["auto", "native", "python"]


def search(
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
    engine: Engine = "auto",
) -> Tree:
    """Searches a batch of trees.

    A simulation that ends at a terminal or depth-capped node already in the tree backs up that node's own evaluation
    once more and asks the evaluator nothing. A search can be stopped between any two simulations, even before the
    first, and what it returns is then the tree of a smaller budget (under Sequential Halving: of a race broken off).

    With ``settings.leaves`` above 1, up to that many leaves of a tree are selected before they are evaluated together;
    each puts ``settings.virtual_loss`` visits of value 0 on its way until its own value is there. The finished tree
    holds none of these visits. A tree sends out fewer leaves when one would end at a leaf already in flight.

    Args:
        evaluator: The network, in Python or native.
        settings: Settings of the search; ``num_actions`` is the evaluator's business and not read here.
        consensus_weights_L: The weights k of the consensus. Shape `[L]`.
        uncertainty_penalty: The penalty λ of the consensus.
        terminal_tokens: Token ids after which a text has ended.
        max_depth: A depth cap (the world model's trust horizon) beside that of the settings; the lower one holds.
        seed: Seed of the root noise: one for every tree (equal trees then get equal noise), or one each. Shape `[B]`.
        simulations: Budget: one for every tree, or one each; None: that of the settings. Shape `[B]`.
        deadline: Time on ``clock`` from which no further simulation is begun.
        clock: The clock of the deadline.
        should_stop: True ends the search. Asked before each simulation; with a native evaluator and the default clock
            at most every 200 µs.
        microseconds: Time from the start after which no further simulation is begun, whatever ``clock`` says.
        cancel: Ends the search from another thread, in the native core without a wait for Python.
        reuse: Trees to go on with, from ``reroot``, instead of new ones; the budget comes on top of what they have.
            The evaluator is told by ``remap`` to move its latents and is not asked for roots.
        engine: ``native`` and ``python`` force one; ``auto``: native where it is installed.

    Returns:
        The tree, the same from both engines. Slots of simulations that were not run are empty.

    Raises:
        ValueError: An argument is out of range, or the evaluator returned something that is not an evaluation (the
            message names the tree and the layer); or the Python engine is asked for several leaves or for ``reuse``.
            What the evaluator itself raises passes through unchanged.
        RuntimeError: ``engine`` is ``native`` and there is no native core.
    """
    if engine not in ("auto", "native", "python"):
        raise ValueError(f"engine = {engine!r}; allowed: auto, native, python")
    if microseconds is not None and not microseconds >= 0.0:
        raise ValueError(f"microseconds = {microseconds}; allowed: at least 0")
    if engine == "native" or (engine == "auto" and native.available()):
        return native_search(
            evaluator,
            settings,
            consensus_weights_L=consensus_weights_L,
            uncertainty_penalty=uncertainty_penalty,
            terminal_tokens=terminal_tokens,
            max_depth=max_depth,
            seed=seed,
            simulations=simulations,
            deadline=deadline,
            clock=clock,
            should_stop=should_stop,
            microseconds=microseconds,
            cancel=cancel,
            reuse=reuse,
        )
    if reuse is not None:
        raise ValueError("reuse: a tree was given; allowed without the native core: None")
    ends = None if microseconds is None else time.monotonic() + microseconds * 1e-6

    def stops() -> bool:
        return (
            (cancel is not None and cancel.cancelled)
            or (ends is not None and time.monotonic() >= ends)
            or (should_stop is not None and should_stop())
        )

    if is_native(evaluator):
        most = settings.simulations if simulations is None else int(np.max(simulations))
        evaluator = PythonView(evaluator, most + 1)  # type: ignore[arg-type]
    return python_search(
        evaluator,  # type: ignore[arg-type]
        settings,
        consensus_weights_L=consensus_weights_L,
        uncertainty_penalty=uncertainty_penalty,
        terminal_tokens=terminal_tokens,
        max_depth=max_depth,
        seed=seed,
        simulations=simulations,
        deadline=deadline,
        clock=clock,
        should_stop=stops,
    )
