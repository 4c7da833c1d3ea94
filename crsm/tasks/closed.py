"""What the tasks of the closed vocabulary share: an answer of whole words, behind a preamble that gives time to think.

    KIND given / asked = preamble answer verdict

Every number, operator, cell and label is one word, and words are shared: a ``7`` is the same token as a node of a
graph, as a number of countdown and as a cell of a maze. The first word names the kind, so that a model that has learned
several need not guess; graphs come without one, as their form is told by the edges.
"""

from __future__ import annotations

from crsm.tasks.base import VERDICT_RIGHT, VERDICT_WRONG, Problem, Split, cut_special

PREAMBLE = ("the", "answer", "is", "as", "follows", "in", "order", ":")
"""Said before an answer that is not a path. No word twice: each is known from the one before."""
PATH_PREAMBLE = (
    *("the", "path", "from", "start", "to", "goal", "is", "as", "follows", "in", "order"),
    *("along", "given", "edges", "above", ":"),
)
"""Said before a path."""


class ClosedTask:
    """The part of a task that does not depend on its problems.

    Args:
        name: the task's name.
        weight: its share of the training mix.
        preamble: number of words before the answer.
        opening: the words that they are taken from.

    Raises:
        ValueError: the preamble is longer than there are words.
    """

    max_tokens: int | None = None
    has_attempts: bool = True

    def __init__(self, name: str, weight: float, preamble: int, opening: tuple[str, ...] = PREAMBLE) -> None:
        if preamble > len(opening):
            raise ValueError(f"{name}.preamble = {preamble}; allowed: 0 to {len(opening)} words")
        self.name = name
        self.weight = weight
        self.preamble = " ".join(opening[:preamble])
        self._preamble = list(opening[:preamble])
        self._opening = opening

    def size(self, split: Split) -> int | None:
        """No known end."""
        return None

    def decision_positions(self, problem: Problem) -> list[int]:
        """Indices among the solution's words at which a choice has to be made."""
        return [len(self._preamble) + index for index in problem.data["decisions"]]

    def _answer(self, words: list[str]) -> str:
        return " ".join([*self._preamble, *words])

    def _words_of(self, answer: str) -> list[str]:
        """The words of an answer without its preamble; what follows a verdict does not count."""
        words = cut_special(answer).split()
        for end, word in enumerate(words):
            if word in (VERDICT_RIGHT, VERDICT_WRONG):
                words = words[:end]
                break
        if words[: len(self._preamble)] == self._preamble:
            words = words[len(self._preamble) :]
        return words


def number_of(word: str) -> int | None:
    """The number that a word writes the way this project writes numbers; None: it is none."""
    # ASCII digits only: int() would also read other scripts' digits. The bound keeps arithmetic small.
    if len(word) > 6 or not (word.isascii() and word.isdecimal()) or (word[0] == "0" and word != "0"):
        return None
    return int(word)
