"""Grids that a rule changes, shown by a few pairs (ARC-AGI-1, arXiv 1911.01547).

    arc_agi 0 0 1 | 1 0 0 > 1 0 0 | 0 0 1 / … / 2 0 | 0 0 = 0 2 | 0 0 yes
    rows apart by |, input and output by >, pairs by /; the answer is the last pair's output

Train, valid and test are cut out of the tasks by a hash that no augmentation changes. Problems of valid and test ask
what the file asks; those of training may come with other colours (0, the background, stays), turned or mirrored, their
pairs in another order and any one of them asked. A task that asks several grids asks one a problem.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np

from crsm.config import ArcAgiConfig
from crsm.tasks.base import (
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Attempt,
    Problem,
    Split,
    keyed_bits,
    split_of,
)
from crsm.tasks.closed import ClosedTask
from crsm.tasks.jsonl import read_bytes, read_jsonl

SAMPLE_PATH = Path(__file__).parent.parent / "assets" / "arc_agi_sample.jsonl"
"""Small tasks of the public training set; see the licence notice beside it."""

_COLOURS = 10
_MAX_SIDE = 30

Grid = np.ndarray
"""Colours. (height, width) uint8"""
Pair = tuple[Grid, Grid]


class _Rule:
    """One task of the file: its pairs, and how many of them are shown; those after it are asked."""

    __slots__ = ("key", "name", "pairs", "shown")

    def __init__(self, name: str, pairs: list[Pair], shown: int) -> None:
        self.name, self.pairs, self.shown = name, pairs, shown
        self.key = f"arc_agi {_canonical(pairs[:shown], pairs[shown:])}"


class ArcAgi(ClosedTask):
    """The task over one file or folder.

    Raises:
        ValueError: a file is missing, or a task of it malformed (both named).
    """

    def __init__(self, config: ArcAgiConfig) -> None:
        super().__init__(config.label, config.weight, preamble=0)
        self.max_tokens = config.max_tokens
        self._augment = config.augment
        self._rules: dict[Split, list[_Rule]] = {split: [] for split in get_args(Split)}
        seen: set[str] = set()
        for where, name, record in _records(config.path):
            rule = _rule(record, name, where)
            if rule.key not in seen:
                seen.add(rule.key)
                self._rules[split_of(rule.key)].append(rule)

    def words(self) -> list[str]:
        """Structure, verdicts, colours."""
        return ["|", "/", "=", VERDICT_RIGHT, VERDICT_WRONG, "arc_agi", ">", *map(str, range(_COLOURS))]

    def size(self, split: Split) -> int | None:
        """Tasks of a split."""
        return len(self._rules[split])

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """The problem at ``index`` of an endless stream: the tasks in an order drawn for every round."""
        known = self._rules[split]
        if not known:
            raise ValueError(f"task {self.name!r} has no {split} problems; allowed: a larger data set")
        around, place = divmod(index, len(known))
        order = keyed_bits(len(known), "arc_agi", seed, split, around).argsort()
        rule = known[int(order[place])]
        shown, asked = rule.pairs[: rule.shown], rule.pairs[rule.shown + around % (len(rule.pairs) - rule.shown)]
        if self._augment and split == "train":
            shown, asked = _augmented([*shown, asked], keyed_bits(32, "arc_agi", seed, index))
        pairs = " / ".join(f"{_text(given)} > {_text(wanted)}" for given, wanted in shown)
        prompt = f"arc_agi {pairs} / {_text(asked[0])} ="
        solution = _text(asked[1])
        data = {
            "id": rule.name,
            "pairs": [[given.tolist(), wanted.tolist()] for given, wanted in shown],
            "input": asked[0].tolist(),
            "output": asked[1].tolist(),
            "decisions": [place for place, word in enumerate(solution.split()) if word != "|"],
        }
        return Problem(self.name, split, prompt, solution, rule.key, data)

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Half of them right; the others are the grid with cells changed, cut or turned, or a grid that was shown."""
        right = np.array(problem.data["output"], dtype=np.uint8)
        shown = [np.array(grid, dtype=np.uint8) for pair in problem.data["pairs"] for grid in pair]
        colours = sorted({int(colour) for grid in (right, *shown) for colour in np.unique(grid)})
        attempts = []
        for _ in range(count):
            grid = right if rng.random() < 0.5 else _spoiled(right, shown, colours, rng)
            attempts.append(Attempt(_text(grid), bool(np.array_equal(grid, right))))
        return attempts

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is the grid, cell by cell."""
        return " ".join(self._words_of(answer)) == _text(np.array(problem.data["output"], dtype=np.uint8))


def _text(grid: Grid) -> str:
    return " | ".join(" ".join(map(str, row)) for row in grid.tolist())


def _augmented(pairs: list[Pair], bits: np.ndarray) -> tuple[list[Pair], Pair]:
    colours = np.concatenate([[0], 1 + bits[: _COLOURS - 1].argsort()]).astype(np.uint8)
    turn = int(bits[_COLOURS] % np.uint64(8))
    changed = [(_turned(colours[given], turn), _turned(colours[wanted], turn)) for given, wanted in pairs]
    order = bits[_COLOURS + 1 : _COLOURS + 1 + len(pairs)].argsort().tolist()
    return [changed[place] for place in order[1:]], changed[order[0]]


def _turned(grid: Grid, turn: int) -> Grid:
    """One of the eight images of a grid."""
    return np.rot90(grid.T if turn >= 4 else grid, turn % 4)


def _spoiled(right: Grid, shown: list[Grid], colours: list[int], rng: np.random.Generator) -> Grid:
    match int(rng.integers(6)):
        case 0:
            return shown[int(rng.integers(len(shown)))]
        case 1:
            return _turned(right, 1 + int(rng.integers(7)))
        case 2:
            return right[: 1 + int(rng.integers(len(right)))]
        case _:
            grid = right.copy()
            cells = rng.integers(grid.size, size=1 + int(rng.integers(3)))
            grid.flat[cells] = rng.choice(colours, size=len(cells))
            return grid


def _canonical(shown: list[Pair], asked: list[Pair]) -> str:
    """The same for every image of a task under the changes that augmentation makes."""
    images = []
    for turn in range(8):
        turned = [(_turned(given, turn), _turned(wanted, turn)) for given, wanted in (*shown, *asked)]
        # Pairs are ordered by a form that no change of colours touches, then colours are numbered as they appear.
        turned.sort(key=lambda pair: _renamed([pair]))
        images.append(_renamed(turned))
    return hashlib.sha256(min(images)).hexdigest()[:32]


def _renamed(pairs: list[Pair]) -> bytes:
    names: dict[int, int] = {0: 0}
    out = bytearray()
    for pair in pairs:
        for grid in pair:
            out += bytes(grid.shape)
            out += bytes(names.setdefault(colour, len(names)) for colour in grid.ravel().tolist())
    return bytes(out)


def _records(path: str) -> list[tuple[str, str, Any]]:
    """Each task with a name for error messages and its own."""
    source = SAMPLE_PATH if path == "sample" else Path(path)
    found: list[tuple[str, str, Any]] = []
    if source.is_dir():
        for file in sorted(source.glob("*.json")):
            where = repr(str(file))
            try:
                found.append((where, file.stem, json.loads(read_bytes(file))))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
    else:
        for number, (where, record) in enumerate(read_jsonl(source), start=1):
            found.append((where, str(record.get("id", number)), record))
    if not found:
        raise ValueError(f"{str(source)!r} holds no tasks; allowed: at least one")
    return found


def _rule(record: Any, name: str, where: str) -> _Rule:
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a {type(record).__name__}; allowed: an object")
    lists = []
    for part in ("train", "test"):
        pairs = record.get(part)
        if not isinstance(pairs, list) or not pairs:
            raise ValueError(f"{where}: {part} = {str(pairs)[:40]}; allowed: a list of at least one pair")
        read = []
        for pair in pairs:
            if not isinstance(pair, dict):
                raise ValueError(f"{where}: {part} holds a {type(pair).__name__}; allowed: input and output")
            read.append((_grid(pair.get("input"), where), _grid(pair.get("output"), where)))
        lists.append(read)
    return _Rule(name, [*lists[0], *lists[1]], len(lists[0]))


def _grid(rows: Any, where: str) -> Grid:
    sides = range(1, _MAX_SIDE + 1)
    if (
        not isinstance(rows, list)
        or len(rows) not in sides
        or not all(isinstance(row, list) and len(row) == len(rows[0]) and len(row) in sides for row in rows)
        or not all(type(colour) is int and 0 <= colour < _COLOURS for row in rows for colour in row)
    ):
        raise ValueError(f"{where}: a grid {str(rows)[:40]}; allowed: 1 to 30 equal rows of 1 to 30 colours 0 to 9")
    return np.array(rows, dtype=np.uint8)
