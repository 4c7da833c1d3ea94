"""How fast something grows, whatever the outliers. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP = 0.2
"""Share of the time that does not count: caches fill, libraries are loaded."""


@dataclass(frozen=True, slots=True)
class Growth:
    """A line through samples."""

    level: float
    """Where the line begins, after the warm-up."""
    growth: float
    """Where it ends, less that; in the unit of the samples."""
    seconds: float
    """Time between the two."""
    samples: int

    @property
    def share(self) -> float:
        """Growth as a share of the level."""
        return self.growth / self.level if self.level else 0.0


def fit_growth(times: Sequence[float], values: Sequence[float], warm_up: float = WARM_UP) -> Growth | None:
    """The line of Theil and Sen: the median of the slopes of all pairs, so that up to 29 % of the samples may be
    anything; None: fewer than three samples are left after the warm-up.

    Raises:
        ValueError: the two differ in length, or times do not ascend.
    """
    if len(times) != len(values):
        raise ValueError(f"{len(times)} times and {len(values)} values; allowed: as many of each")
    if any(later <= earlier for earlier, later in itertools.pairwise(times)):
        raise ValueError("times do not ascend")
    if not times:
        return None
    begin = times[0] + warm_up * (times[-1] - times[0])
    points = [(time, value) for time, value in zip(times, values, strict=True) if time >= begin]
    if len(points) < 3:
        return None
    slope = statistics.median(
        (points[j][1] - points[i][1]) / (points[j][0] - points[i][0])
        for i in range(len(points))
        for j in range(i + 1, len(points))
    )
    origin = points[0][0]
    level = statistics.median(value - slope * (time - origin) for time, value in points)
    seconds = points[-1][0] - origin
    return Growth(level, slope * seconds, seconds, len(points))


def thin(times: Sequence[float], values: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """Evenly chosen samples, few enough for all their pairs."""
    step = max(1, -(-len(times) // most))
    return list(times[::step]), list(values[::step])
