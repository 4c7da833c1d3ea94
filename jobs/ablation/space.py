"""The space of a sweep: which settings can be swept, their values, and the points of a grid or of a random draw.

Pure. A *point* is one value for every swept setting. Every value is checked by the setting that it is for, so that what
is allowed is said in one place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from crsm.config import Config, parse_config

Point = dict[str, Any]

PATHS: dict[str, str] = {
    "lag": "deliberation.lag",
    "injection_rate": "deliberation.injection_rate",
    "channel": "deliberation.channel",
    "hypotheses": "deliberation.hypotheses",
    "plan_every": "deliberation.plan_every",
    "plan_length": "deliberation.plan_length",
    "max_plans": "deliberation.max_plans",
    "simulations": "search.simulations",
    "search_policy": "search.policy",
    "max_depth": "search.max_depth",
    "uncertainty_penalty": "model.critic.uncertainty_penalty",
    "world_model": "model.world_model.kind",
}
"""Settings that can be swept, and where they stand."""
TRUST_HORIZON = "trust_horizon"
"""Of the checkpoint, not of its settings: imagined steps for which the world model is trusted; null: no cap."""
PLANNERS = "planners"
"""Of one answer, each busy with a plan for ``ablation.plan_tokens``; null: there is always one free."""
KEYS = (*PATHS, TRUST_HORIZON, PLANNERS)


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers between two ends, both included; whole ones if the ends are."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, rng: np.random.Generator) -> float:
        if self.whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(rng.uniform(low, high))
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.whole else value


Values = tuple[Any, ...] | Range
Space = dict[str, Values]


def parse_space(tree: Mapping[str, Any], settings: Config, *, ranges: bool) -> Space:
    """The space that the settings of a sweep describe.

    Args:
        tree: per key a list of values, or a range.
        settings: of the checkpoint with its changes; the values are checked in it.
        ranges: whether points are drawn; a grid needs lists.

    Raises:
        ValueError: naming the key, the value and what is allowed.
    """
    if not tree:
        raise ValueError(f"ablation.space is empty; allowed: at least one of {', '.join(KEYS)}")
    space: Space = {}
    for key, given in tree.items():
        where = f"ablation.space.{key}"
        if key not in KEYS:
            raise ValueError(f"ablation.space: unknown key {key!r}; allowed: {', '.join(KEYS)}")
        check = partial(_checked, key, settings=settings, where=where)
        space[key] = parse_values(given, where, check, ranges=ranges)
    return space


def _checked(key: str, value: Any, *, settings: Config, where: str) -> Any:
    """The value as its setting has it: 0.0 for a rate of 0."""
    config, horizon = apply_point({key: value}, settings, None, source=where)
    return value if key == PLANNERS else own_value(key, config, horizon)


def parse_values(given: Any, where: str, check: Callable[[Any], Any], *, ranges: bool) -> Values:
    """A list or a range of values.

    Args:
        given: what the settings say.
        where: their name there.
        check: gives a value as its setting has it, or raises.
        ranges: whether points are drawn.
    """
    if isinstance(given, Mapping):
        return _parse_range(given, where, check, ranges)
    return _parse_list(given, where, check)


def _parse_list(given: Any, where: str, check: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"{where} = {given!r}; allowed: a list of values, or {{low: , high: }} where points are drawn")
    values = [check(value) for value in given]
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{where}: {value!r} twice; allowed: each value once")
    return tuple(values)


def _parse_range(given: Mapping[str, Any], where: str, check: Callable[[Any], Any], ranges: bool) -> Range:
    if not ranges:
        raise ValueError(f"{where} = {dict(given)!r}; allowed: a list of values, or method: random or optuna")
    unknown = sorted(set(given) - {"low", "high", "log"})
    ends = [given.get("low"), given.get("high")]
    if unknown or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ValueError(f"{where} = {dict(given)!r}; allowed: numbers low and high, and log: true")
    if not isinstance(given.get("log", False), bool):
        raise ValueError(f"{where}.log = {given['log']!r}; allowed: true, false")
    low, high = map(check, ends)
    found = Range(low, high, given.get("log", False))
    if not -math.inf < found.low < found.high < math.inf or (found.log and found.low <= 0):
        above = "0 < low < high" if found.log else "low < high"
        raise ValueError(f"{where} = {dict(given)!r}; allowed: {above}")
    return found


def apply_point(
    point: Point, settings: Config, trust_horizon: int | None, source: str = "point"
) -> tuple[Config, int | None]:
    """Settings and trust horizon with a point's values in their places. How many planners there are stands in neither.

    Raises:
        ValueError: a value that its setting does not allow, in that setting's own words.
    """
    tree = settings.model_dump(mode="json")
    for key, value in point.items():
        if key in (TRUST_HORIZON, PLANNERS):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{source} = {value!r}; allowed: whole numbers from 1 on, or null")
            trust_horizon = value if key == TRUST_HORIZON else trust_horizon
            continue
        node = tree
        *parents, last = PATHS[key].split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return parse_config(tree, source), trust_horizon


def own_value(key: str, settings: Config, trust_horizon: int | None) -> Any:
    """What the checkpoint itself has where ``key`` is swept."""
    if key == TRUST_HORIZON:
        return trust_horizon
    if key == PLANNERS:
        return None
    node: Any = settings.model_dump(mode="json")
    for part in PATHS[key].split("."):
        node = node[part]
    return node


def corner(space: Space) -> Space:
    """Two values each of the first two settings, one of the others."""
    cut: Space = {}
    for index, (key, values) in enumerate(space.items()):
        cut[key] = values if isinstance(values, Range) else values[: 2 if index < 2 else 1]
    return cut


def grid(space: Space) -> list[Point]:
    """All combinations, the last key varying fastest."""
    lists = [values for values in space.values() if isinstance(values, tuple)]
    assert len(lists) == len(space), "a grid has no ranges"
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]


def draw(space: Space, count: int, seed: int) -> list[Point]:
    """``count`` points at random; those of a smaller count are the first ones of a larger."""
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(count):
        point = {}
        for key, values in space.items():
            point[key] = values.draw(rng) if isinstance(values, Range) else values[int(rng.integers(len(values)))]
        points.append(point)
    return points


def reference(space: Space, settings: Config, trust_horizon: int | None) -> Point:
    """The point of a grid where every setting is the checkpoint's own, or the nearest to it (of words, the first)."""
    found = {}
    for key, values in space.items():
        assert isinstance(values, tuple)
        own = own_value(key, settings, trust_horizon)
        if own in values:
            found[key] = own
            continue
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if numbers and isinstance(own, int | float):
            found[key] = min(numbers, key=lambda value: abs(value - own))
        else:
            found[key] = values[0]
    return found


def is_reference(point: Point, reference: Point) -> bool:
    """Whether a point is the reference but for its lag."""
    return all(value == reference[key] for key, value in point.items() if key != "lag")
