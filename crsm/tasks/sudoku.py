"""Sudoku: fill a grid so that no row, column or box holds a value twice.

    sudoku r1c2=3 r2c4=1 … / = the answer r1c1=1 r1c3=4 … yes
    givens, in reading order           the empty cells, in reading order

A cell with its value is one word, so that a step of a search is the filling of a cell. Values that no given forbids are
easily named, but the cell is filled in its turn, known or not: which of them leads on shows only cells later.

Grids of size 4 come from the table of all 288; larger ones are filled at random. A problem has one solution. Problems
that differ in the names of the values only are one problem.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from crsm.config import SudokuConfig
from crsm.tasks.base import (
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Attempt,
    Problem,
    Split,
    draw_in_split,
    keyed_bits,
)
from crsm.tasks.closed import PREAMBLE, ClosedTask

_DEFAULT_GIVENS = {4: 4, 6: 14, 9: 36}
_BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Height and width of a box."""


class Sudoku(ClosedTask):
    """The task for some settings."""

    def __init__(self, config: SudokuConfig) -> None:
        super().__init__(config.label, config.weight, config.preamble)
        self._size = config.size
        self._givens = config.givens or _DEFAULT_GIVENS[config.size]
        self._peers = _peers(config.size)
        self._words = [
            [f"r{cell // self._size + 1}c{cell % self._size + 1}={value + 1}" for value in range(self._size)]
            for cell in range(self._size**2)
        ]

    def words(self) -> list[str]:
        """Structure, verdicts, every cell with every value."""
        cells = [word for words in self._words for word in words]
        return ["/", "=", VERDICT_RIGHT, VERDICT_WRONG, *PREAMBLE, "sudoku", *cells]

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """A random grid of which random cells are given, as many as settings and uniqueness ask for."""

        def draw(trial: int) -> tuple[list[int], list[int], str | None]:
            bits = keyed_bits(2 * self._size**2 + 1, self.name, seed, split, index, trial)
            order = bits[: self._size**2].argsort()
            grid, givens = self._puzzle(bits[self._size**2 :], order)
            return grid, givens, _key(grid, givens, self._size) if len(givens) < len(grid) else None

        grid, givens, key = draw_in_split(draw, lambda drawn: drawn[2], split, self.name)
        assert key is not None
        given = set(givens)
        empty = [cell for cell in range(len(grid)) if cell not in given]
        shown = [self._words[cell][grid[cell]] for cell in givens]
        prompt = f"sudoku {' '.join(shown)} / ="
        data = {"grid": grid, "givens": givens, "empty": empty, "decisions": list(range(len(empty)))}
        return Problem(self.name, split, prompt, self._answer(self._filled(empty, grid)), key, data)

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Half of them right; the others take a wrong value where the rules allow one, and go on until none fits."""
        grid, empty = problem.data["grid"], problem.data["empty"]
        forks = [place for place in range(len(empty)) if len(self._allowed(problem, place)) > 1]
        attempts = []
        for kind, share in rng.random((count, 2)).tolist():
            if kind < 0.5 or not forks:
                attempts.append(Attempt(problem.solution, True))
                continue
            place = forks[int(share * len(forks))]
            values = list(grid)
            filled = self._go_wrong(values, empty, place, rng)
            attempts.append(Attempt(self._answer(self._filled(empty[:filled], values)), False))
        return attempts

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether every empty cell holds its value: there is one solution, so comparing is verifying."""
        return self._words_of(answer) == self._filled(problem.data["empty"], problem.data["grid"])

    def _filled(self, cells: list[int], values: list[int]) -> list[str]:
        return [self._words[cell][values[cell]] for cell in cells]

    def _allowed(self, problem: Problem, place: int) -> list[int]:
        """Values that the rules allow in the empty cell at ``place`` when those before it are filled rightly."""
        grid, empty = problem.data["grid"], problem.data["empty"]
        unknown = set(empty[place:])
        taken = {grid[peer] for peer in self._peers[empty[place]] if peer not in unknown}
        return [value for value in range(self._size) if value not in taken]

    def _go_wrong(self, values: list[int], empty: list[int], place: int, rng: np.random.Generator) -> int:
        """Fills ``values`` from ``place`` on, wrongly there, by the rules; how many empty cells that filled."""
        right = values[empty[place]]
        for cell in empty[place:]:
            values[cell] = -1
        for index in range(place, len(empty)):
            cell = empty[index]
            taken = {values[peer] for peer in self._peers[cell]}
            choices = [v for v in range(self._size) if v not in taken and (index > place or v != right)]
            if not choices:
                return index
            values[cell] = choices[int(rng.integers(len(choices)))] if len(choices) > 1 else choices[0]
        return len(empty)  # A second solution: there is none.

    def _puzzle(self, bits: np.ndarray, order: np.ndarray) -> tuple[list[int], list[int]]:
        """A grid, and its givens in reading order."""
        if self._size == 4:
            table = _grids_of_4()
            number = int(bits[0] % np.uint64(len(table)))
            kept = _givens_of_4(number, order, self._givens)
            return table[number].tolist(), kept
        grid = _random_grid(self._size, bits)
        return grid, _givens_by_search(grid, order.tolist(), self._givens, self._size)


