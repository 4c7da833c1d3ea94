"""Countdown: reach a target with all of a few numbers (arXiv 2404.03683 uses it to study search in text).

    countdown 3 6 4 / 21 = the answer 6 * 4 = 24 ; 24 - 3 = 21 yes

A step takes two of the numbers that are left and puts their result in their place. Each first step is easy to make and
to check; whether the target can still be reached after it shows only at the end. That is known exactly here:
``live_steps`` says which steps keep the target within reach.

Results are whole, from 1 to ``max_value``. In a step that this module writes, the larger number stands first; any order
is accepted where the operation allows it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from crsm.config import CountdownConfig
from crsm.tasks.base import (
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Attempt,
    Problem,
    Split,
    draw_in_split,
    keyed_bits,
)
from crsm.tasks.closed import PREAMBLE, ClosedTask, number_of

OPERATORS = ("+", "-", "*", "//")
"""Division has no remainder."""

_RIGHT, _NEAR_MISS, _PLAY = 0.5, 0.8, 0.9
"""Cumulative shares of attempts: right lines, right up to a step that loses the target, any legal play; the rest have a
wrong result written as the target. Without the last a search would find that claiming the target pays."""


class Step(NamedTuple):
    """One operation on the numbers that are left."""

    left: int
    operator: str
    right: int
    result: int
    rest: tuple[int, ...]
    """Numbers left after it, ascending."""


class Countdown(ClosedTask):
    """The task for some settings."""

    def __init__(self, config: CountdownConfig) -> None:
        super().__init__(config.label, config.weight, config.preamble)
        self._config = config

    def words(self) -> list[str]:
        """Structure, verdicts, operators, numbers."""
        return [
            *("/", "=", VERDICT_RIGHT, VERDICT_WRONG, *PREAMBLE, "countdown", ";", *OPERATORS),
            *map(str, range(self._config.max_value + 1)),
        ]

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """Numbers drawn uniformly; the target is where a random play of them ends."""
        count, top = self._config.numbers, self._config.max_value

        def draw(trial: int) -> tuple[list[int], list[Step], str | None]:
            bits = keyed_bits(2 * count, self.name, seed, split, index, trial).tolist()
            numbers = [1 + bit % self._config.max_number for bit in bits[:count]]
            line = _play(tuple(sorted(numbers)), top, bits[count:])
            if not line or line[-1].rest[0] < self._config.min_target:
                return numbers, line, None
            return numbers, line, f"countdown {sorted(numbers)} to {line[-1].result}"

        numbers, line, key = draw_in_split(draw, lambda drawn: drawn[2], split, self.name)
        assert key is not None
        target = line[-1].result
        prompt = f"countdown {' '.join(map(str, numbers))} / {target} ="
        data = {
            "numbers": numbers,
            "target": target,
            "decisions": [6 * step + place for step in range(count - 1) for place in range(3)],
        }
        return Problem(self.name, split, prompt, self._answer(_words(line)), key, data)

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Half of them right: lines drawn uniformly among the steps that keep the target within reach."""
        numbers, target = tuple(sorted(problem.data["numbers"])), problem.data["target"]
        steps = len(numbers) - 1
        drawn: list[list[float]] = rng.random((count, steps + 2)).tolist()
        return [self._attempt(numbers, target, kind, at, shares) for kind, at, *shares in drawn]

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether every step is legal and true, every number used once, and the last result the target."""
        words = self._words_of(answer)
        left = list(problem.data["numbers"])
        if len(words) != 6 * len(left) - 7:
            return False
        result = 0
        for start in range(0, len(words), 6):
            a, b, claimed = (number_of(words[start + place]) for place in (0, 2, 4))
            if a is None or b is None or claimed is None or words[start + 3] != "=":
                return False
            if words[start + 5 : start + 6] not in ([], [";"]):
                return False
            for number in (a, b):
                if number not in left:
                    return False
                left.remove(number)
            applied = apply(a, words[start + 1], b)
            if applied is None or applied != claimed:
                return False
            result = applied
            left.append(result)
        return bool(result == problem.data["target"])

    def _attempt(self, numbers: tuple[int, ...], target: int, kind: float, at: float, shares: list[float]) -> Attempt:
        top = self._config.max_value
        # The step at which the target is lost; from there on any step is as good as another.
        lost_at = len(shares) if kind < _RIGHT else -1 if _NEAR_MISS <= kind < _PLAY else int(at * len(shares))
        line: list[Step] = []
        for index, share in enumerate(shares):
            choices = live_steps(numbers, target, top) if index < lost_at else legal_steps(numbers, top)
            if index == lost_at:
                choices = _dead_steps(numbers, target, top) or choices
            if not choices:
                break
            line.append(choices[int(share * len(choices))])
            numbers = line[-1].rest
        words = _words(line)
        complete = len(line) == len(shares)
        correct = complete and line[-1].result == target
        if kind >= _PLAY and complete and not correct:
            words[-1] = str(target)
        return Attempt(self._answer(words), correct)


@lru_cache(maxsize=1 << 16)
def legal_steps(numbers: tuple[int, ...], max_value: int) -> tuple[Step, ...]:
    """Steps from some numbers (ascending), each once; dividing by 1 is left out, as multiplying by it does the same."""
    found: dict[tuple[int, str, int], Step] = {}
    for low, b in enumerate(numbers):
        for high in range(low + 1, len(numbers)):
            a = numbers[high]
            others = numbers[:low] + numbers[low + 1 : high] + numbers[high + 1 :]
            for operator in OPERATORS:
                result = apply(a, operator, b)
                if (a, operator, b) in found or result is None or not 1 <= result <= max_value:
                    continue
                if operator == "//" and b == 1:
                    continue
                found[a, operator, b] = Step(a, operator, b, result, tuple(sorted((*others, result))))
    return tuple(found.values())


@lru_cache(maxsize=1 << 16)
def reachable(numbers: tuple[int, ...], max_value: int) -> frozenset[int]:
    """Every target that some numbers (ascending) can reach, all of them used."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset().union(*(reachable(step.rest, max_value) for step in legal_steps(numbers, max_value)))


@lru_cache(maxsize=1 << 16)
def live_steps(numbers: tuple[int, ...], target: int, max_value: int) -> tuple[Step, ...]:
    """Steps from some numbers (ascending) after which the target can still be reached."""
    return tuple(s for s in legal_steps(numbers, max_value) if target in reachable(s.rest, max_value))


@lru_cache(maxsize=1 << 16)
def _dead_steps(numbers: tuple[int, ...], target: int, max_value: int) -> tuple[Step, ...]:
    return tuple(s for s in legal_steps(numbers, max_value) if target not in reachable(s.rest, max_value))


def _play(numbers: tuple[int, ...], max_value: int, bits: list[int]) -> list[Step]:
    """Random legal steps down to one number; empty if none is left on the way."""
    line: list[Step] = []
    for bit in bits[: len(numbers) - 1]:
        choices = legal_steps(numbers, max_value)
        if not choices:
            return []
        line.append(choices[bit % len(choices)])
        numbers = line[-1].rest
    return line


def apply(a: int, operator: str, b: int, least: int = 1) -> int | None:
    """The result of one operation, None where it is not whole or a difference below ``least``."""
    match operator:
        case "+":
            return a + b
        case "-":
            return a - b if a - b >= least else None
        case "*":
            return a * b
        case "//":
            return a // b if b > 0 and a % b == 0 else None
    return None


def _words(line: list[Step]) -> list[str]:
    words: list[str] = []
    for step in line:
        words += [";"] if words else []
        words += [str(step.left), step.operator, str(step.right), "=", str(step.result)]
    return words
