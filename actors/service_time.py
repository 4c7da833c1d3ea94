"""How long a search will take: learned from the searches that have been answered. Pure: no clock, no threads.

``seconds = overhead + steps · per_step + work · per_simulation``

``steps`` is the largest budget of the batch: all trees take a simulation together, and a step reads the weights once,
whatever the number of trees. ``work`` is the sum of the budgets over all trees. All three coefficients are ≥ 0.
"""

from __future__ import annotations

_DROP = 0.6
"""Share of its error that a search corrects which took far less than expected."""
_UNIT = 64.0
"""Simulations of a typical search: brings the three terms to one scale."""


class ServiceTime:
    """A linear model with a memory of some twenty searches. One thread owns it.

    An answer corrects the coefficients by the smallest change that explains a part of its error (normalised least mean
    squares): answers of one kind are followed like a running mean, answers of different kinds tell the three terms
    apart. Robust: a single search that took far longer than expected moves the estimate by a bounded factor; one that
    took far less corrects the greater part of it, for a planner that was held up says nothing of one that is not. A
    lasting change is followed in a few answers. Before the first answer every search is expected to take no time.
    """

    def __init__(self, rate: float = 0.2, outlier: float = 4.0) -> None:
        """
        Args:
            rate: share of its error that an answer corrects.
            outlier: an answer counts as at most this many times what was expected.
        """
        self._rate, self._outlier = rate, outlier
        self.answers = 0
        self.deviation = 0.0
        """Running mean of the absolute error in seconds."""
        self._overhead = self._per_step = self._per_work = 0.0

    def observe(self, steps: int, work: int, seconds: float) -> None:
        """A search with these budgets took so long, from its start to its answer's arrival."""
        expected = self.mean(steps, work)
        if self.answers:
            seconds = min(seconds, self._outlier * max(expected, 1e-6))
        error = seconds - expected
        surprised = seconds < expected / self._outlier
        rate = 1.0 if not self.answers else max(_DROP, self._rate) if surprised else self._rate
        self._correct((1.0, steps / _UNIT, work / _UNIT), rate * error)
        if self.answers:
            # What a planner that was held up has left here is forgotten, not added to.
            self.deviation += rate * ((0.0 if surprised else abs(error)) - self.deviation)
        self.answers += 1

    def _correct(self, features: tuple[float, float, float], change: float) -> None:
        """Moves the estimate for these features by ``change``; what a coefficient at 0 cannot do the others do."""
        terms = [self._overhead, self._per_step, self._per_work]
        movable = [0, 1, 2]
        while movable and change:
            step = change / sum(features[i] ** 2 for i in movable)
            blocked = [i for i in movable if terms[i] + step * features[i] < 0]
            for i in blocked or movable:
                moved = max(-terms[i], step * features[i])
                terms[i] += moved
                change -= moved * features[i]
            movable = [i for i in movable if i not in blocked] if blocked else []
        self._overhead, self._per_step, self._per_work = (max(0.0, term) for term in terms)

    def mean(self, steps: int, work: int) -> float:
        """Seconds that such a search takes."""
        return self._overhead + steps / _UNIT * self._per_step + work / _UNIT * self._per_work

    def estimate(self, steps: int, work: int) -> float:
        """Seconds within which such a search is back, as a rule: the mean and once the deviation."""
        return self.mean(steps, work) + self.deviation

    def affordable(self, seconds: float, trees: int) -> float:
        """Simulations for each of this many trees so that the search is back within so many seconds."""
        slope = (self._per_step + trees * self._per_work) / _UNIT
        left = seconds - self._overhead - self.deviation
        if left < 0:
            return 0.0
        return left / slope if slope > 0 else float("inf")
