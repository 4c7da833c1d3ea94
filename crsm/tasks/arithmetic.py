"""Arithmetic: an expression is worked out step by step, innermost operations first.

    arithmetic 3 * ( 4 + 5 ) - 2 = the answer 4 + 5 = 9 ; 3 * 9 = 27 ; 27 - 2 = 25 yes

In the closed vocabulary the steps are written as those of countdown, from which its facts can be learned apart from any
search. As open text (``style: marks``) they are written as in GSM8K, every step with its calculator mark:

    Question: What is 3 * (4 + 5) - 2?
    Answer: 4 + 5 = <<4+5=9>>9
    …
    #### 25

A step that is false makes the answer wrong, whatever it ends in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crsm.config import ArithmeticConfig
from crsm.tasks.base import (
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Attempt,
    Problem,
    Split,
    cut_special,
    draw_in_split,
    keyed_bits,
)
from crsm.tasks.calculator import marks_are_true
from crsm.tasks.closed import PREAMBLE, ClosedTask, number_of
from crsm.tasks.countdown import OPERATORS, apply
from crsm.tasks.gsm8k import final_number

Tree = int | tuple[str, "Tree", "Tree"]
"""A number, or an operator with what it is applied to."""

_BINDS = {"+": 1, "-": 1, "*": 2, "//": 2}
_SLIPS = (1, -1, 2, -2, 10, -10)
"""How far a wrong result is from the right one."""


class Arithmetic(ClosedTask):
    """The task for some settings, in words or as open text."""

    def __init__(self, config: ArithmeticConfig) -> None:
        self._open = config.style == "marks"
        super().__init__(config.label, config.weight, 0 if self._open else config.preamble)
        self._config = config
        if self._open:
            self.max_tokens = config.max_tokens

    def words(self) -> list[str]:
        """Structure, verdicts, operators, numbers; none of open text."""
        if self._open:
            return []
        return [
            *("/", "=", VERDICT_RIGHT, VERDICT_WRONG, *PREAMBLE, "arithmetic", ";", "(", ")", *OPERATORS),
            *map(str, range(self._config.max_value + 1)),
        ]

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """A random expression whose every part is a whole number from 0 to ``max_value``."""
        config = self._config
        spread = config.max_operations - config.min_operations + 1

        def draw(trial: int) -> tuple[Tree, str]:
            bits = iter(keyed_bits(5 * config.max_operations + 2, self.name, seed, split, index, trial).tolist())
            tree = _grow(config.min_operations + next(bits) % spread, config, bits)
            return tree, f"arithmetic {' '.join(_written(tree))}"

        tree, key = draw_in_split(draw, lambda drawn: drawn[1], split, self.name)
        steps = _steps(tree)
        written = _written(tree)
        if self._open:
            prompt = f"Question: What is {_as_text(written)}?\nAnswer:"
        else:
            prompt = f"arithmetic {' '.join(written)} ="
        data = {
            "tree": tree,
            "steps": steps,
            "value": steps[-1][3],
            "decisions": [] if self._open else [6 * step + 4 for step in range(len(steps))],
        }
        return Problem(self.name, split, prompt, self._line(steps), key, data)

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Half of them right; the others have one false result and go on with it for as long as that is possible."""
        number = len(problem.data["steps"])
        attempts = []
        for kind, at, slip in rng.random((count, 3)).tolist():
            if kind < 0.5:
                attempts.append(Attempt(problem.solution, True))
                continue
            steps = _steps(problem.data["tree"], int(at * number), _SLIPS[int(slip * len(_SLIPS))])
            within = next((i for i, s in enumerate(steps) if not 0 <= s[3] <= self._config.max_value), len(steps))
            # Open text says what it likes; where a word is missing, the line ends before it.
            steps = steps if self._open else steps[:within]
            attempts.append(Attempt(self._line(steps), False) if steps else Attempt(problem.solution, True))
        return attempts

    def verify(self, problem: Problem, answer: str) -> bool:
        """In words: whether each step is an operation whose parts are known by then, and true. Open: see the module."""
        if self._open:
            return final_number(answer) == problem.data["value"] and marks_are_true(cut_special(answer))
        words = self._words_of(answer)
        steps = len(problem.data["steps"])
        if len(words) != 6 * steps - 1:
            return False
        trees: set[Tree] = {problem.data["tree"]}
        for start in range(0, len(words), 6):
            a, b, claimed = (number_of(words[start + place]) for place in (0, 2, 4))
            if a is None or b is None or claimed is None or words[start + 3] != "=":
                return False
            if words[start + 5 : start + 6] not in ([], [";"]) or apply(a, words[start + 1], b, least=0) != claimed:
                return False
            # The same step may stand in several places of the expression.
            trees = {after for tree in trees for after in _replaced(tree, (words[start + 1], a, b), claimed)}
        return any(isinstance(tree, int) for tree in trees)

    def _line(self, steps: list[tuple[int, str, int, int]]) -> str:
        if not self._open:
            return self._answer(" ; ".join(f"{a} {sign} {b} = {c}" for a, sign, b, c in steps).split())
        lines = []
        for a, sign, b, c in steps:
            sign = sign[0]  # as in GSM8K
            lines.append(f"{a} {sign} {b} = <<{a}{sign}{b}={c}>>{c}")
        return " " + "\n".join([*lines, f"#### {steps[-1][3]}"])


