"""What every task offers: problems by seed and split, attempts with their outcome, and a verifier.

A problem is text. Its ``prompt`` is given; an answer continues it and is closed by a *verdict*: the token that claims
whether the answer was right. Texts here never hold the verdict; ``crsm.data.sequences`` appends its token.

Splits are disjoint by content, not by seed: a problem belongs to the split that the hash of its canonical ``key`` says,
whoever draws it and however it is written down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

Split = Literal["train", "valid", "test"]

PAD = "<pad>"
EOS = "<eos>"
"""End of text."""
VERDICT_RIGHT = "yes"
VERDICT_WRONG = "no"
"""The verdict in a closed vocabulary: ordinary words."""
TOKEN_RIGHT = "<right>"
TOKEN_WRONG = "<wrong>"
"""The verdict in open text: special tokens, so that an answer may say "no" without ending there."""

_BUCKETS: dict[Split, range] = {"train": range(90), "valid": range(90, 95), "test": range(95, 100)}
_MAX_REJECTIONS = 5000
"""Draws before a split is called empty; a split of 5 % is missed by that many with probability 1e-111."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, with its answer."""

    task: str
    """Name of the task."""
    split: Split
    prompt: str
    solution: str
    """The gold answer that follows the prompt: preamble included, verdict not."""
    key: str
    """Canonical identity: equal for two ways of writing the same problem. Its hash decides the split."""
    data: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Plain data for verifying and drawing (a graph's edges, start, goal); the keys are the task's own."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A try at a problem whose outcome is known."""

    text: str
    """The answer that follows the prompt: preamble included, verdict not."""
    correct: bool


class Task(Protocol):
    """A family of problems. Every method is a pure function of its arguments (and of the task's settings)."""

    name: str
    weight: float
    """Share of the training mix."""
    preamble: str
    """What an answer says before it has to decide anything; may be empty."""
    max_tokens: int | None
    """Longest sequence (prompt, answer and verdict) that is trained on; None: every problem is short enough."""
    has_attempts: bool
    """Whether ``attempts`` has any; without them there is no contrast from which a value head could learn."""

    def words(self) -> list[str]:
        """Pieces of the closed vocabulary in a fixed order, verdicts included; empty for open text."""
        ...

    def size(self, split: Split) -> int | None:
        """Number of problems of a split; None: generated, without a known end."""
        ...

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """The problem at ``index`` of the endless stream that ``seed`` and ``split`` name.

        Raises:
            ValueError: the split holds no problem.
        """
        ...

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """``count`` attempts drawn with ``rng``, right ones among them; an empty list if none are known."""
        ...

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether an answer is right. It may carry a verdict (ignored) or be any garbage (False); nothing is run."""
        ...

    def decision_positions(self, problem: Problem) -> list[int]:
        """Indices among the words of the solution at which a choice has to be made; for reports."""
        ...


def problems(task: Task, seed: int, split: Split, count: int) -> list[Problem]:
    """The first ``count`` problems of a stream that differ by key; fewer only if the split holds fewer.

    Raises:
        ValueError: ``count`` is not positive, or the split holds no problem.
    """
    if count < 1:
        raise ValueError(f"count = {count}; allowed: at least 1 problem")
    size = task.size(split)
    wanted = count if size is None else min(count, size)
    found: dict[str, Problem] = {}
    index = repeats = 0
    # A generator with few labels may not have `wanted` distinct problems: give up when draws bring nothing new.
    while len(found) < wanted and repeats < 1000 + 10 * len(found):
        problem = task.generate(seed, split, index)
        index += 1
        repeats = repeats + 1 if problem.key in found else 0
        found.setdefault(problem.key, problem)
    if not found:
        raise ValueError(f"task {task.name!r} has no {split} problems; allowed: a larger data set")
    return list(found.values())


def split_of(key: str) -> Split:
    """The split that a canonical key belongs to: 90 % train, 5 % valid, 5 % test, by sha256."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") % 100
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def draw_in_split(draw: Callable[[int], T], key_of: Callable[[T], str | None], split: Split, name: str) -> T:
    """The first of ``draw(0), draw(1), …`` whose key belongs to ``split``; a key of None: a draw that is no problem.

    Raises:
        ValueError: none does within a number of draws that no split of reasonable size can escape.
    """
    for trial in range(_MAX_REJECTIONS):
        drawn = draw(trial)
        key = key_of(drawn)
        if key is not None and split_of(key) == split:
            return drawn
    raise ValueError(
        f"task {name!r} has no {split} problems with these settings; allowed: more labels or a larger problem"
    )


def keyed_bits(count: int, *key: int | str) -> np.ndarray:
    """Random numbers that depend on ``key`` alone. (count,) uint64

    A hash rather than a generator: it costs a tenth of seeding one, and no release of numpy can change the problems.
    """
    return np.frombuffer(hashlib.shake_128(repr(key).encode()).digest(8 * count), dtype="<u8")


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on ``key`` alone."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little"))


def cut_special(answer: str) -> str:
    """The answer up to the first special token."""
    for mark in (EOS, PAD, TOKEN_RIGHT, TOKEN_WRONG):
        answer = answer.partition(mark)[0]
    return answer
