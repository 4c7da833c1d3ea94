"""Tasks of reasoning-gym (extra ``gym``), from a list of those that are known to score soundly.

    Question: State the final answer to the following arithmetic problem: 4 + 3 =
    Answer: 7

Its generators run here; its scorers judge text that a model wrote, so they run behind the limits of ``sandbox``. Right
is what its scorer gives full marks. The list leaves out scorers that run the answer as code (``countdown``,
``puzzle24``, ``n_queens`` and others) and those that give full marks to wrong answers (``game_of_life_halting``,
``spell_backward`` and others).
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np

from crsm.config import GymConfig
from crsm.tasks.base import Attempt, Problem, Split, cut_special, draw_in_split, keyed_bits
from crsm.tasks.sandbox import Sandbox

ALLOWED = (
    *("aiw", "arc_1d", "base_conversion", "basic_arithmetic", "binary_alternation", "caesar_cipher", "chain_sum"),
    *("count_bits", "count_primes", "course_schedule", "family_relationships", "gcd", "isomorphic_strings"),
    *("largest_island", "lcm", "leg_counting", "letter_counting", "list_functions", "maze", "mini_sudoku"),
    *("number_filtering", "number_sequence", "products", "ransom_note", "rotate_matrix", "rotten_oranges"),
    *("shortest_path", "simple_equations", "simple_geometry", "string_manipulation", "syllogism"),
    *("word_sequence_reversal", "word_sorting"),
)
"""Each was read, and none gave full marks to the answer of another problem, to an empty one or to a longer one."""

_SEEDS = 1 << 31


class Gym:
    """One of the allowed tasks.

    Raises:
        ValueError: the task is not on the list, or the extra is not installed.
    """

    preamble = ""
    has_attempts = True

    def __init__(self, config: GymConfig) -> None:
        if config.dataset not in ALLOWED:
            raise ValueError(f"tasks.gym.dataset = {config.dataset!r}; allowed: {', '.join(ALLOWED)}")
        self.name = config.label
        self.weight = config.weight
        self.max_tokens: int | None = config.max_tokens
        self._dataset = config.dataset
        self._sandbox = Sandbox("crsm.tasks.gym_scorer:score", config.seconds, config.memory_mb)
        _library()

    def words(self) -> list[str]:
        """None: the text is open."""
        return []

    def size(self, split: Split) -> int | None:
        """No known end."""
        return None

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """The library's first problem for a seed that this place in the stream fixes."""

        def draw(trial: int) -> tuple[int, dict[str, Any], str]:
            its_seed = int(keyed_bits(1, "gym", self._dataset, seed, split, index, trial)[0] % np.uint64(_SEEDS))
            entry = _entry(self._dataset, its_seed)
            return its_seed, entry, f"gym {self._dataset} {' '.join(entry['question'].split()).casefold()}"

        its_seed, entry, key = draw_in_split(draw, lambda drawn: drawn[2], split, self.name)
        data = {"question": entry["question"], "answer": str(entry["answer"]), "seed": its_seed}
        prompt = f"Question: {entry['question'].strip()}\nAnswer:"
        return Problem(self.name, split, prompt, f" {data['answer']}", key, data)

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Half of them right; the others are the answer to another problem, or the right one with a character changed.

        None of them is scored, so an answer is called wrong only if it differs in more than case and white space.
        """
        right = problem.data["answer"]
        attempts = []
        for _ in range(count):
            text = right
            if rng.random() < 0.5:
                other = str(_entry(self._dataset, int(rng.integers(_SEEDS)))["answer"])
                text = other if rng.random() < 0.5 else _changed(right, other, rng)
            same = "".join(text.split()).casefold() == "".join(right.split()).casefold()
            attempts.append(Attempt(f" {right if same else text}", same))
        return attempts

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the library's scorer, behind limits, gives the answer full marks."""
        text = cut_special(answer).strip()
        if text == problem.data["answer"].strip():
            return True
        if not text or len(text) > 100_000:
            return False
        payload = {"dataset": self._dataset, "seed": problem.data["seed"], "answer": text}
        return self._sandbox.score(payload).score >= 1.0

    def decision_positions(self, problem: Problem) -> list[int]:
        """None known in open text."""
        return []


def _entry(name: str, seed: int) -> dict[str, Any]:
    entry: dict[str, Any] = _library().create_dataset(name, seed=seed, size=1)[0]
    return entry


def _changed(right: str, other: str, rng: np.random.Generator) -> str:
    place = int(rng.integers(len(right)))
    letters = (other + "0123456789").replace(right[place], "").replace("\n", "") or "0"
    return right[:place] + letters[int(rng.integers(len(letters)))] + right[place + 1 :]


@lru_cache(maxsize=1)
def _library() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(
            f"task gym needs the extra `gym` (pip install 'crsm[gym]'), of which {error.name!r} is missing; "
            "allowed: the other tasks without it"
        ) from error
