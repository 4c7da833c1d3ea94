"""What a cluster running this counts, through Ray's metrics: Prometheus reads it at every node's metrics agent.

:data:`METRICS` is the one list of all names: those of serving, of generators and planners whoever uses them, of sweeps,
roll-outs and training. As Prometheus shows them: ``ray_`` before, ``_total`` behind counters. Every series has the tags
``application`` (of Serve, or what else is at work: ``generator``, the name of a sweep or of a training run),
``deployment`` and ``replica`` (empty outside of Serve).

Invariants:

* whatever happens often is a sum in memory; Ray hears of it once in an interval, but for latencies;
* counters of an engine and its planners are read every few seconds and handed on as differences, so that a generator
  that was started again (and counts from 0) takes nothing back;
* where there is no Ray, nothing is counted and nothing fails.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]

INTERVAL = 5.0
"""Seconds between two looks at the counters of a generator or a pool."""
PATIENCE = 1.0
"""Seconds that the last look has before it is given up."""
COMMON_TAGS = ("application", "deployment", "replica")
SHORT = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
LONG = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0]
HITS = ("on_time", "late", "shut", "superseded")
ANSWERS = ("in_time", "late", "shed", "stranded", "lost_with_planner", "refused", "undelivered")
"""Counters of :class:`~actors.pool_stats.PoolStats`: how requests were settled."""


@dataclass(frozen=True, slots=True)
class Metric:
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    boundaries: list[float] = field(default_factory=list)


METRICS: dict[str, Metric] = {
    # Serving
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
    # Wherever System 2 is at work
    "crsm_generator_tokens": Metric("counter", "Tokens that generators said."),
    "crsm_plan_requests": Metric("counter", "Plans that were asked for."),
    "crsm_plan_outcomes": Metric("counter", "What became of the plans.", ("reason",)),
    "crsm_plan_hit_rate": Metric("gauge", "Share of plans since the last look that were usable at their target."),
    "crsm_injections": Metric("counter", "Plans written, by the layer that they were written into.", ("layer",)),
    # Planner pools
    "crsm_planners_ready": Metric("gauge", "Planners at work."),
    "crsm_planners": Metric("gauge", "Planners by what they are doing.", ("phase",)),
    "crsm_planner_utilisation": Metric("gauge", "Share of their time that the ready planners spent searching."),
    "crsm_planner_answers": Metric("counter", "Requests by how the planners settled them.", ("answer",)),
    "crsm_planner_restarts": Metric("counter", "Planners started again after they had died."),
    # Sweeps, roll-outs and training
    "crsm_trials": Metric("counter", "Trials of sweeps and searches that ended.", ("finished",)),
    "crsm_trial_accuracy": Metric("gauge", "Right answers of the trial that ended last."),
    "crsm_rollouts": Metric("counter", "Answers rolled out for stage 3.", ("task", "system", "correct")),
    "crsm_train_step": Metric("gauge", "Steps of a training stage that are done.", ("stage",)),
    "crsm_train_loss": Metric("gauge", "Loss of a training stage.", ("stage",)),
    "crsm_train_learning_rate": Metric("gauge", "Learning rate of a training stage.", ("stage",)),
    "crsm_train_tokens_per_second": Metric("gauge", "Tokens that a training stage consumes per second.", ("stage",)),
}


class Counts:
    """The metrics by name, in a process that belongs to Ray."""

    def __init__(self, application: str, deployment: str = "", replica: str = "") -> None:
        self._common = dict(zip(COMMON_TAGS, (application, deployment, replica), strict=True))
        self._metrics: dict[str, Any] = {}

    def add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:
            self._metric(name).inc(value, tags=tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        self._metric(name).set(value, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._metric(name).observe(value, tags=tags)

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            from ray.util import metrics

            about = METRICS[name]
            kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
            options: dict[str, Any] = {"boundaries": about.boundaries} if about.kind == "histogram" else {}
            made = kinds[about.kind](name, about.description, tag_keys=(*COMMON_TAGS, *about.tags), **options)
            self._metrics[name] = made.set_default_tags(self._common)
        return self._metrics[name]


@dataclass(frozen=True, slots=True)
class Looked:
    """What happened between two looks at the counters of an engine and its planners."""

    tokens: int
    requests: int
    outcomes: dict[str, int]
    injections: dict[str, int]
    """By layer."""
    answers: dict[str, int]
    """Requests that the planners settled, by how."""
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
        after: an engine's ``PlanMetrics.summary()``, with ``pool``, the :class:`~actors.pool_stats.PoolStats` of its
            planners as a mapping; either may be missing.
        seconds: between the two.
    """
    if before is not None and after.get("tokens", 0) < before.get("tokens", 0):
        before = None
    old: Mapping[str, Any] = before or {}
    pool, old_pool = after.get("pool", {}), old.get("pool", {})
    outcomes = _differences(old, after, "outcomes")
    settled = sum(outcomes.values()) - outcomes.get("ended", 0)
    planners = dict(pool.get("planners", {}))
    ready = planners.get("ready", 0)
    searched = max(0, pool.get("batches", 0) - old_pool.get("batches", 0)) * pool.get("search_seconds", 0.0)
    return Looked(
        tokens=after.get("tokens", 0) - old.get("tokens", 0),
        requests=after.get("requests", 0) - old.get("requests", 0),
        outcomes=outcomes,
        injections=_differences(old, after, "injections_per_layer"),
        answers={name: more for name in ANSWERS if (more := pool.get(name, 0) - old_pool.get(name, 0)) > 0},
        restarts=max(0, pool.get("restarts", 0) - old_pool.get("restarts", 0)),
        hit_rate=sum(outcomes.get(reason, 0) for reason in HITS) / settled if settled else None,
        planners=planners,
        utilisation=min(1.0, searched / (seconds * ready)) if ready and seconds > 0 else 0.0,
    )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> dict[str, int]:
    old: Mapping[str, int] = before.get(name, {})
    return {key: count - old.get(key, 0) for key, count in after.get(name, {}).items() if count > old.get(key, 0)}


