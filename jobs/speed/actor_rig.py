"""A generator actor under measurement: the same load with System 2 on and off, and what was seen while it ran."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.generator import start_generator, stop_generator
from actors.planner import PlannerActor
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.types import Plan, PlanRequest, Token
from jobs.speed.pinned_ray import pin

STALL_SECONDS = 10.0
STALLING = "stalled"
"""Generations of this name stall whoever plans for them."""


class StallingPlanner(PlannerActor):
    """Deliberates as ever, but sits for ten seconds on the requests of generations that are named so."""

    def plan(self, requests: list[PlanRequest], sent_at: float) -> list[Plan]:
        if any(request.generation_id.startswith(STALLING) for request in requests):
            time.sleep(STALL_SECONDS)
        return super().plan(requests, sent_at)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a generator."""

    prompts: Sequence[tuple[int, ...]]
    """One generation each, all at a time."""
    tokens: int
    """Said by each, whatever it says."""
    deliberation: DeliberationConfig
    simulations: int
    pace: float | None = None
    answers: bool = False
    """Each ends with its answer, after at most so many tokens; else with the last of exactly so many."""

    def requests(self, prefix: str) -> list[GenerationRequest]:
        sampling = SamplingConfig(max_tokens=self.tokens, ignore_eos=not self.answers)
        return [
            GenerationRequest(
                prompt, sampling, self.deliberation, self.simulations, f"{prefix}-{index}", pace=self.pace
            )
            for index, prompt in enumerate(self.prompts)
        ]


@dataclass(frozen=True, slots=True)
class Seen:
    """One run of a load."""

    seconds: float
    tokens: int
    p50: float
    """Seconds between two tokens of a generation, as the decode thread saw them."""
    p99: float
    deliberation: float
    """Seconds per token that the decode thread spent on requests and plans."""
    metrics: dict[str, Any]
    """Differences of counters over the run."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def plan_hit_rate(self) -> float:
        outcomes = self.metrics["outcomes"]
        settled = sum(outcomes.values()) - outcomes.get("ended", 0)
        hits = sum(outcomes.get(name, 0) for name in ("on_time", "late", "shut", "superseded"))
        return hits / settled if settled else 0.0


class Rig:
    """A generator on a core of its own."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planners: int,
        core: int | None,
        *,
        engine: EngineConfig = EngineConfig(clock="wall"),
        planner_class: type = StallingPlanner,
        threads: int = 1,
        gpus: float = 0.0,
        **options: Any,
    ) -> None:
        self._numbers = itertools.count()
        config = checkpoint.config.planners.model_copy(update={"count": planners, **options})
        self.generator = start_generator(
            checkpoint,
            PlannersConfig.model_validate(config.model_dump()),
            engine,
            planner_class=planner_class,
            planner_cpus=0.5,
            num_cpus=0.5,
            num_gpus=gpus,
            threads=threads,
        )
        self.pid = ray.get(self.generator.ping.remote())
        ready = ray.get(self.generator.wait_until_ready.remote(120.0))
        if ready < planners:
            raise RuntimeError(f"{ready} of {planners} planners came to work")
        if core is not None:
            pin(self.pid, [core])

    def run(self, load: Load, prefix: str = "run") -> Seen:
        """Says everything, read as one stream."""
        name = f"{prefix}-{next(self._numbers)}"
        before = self.metrics()
        ray.get(self.generator.forget_times.remote())
        left, said, ended = len(load.prompts), 0, 0.0
        started = time.perf_counter()
        for reference in self.generator.generate_many.remote(load.requests(name)):
            for token in ray.get(reference):
                assert isinstance(token, Token), token
                said += 1
                left -= token.finished
        ended = time.perf_counter()
        assert left == 0 and (load.answers or said == load.tokens * len(load.prompts)), "every token, once"
        after = self.metrics()
        times = after["times"]
        return Seen(
            ended - started,
            said,
            times["token"]["p50"],
            times["token"]["p99"],
            (times["deliberation"]) / said,
            {
                "outcomes": _difference(before["outcomes"], after["outcomes"]),
                **{name: after[name] - before[name] for name in ("requests", "injections", "tokens", "steps")},
            },
        )

    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = ray.get(self.generator.metrics.remote())
        return found

    def close(self) -> None:
        stop_generator(self.generator)


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
