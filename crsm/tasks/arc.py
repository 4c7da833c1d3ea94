"""AI2 ARC, Easy and Challenge: multiple-choice questions of grade-school science (arXiv 1803.05457).

    Question: Which of these gives off light of its own?
    Answer: a star

The prompt and the continuations are those of lm-eval's tasks ``arc_easy`` and ``arc_challenge``. Options are labelled
``A`` to ``D``, ``1`` to ``4``, or otherwise: what counts is the place of the right label among the labels.

Train, validation and test are the data set's own. Nothing of it is shipped: its licence is CC BY-SA 4.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np

from crsm.config import ArcConfig
from crsm.tasks.base import Attempt, Problem, Split, cut_special, keyed_rng
from crsm.tasks.jsonl import field, load_hub, read_jsonl

_SUBSETS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
_FILES: dict[Split, tuple[str, ...]] = {"train": ("train",), "valid": ("validation", "dev"), "test": ("test",)}
"""What the files of a split are called after the subset, whatever the case: the hub's names and AI2's own."""


@runtime_checkable
class MultipleChoice(Protocol):
    """A task whose problems list the possible answers."""

    def choices(self, problem: Problem) -> tuple[tuple[str, ...], int]:
        """The possible answers, and which of them is right."""
        ...


class Arc:
    """The task over one of the two sets.

    Raises:
        ValueError: a file is missing, or a line of it malformed (both named), or the hub cannot be reached.
    """

    preamble = ""
    has_attempts = True

    def __init__(self, config: ArcConfig) -> None:
        self.name = config.label
        self.weight = config.weight
        self.max_tokens: int | None = config.max_tokens
        self._problems: dict[Split, list[Problem]] = {split: [] for split in get_args(Split)}
        seen: set[str] = set()
        for split, where, record in _records(config):
            problem = _problem(self.name, split, record, where)
            if problem.key not in seen:
                seen.add(problem.key)
                self._problems[split].append(problem)
        if not seen:
            raise ValueError(f"{config.path!r} holds no problems; allowed: at least one")

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
            raise ValueError(f"task {self.name!r} has no {split} problems; allowed: a data set with that split")
        epoch, place = divmod(index, len(known))
        return known[int(_shuffled(self.name, seed, split, epoch, len(known))[place])]

    def choices(self, problem: Problem) -> tuple[tuple[str, ...], int]:
        """The options, and the place of the right one."""
        return tuple(problem.data["choices"]), int(problem.data["answer"])

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Options drawn uniformly, the right one among them."""
        texts, answer = self.choices(problem)
        return [Attempt(f" {texts[drawn]}", drawn == answer) for drawn in rng.integers(len(texts), size=count).tolist()]

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is the right option's text and nothing else, white space and case apart."""
        texts, right = self.choices(problem)
        return _plain(cut_special(answer)) == _plain(texts[right])

    def decision_positions(self, problem: Problem) -> list[int]:
        """None known in open text."""
        return []


@lru_cache(maxsize=64)
def _shuffled(name: str, seed: int, split: Split, epoch: int, count: int) -> np.ndarray:
    return keyed_rng(name, seed, split, epoch).permutation(count)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


# ------------------------------------------------------------------------------------------------------------ reading


def _records(config: ArcConfig) -> Iterator[tuple[Split, str, dict[str, Any]]]:
    """Each record with its split and a name for error messages."""
    subset = _SUBSETS[config.name]
    if config.path is None:
        setting, allowed = f"tasks.{config.name}.path", "a local jsonl file, or a folder of them"
        for split, names in _FILES.items():
            loaded: Iterable[dict[str, Any]] = load_hub("allenai/ai2_arc", subset, names[0], setting, allowed)
            for index, record in enumerate(loaded):
                yield split, f"allenai/ai2_arc {subset} {split} record {index}", record
        return
    path = Path(config.path)
    if not path.is_dir():
        for where, record in read_jsonl(path):
            yield "test", where, record
        return
    names_of = {split: {f"{subset}-{name}.jsonl".casefold() for name in names} for split, names in _FILES.items()}
    files = sorted(path.iterdir())
    found = [(split, file) for split, names in names_of.items() for file in files if file.name.casefold() in names]
    if not found:
        wanted = ", ".join(f"{subset}-{names[0]}.jsonl" for names in _FILES.values())
        raise ValueError(f"{config.path!r} holds none of the files of {subset}; allowed: any of {wanted}")
    for split, file in found:
        for where, record in read_jsonl(file):
            yield split, where, record


def _problem(name: str, split: Split, record: dict[str, Any], where: str) -> Problem:
    if isinstance(record.get("question"), dict):
        record = _from_ai2(record, where)
    question = field(record, "question", str, where).strip()
    options = field(record, "choices", dict, where)
    texts = [text.strip() for text in _strings(options, "text", where)]
    labels = _strings(options, "label", where)
    key = field(record, "answerKey", str, where)
    if not question:
        raise ValueError(f"{where}: question is empty; allowed: text")
    if len(texts) < 2 or not all(texts):
        raise ValueError(f"{where}: choices.text = {texts}; allowed: at least two, none of them empty")
    if len(labels) != len(texts) or len(set(labels)) < len(labels):
        raise ValueError(
            f"{where}: choices.label = {labels} for {len(texts)} texts; allowed: one label each, no two alike"
        )
    if key not in labels:
        raise ValueError(f"{where}: answerKey = {key!r}; allowed: one of choices.label, {labels}")
    answer = labels.index(key)
    # The same question may be asked with other options.
    identity = f"arc {_plain(question)} | {' | '.join(map(_plain, texts))}"
    data = {"question": question, "choices": texts, "labels": labels, "answer": answer}
    return Problem(name, split, f"Question: {question}\nAnswer:", f" {texts[answer]}", identity, data)


def _from_ai2(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A record as AI2 itself publishes it, in the form of the hub's."""
    question = record["question"]
    options = field(question, "choices", list, f"{where}: question")
    parts = [option if isinstance(option, dict) else {} for option in options]
    choices = {name: [part.get(name) for part in parts] for name in ("text", "label")}
    return record | {"question": field(question, "stem", str, f"{where}: question"), "choices": choices}


def _strings(options: dict[str, Any], name: str, where: str) -> list[str]:
    values = field(options, name, list, f"{where}: choices")
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{where}: choices.{name} holds {str(value)[:40]!r}; allowed: texts")
    return list(values)
