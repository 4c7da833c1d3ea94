"""Real requests, waiting with a bound, and planners that stall."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from actors.planner import PlannerActor
from actors.pool import PlannerPool
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.planners import Arrivals
from crsm.types import Plan, PlanRequest, Token
from tests.fixtures import PROMPT, FakePlanners

WALL = EngineConfig(clock="wall")
PROMPTS = (PROMPT, (10, 21, 4, 8, 23, 7), (5, 9, 22, 7), (12, 13, 6, 25, 20))


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits for something that another process does; fails if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def generations(tokens: int = 12, **deliberation: object) -> list[GenerationRequest]:
    """Several generations with prompts of several lengths, one of them sampled."""
    settings = DeliberationConfig(**({"lag": 1, "injection_rate": 0.9} | deliberation))
    return [
        GenerationRequest(
            prompt, SamplingConfig(max_tokens=tokens, temperature=0.8 * (i == 2), seed=i), settings, 8, f"g{i}"
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def run(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, list[tuple[int, float]]]:
    """Tokens with their log-probabilities, which are equal only if the logits were."""
    said: dict[str, list[tuple[int, float]]] = {}
    token: Token
    for token in engine.generate(requests):
        said.setdefault(token.generation_id, []).append((token.token, token.logprob))
    return said


def make_requests(checkpoint: Checkpoint, count: int = 3) -> list[PlanRequest]:
    """Requests that an engine really made."""
    planners = FakePlanners(lambda request: None)
    Engine(checkpoint, planners).generate_all(generations(tokens=count // len(PROMPTS) + 4))
    return [replace(request, request_id=i) for i, request in enumerate(planners.requests[:count])]


def slow_planner_class() -> type[PlannerActor]:
    """Planners that never finish a search for a generation named ``slow``. Made inside a function, so that workers get
    its code with the actor and need not import this file."""

    class SlowPlanner(PlannerActor):
        def plan(self, requests: list[PlanRequest], sent_at: float) -> list[Plan]:
            import time

            if any(request.generation_id.startswith("slow") for request in requests):
                self._searching = True
                time.sleep(3600)
            return super().plan(requests, sent_at)

    return SlowPlanner


@contextmanager
def pool_of(checkpoint: Checkpoint, count: int = 1, **settings: Any) -> Iterator[PlannerPool]:
    """A pool whose planners are ready; afterwards their processes must be gone."""
    sizes = {name: settings.pop(name) for name in PlannersConfig.model_fields if name in settings and name != "count"}
    config = PlannersConfig(count=count, **({"max_batch": 2, "num_cpus": 0.5} | sizes))
    pool = PlannerPool(checkpoint, config, **({"shed": False} | settings))
    pids: tuple[int, ...] = ()
    try:
        assert pool.wait_until_ready() == count
        pids = pool.stats().pids
        yield pool
        pids += pool.stats().pids
    finally:
        pool.close()
    # A killed process is there until the raylet has taken note of it.
    until(lambda: not any(map(is_running, pids)), 15)


def collect(pool: PlannerPool, count: int) -> Arrivals:
    """Polls until this many requests are settled."""
    found = Arrivals()

    def enough() -> bool:
        arrived = pool.poll()
        found.add(arrived)
        return len(found.plans) + len(found.lost) + len(found.shed) >= count

    until(enough)
    return found
