"""What a replica counts, through Ray's metrics: Prometheus reads it at every node's metrics agent.

Invariants:

* whatever happens for every chunk is a sum in memory; Ray hears of it once in an interval, but for latencies;
* the generator's counters are read every few seconds and handed on as differences, so that a generator that was
  started again (and counts from 0) takes nothing back.

Names as Prometheus shows them: ``ray_`` before those in :data:`METRICS`, ``_total`` behind counters. Every series has
Serve's own tags ``application``, ``deployment`` and ``replica``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ray.serve import metrics

Kind = Literal["counter", "gauge", "histogram"]

SHORT = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
LONG = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0]
OBSERVATION_INTERVAL = 0.02
"""Seconds between two times between tokens that are handed on: each costs more than what it is about."""
HITS = ("on_time", "late", "shut", "superseded")


@dataclass(frozen=True, slots=True)
class Metric:
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    boundaries: list[float] = field(default_factory=list)


METRICS: dict[str, Metric] = {
    "crsm_requests": Metric("counter", "Requests answered.", ("path", "status")),
    "crsm_request_seconds": Metric("histogram", "From a request to the end of its answer.", ("path",), LONG),
    "crsm_first_token_seconds": Metric("histogram", "From a request to the first token of a choice.", (), SHORT),
    "crsm_inter_token_seconds": Metric(
        "histogram", "Between two tokens of a choice in its stream; a sample.", (), SHORT
    ),
    "crsm_tokens": Metric("counter", "Tokens handed out."),
    "crsm_generations_running": Metric("gauge", "Generations that have said a token."),
    "crsm_generations_waiting": Metric("gauge", "Generations that have not said a token yet."),
    "crsm_states": Metric("gauge", "States that are kept."),
    "crsm_state_bytes": Metric("gauge", "Bytes of the states that are kept."),
    "crsm_generator_tokens": Metric("counter", "Tokens that the generator said."),
    "crsm_plan_requests": Metric("counter", "Plans that were asked for."),
    "crsm_plan_outcomes": Metric("counter", "What became of the plans.", ("reason",)),
    "crsm_plan_hit_rate": Metric("gauge", "Share of plans since the last look that were usable at their target."),
    "crsm_injections": Metric("counter", "Plans written, by the layer that they were written into.", ("layer",)),
    "crsm_planners_ready": Metric("gauge", "Planners at work."),
    "crsm_planners": Metric("gauge", "Planners by what they are doing.", ("phase",)),
    "crsm_planner_utilisation": Metric("gauge", "Share of their time that the ready planners spent searching."),
    "crsm_planner_restarts": Metric("counter", "Planners started again after they had died."),
}


class Counts:
    """The metrics by name."""

    def __init__(self) -> None:
        kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge}
        self._metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                self._metrics[name] = metrics.Histogram(
                    name, metric.description, boundaries=metric.boundaries, tag_keys=metric.tags
                )
            else:
                self._metrics[name] = kinds[metric.kind](name, metric.description, tag_keys=metric.tags)

    def add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:
            self._metrics[name].inc(value, tags=tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].set(value, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].observe(value, tags=tags)


class ServiceTelemetry:
    """Takes note of what the front does (:class:`actors.serving.telemetry.Telemetry`)."""

    def __init__(self, counts: Counts, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts, self._clock = counts, clock
        self._tokens = 0
        self._observe_at = clock()
        self._generations = (0, 0)

    def request(self, path: str, status: int, seconds: float) -> None:
        self._counts.add("crsm_requests", 1, path=path, status=str(status))
        self._counts.observe("crsm_request_seconds", seconds, path=path)

    def first_token(self, seconds: float) -> None:
        self._counts.observe("crsm_first_token_seconds", seconds)

    def tokens(self, count: int, seconds: float | None) -> None:
        self._tokens += count
        if seconds is not None and (now := self._clock()) >= self._observe_at:
            self._counts.observe("crsm_inter_token_seconds", seconds)
            self._observe_at = now + OBSERVATION_INTERVAL

    def generations(self, running: int, waiting: int) -> None:
        self._generations = (running, waiting)

    def flush(self) -> None:
        """Hands on what was summed up."""
        self._counts.add("crsm_tokens", self._tokens)
        self._tokens = 0
        running, waiting = self._generations
        self._counts.set("crsm_generations_running", running)
        self._counts.set("crsm_generations_waiting", waiting)


@dataclass(frozen=True, slots=True)
class Looked:
    """What happened between two looks at a generator's counters."""

    tokens: int
    requests: int
    outcomes: dict[str, int]
    injections: dict[str, int]
    """By layer."""
    restarts: int
    hit_rate: float | None
    """None: no plan was settled."""
    planners: dict[str, int]
    """By phase."""
    utilisation: float


def compare(before: Mapping[str, Any] | None, after: Mapping[str, Any], seconds: float) -> Looked:
    """The differences between two :meth:`~actors.generator.GeneratorActor.metrics`.

    Args:
        before: None: the generator has just begun. Counters that went down belong to one that was started again.
        seconds: between the two.
    """
    if before is not None and after["tokens"] < before["tokens"]:
        before = None
    pool, old_pool = after["pool"], before["pool"] if before else {}
    outcomes = _differences(before["outcomes"] if before else {}, after["outcomes"])
    settled = sum(outcomes.values()) - outcomes.get("ended", 0)
    ready = pool["planners"].get("ready", 0)
    searched = max(0, pool["batches"] - old_pool.get("batches", 0)) * pool["search_seconds"]
    return Looked(
        after["tokens"] - (before["tokens"] if before else 0),
        after["requests"] - (before["requests"] if before else 0),
        outcomes,
        _differences(before["injections_per_layer"] if before else {}, after["injections_per_layer"]),
        max(0, pool["restarts"] - old_pool.get("restarts", 0)),
        sum(outcomes.get(reason, 0) for reason in HITS) / settled if settled else None,
        dict(pool["planners"]),
        min(1.0, searched / (seconds * ready)) if ready and seconds > 0 else 0.0,
    )


def _differences(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


class GeneratorCounts:
    """Hands on a generator's counters."""

    def __init__(self, counts: Counts, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts, self._clock = counts, clock
        self._before: Mapping[str, Any] | None = None
        self._looked_at = clock()
        self._phases: set[str] = set()

    def look(self, found: Mapping[str, Any]) -> None:
        """Takes note of what a generator's ``metrics()`` says now."""
        now = self._clock()
        looked = compare(self._before, found, now - self._looked_at)
        self._before, self._looked_at = found, now
        counts = self._counts
        counts.add("crsm_generator_tokens", looked.tokens)
        counts.add("crsm_plan_requests", looked.requests)
        for reason, count in looked.outcomes.items():
            counts.add("crsm_plan_outcomes", count, reason=reason)
        for layer, count in looked.injections.items():
            counts.add("crsm_injections", count, layer=layer)
        counts.add("crsm_planner_restarts", looked.restarts)
        if looked.hit_rate is not None:
            counts.set("crsm_plan_hit_rate", looked.hit_rate)
        self._phases |= set(looked.planners)
        for phase in self._phases:
            counts.set("crsm_planners", looked.planners.get(phase, 0), phase=phase)
        counts.set("crsm_planners_ready", looked.planners.get("ready", 0))
        counts.set("crsm_planner_utilisation", looked.utilisation)

    def states(self, size: Mapping[str, int]) -> None:
        self._counts.set("crsm_states", size["count"])
        self._counts.set("crsm_state_bytes", size["bytes"])
