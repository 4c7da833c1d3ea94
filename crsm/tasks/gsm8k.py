"""Grade-school word problems with worked steps (GSM8K, arXiv 2110.14168).

    Question: Natalia sold clips to 48 of her friends …
    Answer: Natalia sold 48/2 = <<48/2=24>>24 clips in May.
    …
    #### 72

For training only the training file is read; train, valid and test are cut out of it by the hash of the question, so
that the official test set stays untouched. Attempts come from a model, recorded with their verdict; none are invented.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np

from crsm.config import Gsm8kConfig
from crsm.tasks.base import Attempt, Problem, Split, cut_special, keyed_rng, split_of
from crsm.tasks.calculator import marks_are_true
from crsm.tasks.jsonl import field, load_hub, read_jsonl

SAMPLE_PATH = Path(__file__).parent.parent / "assets" / "gsm8k_sample.jsonl"
"""200 problems, one in every 37 of the training file; see the licence notice beside it."""

_MARK = "####"
# ASCII digits only: int() and Decimal() would also read other scripts' digits.
_NUMBER = re.compile(r"[-+]?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_MAX_NUMBER = 64
"""Characters of a final answer; what is longer is no answer."""


class Gsm8k:
    """The task over one file of problems.

    Raises:
        ValueError: a file is missing, or a line of it malformed (both named), or the hub cannot be reached.
    """

    name = "gsm8k"
    preamble = ""

    def __init__(self, config: Gsm8kConfig) -> None:
        self.weight = config.weight
        self.max_tokens: int | None = config.max_tokens
        self._problems: dict[Split, list[Problem]] = {split: [] for split in get_args(Split)}
        seen: set[str] = set()
        for where, record in _records(config):
            problem = _problem(record, where)
            if config.true_marks and not marks_are_true(problem.solution):
                continue
            if problem.key not in seen:
                seen.add(problem.key)
                self._problems[problem.split].append(problem)
        if not seen:
            raise ValueError(f"{_name(config.path)} holds no problems; allowed: at least one")
        self._attempts: dict[str, list[Attempt]] = {}
        if config.attempts_path is not None:
            self._read_attempts(config.attempts_path)
        self.has_attempts = bool(self._attempts)

    def words(self) -> list[str]:
        """None: the text is open."""
        return []

    def size(self, split: Split) -> int | None:
        """Problems of a split."""
        return len(self._problems[split])

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """The problem at ``index`` of an endless stream in which every epoch is another shuffle of the split."""
        known = self._problems[split]
        if not known:
            raise ValueError(f"task {self.name!r} has no {split} problems; allowed: a larger data set")
        epoch, place = divmod(index, len(known))
        return known[int(_shuffled(seed, split, epoch, len(known))[place])]

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Recorded attempts at the problem, drawn with replacement; an empty list if there are none."""
        known = self._attempts.get(problem.key)
        return [known[choice] for choice in rng.integers(len(known), size=count).tolist()] if known else []

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the number after the first ``####`` is the right one."""
        number = final_number(answer)
        return number is not None and number == Decimal(problem.data["answer"])

    def decision_positions(self, problem: Problem) -> list[int]:
        """None known in open text."""
        return []

    def _read_attempts(self, path: str) -> None:
        by_key = {problem.key: problem for known in self._problems.values() for problem in known}
        for where, record in read_jsonl(path):
            question, text = field(record, "question", str, where), field(record, "attempt", str, where)
            correct = field(record, "correct", bool, where)
            problem = by_key.get(_key(question))
            if problem is None:
                continue  # Attempts at a larger data set serve a part of it.
            text = cut_special(text).rstrip()
            if not text.strip():
                raise ValueError(f"{where}: the attempt is empty; allowed: text")
            if self.verify(problem, text) != correct:
                raise ValueError(f"{where}: correct = {correct} contradicts the verifier; allowed: its verdict")
            text = text if text[:1].isspace() else f" {text}"
            self._attempts.setdefault(problem.key, []).append(Attempt(text, correct))


@lru_cache(maxsize=64)
def _shuffled(seed: int, split: Split, epoch: int, count: int) -> np.ndarray:
    return keyed_rng("gsm8k", seed, split, epoch).permutation(count)


def final_number(answer: str) -> Decimal | None:
    """The number after the first ``####`` of an answer, without commas, dollar sign and final period, if it has one.

    The rest of its line must be the number and nothing else, so an expression is not a number, and nothing is computed.
    """
    _, mark, rest = answer.partition(_MARK)
    if not mark:
        return None
    line = cut_special(rest[: 2 * _MAX_NUMBER].split("\n", 1)[0]).strip().removesuffix(".")
    if len(line) > _MAX_NUMBER or not _NUMBER.fullmatch(line):
        return None
    return Decimal(line.replace(",", "").replace("$", ""))


def _problem(record: dict[str, Any], where: str) -> Problem:
    question, answer = field(record, "question", str, where).strip(), field(record, "answer", str, where).strip()
    if not question:
        raise ValueError(f"{where}: the question is empty; allowed: text")
    number = final_number(answer)
    if number is None:
        raise ValueError(f"{where}: the answer ends in {answer[-40:]!r}; allowed: a last line '#### N'")
    key = _key(question)
    data = {"question": question, "answer": str(number)}
    return Problem("gsm8k", split_of(key), f"Question: {question}\nAnswer:", f" {answer}", key, data)


def _key(question: str) -> str:
    """Equal for questions that differ in white space or case only."""
    return f"gsm8k {' '.join(question.split()).casefold()}"


def _name(path: str | None) -> str:
    return "openai/gsm8k" if path is None else repr(str(SAMPLE_PATH) if path == "sample" else path)


def _records(config: Gsm8kConfig) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each record with a name for error messages."""
    if config.path is None:
        allowed = "tasks.gsm8k.path = a local jsonl, or 'sample'"
        loaded = load_hub("openai/gsm8k", "main", config.hub_split, "tasks.gsm8k.path", allowed)
        return ((f"openai/gsm8k {config.hub_split} record {i}", record) for i, record in enumerate(loaded))
    return read_jsonl(SAMPLE_PATH if config.path == "sample" else config.path)
