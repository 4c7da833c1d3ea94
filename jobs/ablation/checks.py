"""What must hold in any table: a plan that writes nothing changes nothing, and a longer lag does not help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crsm.config import Config
from crsm.types import Channel
from jobs.ablation.space import Point, apply_point
from jobs.ablation.table import Pooled, paired_difference


def is_silent(point: Point, settings: Config) -> bool:
    """Whether plans cannot reach System 1 at this point: nothing is written, and nothing else is told."""
    asked = apply_point(point, settings, None)[0].deliberation
    return asked.channel is Channel.OFF or (asked.channel is Channel.STATE and asked.injection_rate == 0.0)


def silence(points: Sequence[Pooled], settings: Config) -> dict[str, Any]:
    """Where plans cannot reach System 1, its tokens and their log-probabilities are the same, bit for bit.

    Returns:
        ``points`` of this kind, ``problems`` there, ``identical`` (None without any), ``broken``: points that are not.
    """
    silent = [point for point in points if is_silent(point.point, settings)]
    broken = [point.point for point in silent if not point.tally.identical]
    return {
        "points": len(silent),
        "problems": sum(point.tally.problems for point in silent),
        "identical": not broken if silent else None,
        "broken": broken,
    }


def lag_trend(points: Sequence[Pooled]) -> dict[str, Any] | None:
    """Whether accuracy rises from a lag to a longer one by more than its interval, all other settings equal.

    It does where a lag's accuracy lies above the upper end of the 95 % interval of a shorter one, and the 95 % interval
    of their difference on the same problems above 0. (Near 1, one more right answer of 500 is above the interval.)

    Returns:
        None where the lag was not swept; else ``holds`` and, per group of equal other settings, the largest rise.
    """
    groups: dict[str, list[Pooled]] = {}
    for point in points:
        if "lag" not in point.point:
            return None
        others = {key: value for key, value in point.point.items() if key != "lag"}
        groups.setdefault(repr(sorted(others.items())), []).append(point)
    found = []
    for group in groups.values():
        group.sort(key=lambda point: point.point["lag"])
        pairs = []
        for index, shorter in enumerate(group):
            for longer in group[index + 1 :]:
                if longer.tally.problems == shorter.tally.problems:  # ASHA may have cut one of them short
                    rise, low, high = paired_difference(longer.tally.correct, shorter.tally.correct)
                    pairs.append(
                        {
                            "lags": [shorter.point["lag"], longer.point["lag"]],
                            "accuracies": [shorter.accuracy, longer.accuracy],
                            "above": longer.accuracy > shorter.interval[1] and low > 0,
                            "rise": rise,
                            "interval": [low, high],
                        }
                    )
        if pairs:
            largest = max(pairs, key=lambda pair: (pair["above"], pair["rise"]))
            others = {key: value for key, value in group[0].point.items() if key != "lag"}
            found.append({"settings": others, "holds": not largest["above"], "largest_rise": largest})
    return {"holds": all(group["holds"] for group in found), "groups": found}