def _grow(operations: int, config: ArithmeticConfig, bits: Iterator[int]) -> Tree:
    if operations == 0:
        return 1 + next(bits) % config.max_number
    left_operations = next(bits) % operations
    left = _grow(left_operations, config, bits)
    right = _grow(operations - 1 - left_operations, config, bits)
    a, b = _value(left), _value(right)
    signs = [
        sign
        for sign in OPERATORS
        if (result := apply(a, sign, b, least=0)) is not None
        and result <= config.max_value
        and not (sign == "//" and b == 1)
    ]
    if not signs:  # Only a sum or a product that is too large, and a difference that is negative: the other way round.
        return "-", right, left
    return signs[next(bits) % len(signs)], left, right


def _value(tree: Tree) -> int:
    if isinstance(tree, int):
        return tree
    result = apply(_value(tree[1]), tree[0], _value(tree[2]), least=0)
    assert result is not None
    return result


def _steps(tree: Tree, slip_at: int = -1, slip: int = 0) -> list[tuple[int, str, int, int]]:
    """Operations with their results, left before right, parts first. The one at ``slip_at`` is off by ``slip``, and the
    list ends where that makes the next one impossible."""
    steps: list[tuple[int, str, int, int]] = []

    def work(node: Tree) -> int | None:
        if isinstance(node, int):
            return node
        a = work(node[1])
        b = work(node[2]) if a is not None else None
        result = apply(a, node[0], b, least=-(10**6)) if a is not None and b is not None else None
        if a is None or b is None or result is None:
            return None
        if len(steps) == slip_at:
            result = result + slip if result + slip >= 0 else result - slip
        steps.append((a, node[0], b, result))
        return result

    work(tree)
    return steps


def _replaced(tree: Tree, operation: tuple[str, int, int], result: int) -> Iterator[Tree]:
    """The expression with its result in the place of one operation, for each place where it stands."""
    if isinstance(tree, int):
        return
    if tree == operation:
        yield result
        return
    sign, left, right = tree
    for after in _replaced(left, operation, result):
        yield sign, after, right
    for after in _replaced(right, operation, result):
        yield sign, left, after


def _written(tree: Tree, binds: int = 0, right: bool = False) -> list[str]:
    """The expression with no more parentheses than it needs."""
    if isinstance(tree, int):
        return [str(tree)]
    own = _BINDS[tree[0]]
    words = [*_written(tree[1], own), tree[0], *_written(tree[2], own, right=True)]
    return ["(", *words, ")"] if own < binds or (right and own == binds) else words


def _as_text(words: list[str]) -> str:
    return " ".join(words).replace("( ", "(").replace(" )", ")").replace("//", "/")
