"""Mazes without loops: from a start to a goal through cells, of which there is exactly one way.

    maze 0 E 1 SW 2 S … / 0 8 = the path 0 1 4 5 8 yes
    each cell and the sides on which it is open, in reading order

Cells are numbered in reading order. Where to go next is known by looking up the cell that was entered, but at a
junction every open side looks the same: only the dead end that follows tells. The maze is a spanning tree of the grid
drawn with random weights, which has many junctions and short dead ends.

A maze, its mirror images and its quarter turns are one problem.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from crsm.config import MazeConfig
from crsm.tasks.base import (
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Attempt,
    Problem,
    Split,
    draw_in_split,
    keyed_bits,
)
from crsm.tasks.closed import PATH_PREAMBLE, ClosedTask

SIDES = "NESW"
OPEN_SIDES = tuple("".join(side for bit, side in enumerate(SIDES) if mask >> bit & 1) for mask in range(1, 16))
"""Words for the sides on which a cell is open."""


class _Grid(NamedTuple):
    """What depends on the size alone."""

    walls: tuple[tuple[int, int, int, int], ...]
    """Each pair of neighbouring cells, with the bits of the sides they share."""
    images_WI: np.ndarray
    """Walls in the order of each image of the grid under a symmetry. (symmetries, W)"""
    cells_CI: np.ndarray
    """Where a symmetry puts each cell. (symmetries, C)"""


class _Maze(NamedTuple):
    sides: list[int]
    """Open sides of each cell, as bits."""
    neighbours: list[list[int]]
    path: list[int]
    key: str | None


class Maze(ClosedTask):
    """The task for some settings."""

    def __init__(self, config: MazeConfig) -> None:
        super().__init__(config.label, config.weight, config.preamble, PATH_PREAMBLE)
        self._config = config
        self._grid = _grid(config.height, config.width)

    def words(self) -> list[str]:
        """Structure, verdicts, open sides, cells."""
        cells = map(str, range(self._config.height * self._config.width))
        return ["/", "=", VERDICT_RIGHT, VERDICT_WRONG, *PATH_PREAMBLE, "maze", *OPEN_SIDES, *cells]

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """A random spanning tree with a random start, and a goal at an allowed distance with a junction on the way."""
        maze = draw_in_split(
            lambda trial: self._draw(self.name, seed, split, index, trial), lambda drawn: drawn.key, split, self.name
        )
        path = maze.path
        cells = " ".join([f"{cell} {OPEN_SIDES[sides - 1]}" for cell, sides in enumerate(maze.sides)])
        prompt = f"maze {cells} / {path[0]} {path[-1]} ="
        data = {
            "neighbours": maze.neighbours,
            "start": path[0],
            "goal": path[-1],
            "path": path,
            "decisions": [step + 1 for step in _junctions(maze.neighbours, path)],
        }
        assert maze.key is not None
        return Problem(self.name, split, prompt, self._answer([str(cell) for cell in path]), maze.key, data)

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Half of them the way; the others leave it at one of its junctions and walk on to a dead end."""
        path, neighbours = problem.data["path"], problem.data["neighbours"]
        junctions = _junctions(neighbours, path)
        attempts = []
        for kind, share in rng.random((count, 2)).tolist():
            cells = path
            if kind >= 0.5 and junctions:
                at = junctions[int(share * len(junctions))]
                cells = _stray(neighbours, path, at, rng)
            attempts.append(Attempt(self._answer([str(cell) for cell in cells]), cells is path))
        return attempts

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is the way: there is only one, so comparing is verifying."""
        return self._words_of(answer) == [str(cell) for cell in problem.data["path"]]

    def _draw(self, *key: int | str) -> _Maze:
        config, grid = self._config, self._grid
        count = config.height * config.width
        bits = keyed_bits(len(grid.walls) + 2, *key)
        order = bits[2:].argsort()
        # Kruskal: walls fall in random order, but where they part what is already joined.
        root = list(range(count))
        sides = [0] * count
        neighbours: list[list[int]] = [[] for _ in range(count)]
        fallen = []
        for wall in order.tolist():
            a, b, side_a, side_b = grid.walls[wall]
            root_a, root_b = a, b
            while root[root_a] != root_a:
                root[root_a] = root[root[root_a]]
                root_a = root[root_a]
            while root[root_b] != root_b:
                root[root_b] = root[root[root_b]]
                root_b = root[root_b]
            if root_a != root_b:
                root[root_b] = root_a
                sides[a] |= side_a
                sides[b] |= side_b
                neighbours[a].append(b)
                neighbours[b].append(a)
                fallen.append(wall)
                if len(fallen) == count - 1:
                    break
        path = self._way(neighbours, int(bits[0] % np.uint64(count)), int(bits[1]))
        return _Maze(sides, neighbours, path, self._key(fallen, path) if _junctions(neighbours, path) else None)

    def _way(self, neighbours: list[list[int]], start: int, bits: int) -> list[int]:
        """The way to one of the cells at an allowed distance; empty if there is none."""
        before, frontier, goals = {start: start}, [start], []
        for moves in range(1, self._config.max_moves + 1):
            reached = []
            for cell in frontier:
                for other in neighbours[cell]:
                    if other != before[cell]:
                        before[other] = cell
                        reached.append(other)
            frontier = reached
            if moves >= self._config.min_moves:
                goals += frontier
        if not goals:
            return []
        path = [goals[bits % len(goals)]]
        while path[-1] != start:
            path.append(before[path[-1]])
        return path[::-1]

    def _key(self, fallen: list[int], path: list[int]) -> str:
        images_WI, cells_CI = self._grid.images_WI, self._grid.cells_CI
        open_W = np.zeros(images_WI.shape[1], dtype=bool)
        open_W[fallen] = True
        packed = np.packbits(open_W[images_WI], axis=1)
        starts, goals = cells_CI[:, path[0]].tolist(), cells_CI[:, path[-1]].tolist()
        walls, start, goal = min(zip((row.tobytes() for row in packed), starts, goals, strict=True))
        return f"maze {self._config.height} {self._config.width} {walls.hex()} from {start} to {goal}"


def _junctions(neighbours: list[list[int]], path: list[int]) -> list[int]:
    """Indices into the way, its end excluded, at which there is more than one cell to go on to."""
    return [step for step, cell in enumerate(path[:-1]) if len(neighbours[cell]) > (1 if step == 0 else 2)]


def _stray(neighbours: list[list[int]], path: list[int], at: int, rng: np.random.Generator) -> list[int]:
    """The way up to a junction, then a wrong side of it, then anywhere but back until a dead end."""
    known = (path[at - 1] if at else -1, path[at + 1])
    cells = [*path[: at + 1]]
    choices = [cell for cell in neighbours[path[at]] if cell not in known]
    while choices:
        cells.append(choices[int(rng.integers(len(choices)))] if len(choices) > 1 else choices[0])
        choices = [cell for cell in neighbours[cells[-1]] if cell != cells[-2]]
    return cells


@lru_cache(maxsize=16)
def _grid(height: int, width: int) -> _Grid:
    cells_HW = np.arange(height * width).reshape(height, width)
    across = [(a, a + 1, 2, 8) for a in cells_HW[:, :-1].ravel().tolist()]
    down = [(a, a + width, 4, 1) for a in cells_HW[:-1].ravel().tolist()]
    walls = (*across, *down)
    index_of = {frozenset(wall[:2]): index for index, wall in enumerate(walls)}
    turned = [cells_HW, cells_HW[::-1], cells_HW[:, ::-1], cells_HW[::-1, ::-1]]
    if height == width:
        turned += [image.T for image in turned]
    images, cells = [], []
    for image_HW in turned:
        # Cell c of the image shows cell origin[c] of the maze.
        origin = image_HW.ravel().tolist()
        images.append([index_of[frozenset((origin[a], origin[b]))] for a, b, _, _ in walls])
        cells.append(np.argsort(origin))
    return _Grid(walls, np.array(images), np.array(cells))