def solutions(values: list[int], size: int, limit: int = 2) -> list[list[int]]:
    """The first solutions of a grid (-1: empty), at most ``limit`` of them."""
    peers = _peers(size)
    free = [(1 << size) - 1] * len(values)
    for cell, value in enumerate(values):
        if value >= 0:
            for peer in peers[cell]:
                free[peer] &= ~(1 << value)
    for cell, value in enumerate(values):
        if value >= 0 and not free[cell] >> value & 1:
            return []
    found: list[list[int]] = []
    _search(list(values), free, [cell for cell, value in enumerate(values) if value < 0], peers, limit, found, None)
    return found


def _search(
    values: list[int],
    free: list[int],
    empty: list[int],
    peers: tuple[tuple[int, ...], ...],
    limit: int,
    found: list[list[int]],
    rank: list[int] | None,
) -> None:
    """Depth first, the cell with fewest values first; ``rank`` orders values, None: ascending."""
    if not empty:
        found.append(list(values))
        return
    cell = min(empty, key=lambda c: free[c].bit_count())
    rest = [c for c in empty if c != cell]
    options = [value for value in range(free[cell].bit_length()) if free[cell] >> value & 1]
    if rank is not None:
        options.sort(key=lambda value: rank[(cell + value * 7) % len(rank)])
    for value in options:
        touched = [peer for peer in peers[cell] if free[peer] >> value & 1]
        for peer in touched:
            free[peer] &= ~(1 << value)
        values[cell] = value
        if all(free[peer] for peer in touched if values[peer] < 0):
            _search(values, free, rest, peers, limit, found, rank)
        values[cell] = -1
        for peer in touched:
            free[peer] |= 1 << value
        if len(found) >= limit:
            return


@lru_cache(maxsize=4)
def _peers(size: int) -> tuple[tuple[int, ...], ...]:
    """Cells that share a row, a column or a box with each cell."""
    height, width = _BOX[size]
    place = [(c // size, c % size, c // size // height, c % size // width) for c in range(size * size)]
    return tuple(
        tuple(
            other
            for other in range(size * size)
            if other != cell
            and (
                place[other][0] == place[cell][0]
                or place[other][1] == place[cell][1]
                or place[other][2:] == place[cell][2:]
            )
        )
        for cell in range(size * size)
    )


@lru_cache(maxsize=1)
def _grids_of_4() -> np.ndarray:
    """Every grid of size 4. (288, 16)"""
    return np.array(solutions([-1] * 16, 4, limit=1000), dtype=np.int64)


@lru_cache(maxsize=1)
def _masks_of_4() -> np.ndarray:
    """The cells in which two grids of size 4 differ, as bits; all for a grid and itself. (288, 288)"""
    table = _grids_of_4()
    bits = (table[:, None] != table[None]) @ (1 << np.arange(16))
    np.fill_diagonal(bits, (1 << 16) - 1)
    return np.asarray(bits)


def _givens_of_4(number: int, order: np.ndarray, count: int) -> list[int]:
    """The first cells in ``order`` that are enough, at least ``count``; those that tell nothing are passed over."""
    differ = _masks_of_4()[number]
    cells: list[int] = order.tolist()
    kept = cells[:count]
    others = differ[(differ & sum(1 << cell for cell in kept)) == 0]
    for cell in cells[count:]:
        if not len(others):
            break
        if (others >> cell & 1).any():
            kept.append(cell)
            others = others[(others >> cell & 1) == 0]
    return sorted(kept)


def _random_grid(size: int, bits: np.ndarray) -> list[int]:
    rank = bits.argsort().tolist()
    found: list[list[int]] = []
    _search([-1] * size**2, [(1 << size) - 1] * size**2, list(range(size**2)), _peers(size), 1, found, rank)
    return found[0]


def _givens_by_search(grid: list[int], order: list[int], count: int, size: int) -> list[int]:
    """The first ``count`` cells in ``order``, and one more for as long as there is another solution."""
    given = set(order[:count])
    while True:
        found = solutions([value if cell in given else -1 for cell, value in enumerate(grid)], size)
        if len(found) == 1:
            return sorted(given)
        other = next(solution for solution in found if solution != grid)
        given.add(next(cell for cell in order if other[cell] != grid[cell]))


def _key(grid: list[int], givens: list[int], size: int) -> str:
    names: dict[int, int] = {}
    shown = [-1] * len(grid)
    for cell in givens:
        shown[cell] = names.setdefault(grid[cell], len(names))
    return f"sudoku {size} {''.join('.' if value < 0 else str(value + 1) for value in shown)}"
