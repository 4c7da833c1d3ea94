"""Stands for Ray's metrics."""

from __future__ import annotations

from actors.metrics import METRICS


class Noted:
    """Takes the place of :class:`actors.metrics.Counts`."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], float] = {}
        self.gauges: dict[tuple[str, ...], float] = {}
        self.seen: list[tuple[str, float]] = []

    def add(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "counter" and set(tags) == set(METRICS[name].tags)
        key = (name, *tags.values())
        self.sums[key] = self.sums.get(key, 0) + value

    def set(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "gauge" and set(tags) == set(METRICS[name].tags)
        self.gauges[name, *tags.values()] = value

    def observe(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "histogram" and set(tags) == set(METRICS[name].tags)
        self.seen.append((name, value))