class GeneratorCounts:
    """Hands on the counters of an engine and its planners."""

    def __init__(self, counts: Counts, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts, self._clock = counts, clock
        self._before: Mapping[str, Any] | None = None
        self._looked_at = clock()
        self._phases: set[str] = set()

    def look(self, found: Mapping[str, Any]) -> None:
        """Takes note of what ``metrics()`` of a generator says now, or of a part of it (:func:`compare`)."""
        now = self._clock()
        looked = compare(self._before, found, now - self._looked_at)
        self._before, self._looked_at = found, now
        counts = self._counts
        if "tokens" in found:
            _hand_on(counts, looked)
        if "pool" not in found:
            return
        for answer, count in looked.answers.items():
            counts.add("crsm_planner_answers", count, answer=answer)
        counts.add("crsm_planner_restarts", looked.restarts)
        self._phases |= set(looked.planners)
        for phase in self._phases:
            counts.set("crsm_planners", looked.planners.get(phase, 0), phase=phase)
        counts.set("crsm_planners_ready", looked.planners.get("ready", 0))
        counts.set("crsm_planner_utilisation", looked.utilisation)

    def states(self, size: Mapping[str, int]) -> None:
        self._counts.set("crsm_states", size["count"])
        self._counts.set("crsm_state_bytes", size["bytes"])


def _hand_on(counts: Counts, looked: Looked) -> None:
    counts.add("crsm_generator_tokens", looked.tokens)
    counts.add("crsm_plan_requests", looked.requests)
    for reason, count in looked.outcomes.items():
        counts.add("crsm_plan_outcomes", count, reason=reason)
    for layer, count in looked.injections.items():
        counts.add("crsm_injections", count, layer=layer)
    if looked.hit_rate is not None:
        counts.set("crsm_plan_hit_rate", looked.hit_rate)


def hand_on_run(counts: Counts, summary: Mapping[str, Any]) -> None:
    """Takes note of an engine's whole life: its ``PlanMetrics.summary()``, when it has said its last token."""
    _hand_on(counts, compare(None, summary, 0.0))


@contextlib.contextmanager
def exported(look: Callable[[], None], interval: float = INTERVAL) -> Iterator[None]:
    """Calls ``look`` every so many seconds, and once more at the end, in a thread of its own."""
    ended = threading.Event()

    def run() -> None:
        last = False
        while not last:
            last = ended.wait(interval)
            with contextlib.suppress(Exception):  # what is looked at may be ending; figures are worth no failure
                look()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE)
