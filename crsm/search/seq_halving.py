"""Sequential Halving: which visit count an action must have to be the next one visited.

"Almost Optimal Exploration in Multi-Armed Bandits", http://proceedings.mlr.press/v28/karnin13.pdf. All actions still in
the race get the same number of visits, then the better half goes on. Written as a sequence of visit counts it needs no
state: the next action is the best one among those with exactly the count that the sequence names.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from crsm.search.numerics import IntArray


@functools.lru_cache(maxsize=1024)
def considered_visits(num_considered: int, num_simulations: int) -> tuple[int, ...]:
    """The visit counts considered by one tree, simulation by simulation; mctx's sequence.

    With 4 actions and 16 simulations: two rounds over the four (0 0 0 0, 1 1 1 1), then four over the better two
    (2 2, 3 3, 4 4, 5 5).

    Args:
        num_considered: Actions that start the race, at least 1.
        num_simulations: The budget.

    Returns:
        One count per simulation.
    """
    if num_considered <= 1:
        return tuple(range(num_simulations))
    num_rounds = math.ceil(math.log2(num_considered))
    sequence: list[int] = []
    visits = 0
    racing = num_considered
    while len(sequence) < num_simulations:
        for _ in range(max(1, num_simulations // (num_rounds * racing))):
            sequence.extend([visits] * racing)
            visits += 1
        # A race of two goes on to the end of the budget.
        racing = max(2, racing // 2)
    return tuple(sequence[:num_simulations])


def considered_visits_table(num_considered_B: IntArray, num_simulations_B: IntArray) -> IntArray:
    """The sequences of a batch of trees.

    Args:
        num_considered_B: Actions that start each tree's race. Shape `[B]`.
        num_simulations_B: Each tree's budget. Shape `[B]`.

    Returns:
        Shape `[B, max(num_simulations_B)]`, padded with -1.
    """
    table = np.full((len(num_simulations_B), int(num_simulations_B.max())), -1, np.int32)
    for tree, (considered, simulations) in enumerate(zip(num_considered_B, num_simulations_B, strict=True)):
        table[tree, :simulations] = considered_visits(int(considered), int(simulations))
    return table
