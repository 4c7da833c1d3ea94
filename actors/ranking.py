"""Which waiting requests go first: by value, with a fair share for every generation. Pure.

Generations take turns in virtual time (weighted fair queueing). A turn of a generation lasts ``1 / weight``, with

    weight = fairness + (1 − fairness) · value / mean of the generations' best values

and whoever's turn ends first goes first. Hence:

* a share ``fairness`` of the searches is given out equally, the rest by value; with equal values all get the same
  number of turns, within one;
* no generation that has a request waiting starves, whatever the values of the others: its turn lasts at most
  ``1 / fairness``. A turn that was not used since the request was shed is kept, so that a full waiting room cannot
  starve it either;
* a generation that has asked for nothing saves nothing up.

Within a generation the most valuable request goes first; of equals the newest, since a plan for the past is worthless.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Ask:
    """What scheduling has to know of a request."""

    ticket: int
    """Unique in the pool; later requests have higher ones."""
    generation: str = ""
    value: float = 0.0
    simulations: int = 64
    hypotheses: int = 1
    """Trees."""
    deadline: float | None = None
    """To be answered by then."""
    expires: float | None = None
    """Worthless after that."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A request's place in the order."""

    ask: Ask
    begins: float
    ends: float


class FairShare:
    """Whose turn it is. One thread owns it."""

    def __init__(self, fairness: float = 0.5) -> None:
        """
        Args:
            fairness: share of the searches that is given out equally; above 0.
        """
        if not 0 < fairness <= 1:
            raise ValueError(f"fairness = {fairness}; allowed: above 0, at most 1")
        self._fairness, self._now, self._weights = fairness, 0.0, 1.0
        self._begins: dict[str, float] = {}
        """When the turn of each generation began that has asked and has not been served since."""
        self._ended: dict[str, float] = {}
        """When the last turn of a generation ended, where that is in the future."""

    def order(self, asks: Iterable[Ask]) -> list[Turn]:
        """The requests, those that go first first. Nobody is served by this."""
        groups: dict[str, list[Ask]] = defaultdict(list)
        for ask in asks:
            groups[ask.generation].append(ask)
        if not groups:
            return []
        for group in groups.values():
            group.sort(key=lambda ask: (-ask.value, -ask.ticket))
        mean = sum(max(group[0].value, 0.0) for group in groups.values()) / len(groups)
        by_value = (1 - self._fairness) / mean if mean > _TINY else 0.0
        self._forget(groups)
        self._weights = sum(self._fairness + by_value * max(group[0].value, 0.0) for group in groups.values())
        turns = []
        for generation, group in groups.items():
            begins = self._begins.get(generation)
            if begins is None:
                begins = self._begins[generation] = max(self._now, self._ended.get(generation, 0.0))
            for ask in group:
                ends = begins + 1 / (self._fairness + by_value * max(ask.value, 0.0))
                turns.append(Turn(ask, begins, ends))
                begins = ends
        turns.sort(key=lambda turn: (turn.ends, turn.ask.ticket))
        return turns

    def serve(self, turns: Iterable[Turn]) -> None:
        """These were sent; in the order that :meth:`order` gave them."""
        for turn in turns:
            generation = turn.ask.generation
            # Virtual time passes whoever is served: else generations that come and go would always be ahead.
            self._now += 1 / self._weights
            self._begins.pop(generation, None)
            self._ended[generation] = max(turn.ends, self._ended.get(generation, 0.0))

    def _forget(self, waiting: dict[str, list[Ask]]) -> None:
        """Bounds the memory: generations end without a word."""
        if len(self._ended) > 2 * len(waiting) + 64:
            self._ended = {generation: ended for generation, ended in self._ended.items() if ended > self._now}
        if len(self._begins) > 2 * len(waiting) + 1024:
            self._begins = {generation: begins for generation, begins in self._begins.items() if generation in waiting}
