"""A histogram of durations in fixed memory: how long tokens took, to within 2 percent."""

from __future__ import annotations

import math

SMALLEST, LARGEST = 1e-6, 1e4
"""Seconds; what lies outside is counted at the end it lies beyond."""
_GROWTH = 1.02
_BUCKETS = math.ceil(math.log(LARGEST / SMALLEST) / math.log(_GROWTH)) + 1


class Histogram:
    """Durations in buckets, each 2 percent wider than the one before."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.total = 0.0
        self.longest = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        place = int(math.log(max(seconds, SMALLEST) / SMALLEST) / math.log(_GROWTH))
        self._counts[min(place, _BUCKETS - 1)] += times
        self.count += times
        self.total += seconds * times
        self.longest = max(self.longest, seconds)

    def percentile(self, share: float) -> float:
        """The upper edge of the bucket below which at least ``share`` of the durations lie; 0 without any."""
        need, seen = math.ceil(share * self.count - 1e-9), 0
        for place, count in enumerate(self._counts):
            seen += count
            if count and seen >= need:
                return min(SMALLEST * _GROWTH ** (place + 1), self.longest)
        return 0.0

    def summary(self) -> dict[str, float]:
        """Seconds: ``mean``, ``p50``, ``p99``, ``max``; and ``count``."""
        mean = self.total / self.count if self.count else 0.0
        return {
            "count": self.count,
            "mean": mean,
            "p50": self.percentile(0.5),
            "p99": self.percentile(0.99),
            "max": self.longest,
        }
