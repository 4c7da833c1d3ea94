"""The pool on a local Ray: the bits of planners in threads, and planners that stall, refuse, and are killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectStoreFullError, RayTaskError

from actors.fleet import Failure, RestartPolicy
from actors.news import classify
from actors.planner import PlannerActor, PlannerSettings
from actors.pool import PlannerPool
from crsm.config import EngineConfig, PlannersConfig
from crsm.engine import Engine
from crsm.model import Checkpoint
from crsm.planners import Arrivals, Planners, ThreadPlanners
from crsm.types import Plan, PlanRequest, Reason
from tests.actors.helpers import (
    WALL,
    collect,
    generations,
    make_requests,
    pool_of,
    run,
    slow_planner_class,
    until,
)
from tests.fixtures import tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

NEVER_RESTART = RestartPolicy(max_restarts=0)


def slow(request: PlanRequest, request_id: int) -> PlanRequest:
    return dataclasses.replace(request, generation_id="slow", request_id=request_id)


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "times"}


@pytest.mark.parametrize(("world_model", "lag", "count"), [("latent", 0, 2), ("exact", 2, 1)])
def test_virtual_clock_threads_and_actors_say_the_same_with_the_same_metrics(
    checkpoint: Checkpoint, world_model: Any, lag: int, count: int
) -> None:
    settings = PlannerSettings(world_model=world_model)

    def engine_with(planners: Planners | None) -> Engine:
        return Engine(checkpoint, planners, world_model=settings.planning_model(checkpoint))

    plain = run(engine_with(None), generations(lag=lag))
    threads = ThreadPlanners(settings.deliberator(checkpoint), count=2, max_batch=3)
    reference = engine_with(threads)
    expected = run(reference, generations(lag=lag))
    threads.close()
    with pool_of(checkpoint, count=count, max_batch=3, settings=settings) as pool:
        engine = engine_with(pool)
        assert run(engine, generations(lag=lag)) == expected != plain
        # The last answer may end before a plan that it no longer needs is back.
        until(lambda: pool.stats().in_flight == 0)
        stats = pool.stats()
    assert timeless(engine.metrics.summary()) == timeless(reference.metrics.summary())
    assert engine.metrics.injections > 0 and engine.metrics.outcomes[Reason.LOST] == 0
    assert stats.requests == engine.metrics.requests == stats.plans
    assert stats.planners == {"ready": count} and stats.last_error == ""


def test_a_planner_killed_in_mid_search_costs_its_plans_only_and_comes_back(checkpoint: Checkpoint) -> None:
    first, second, third = make_requests(checkpoint, 3)
    with pool_of(checkpoint, count=2, max_batch=1, planner_class=slow_planner_class()) as pool:
        before = pool.stats().pids
        pool.submit([slow(first, 10)])
        until(lambda: pool.stats().in_flight == 1)
        victim = _searching(pool)
        pool.submit([second])
        assert [plan.request_id for plan in pool.wait([second.request_id]).plans] == [second.request_id]
        os.kill(victim, signal.SIGKILL)
        lost = collect(pool, 1)
        assert [request.request_id for request in lost.lost] == [10] and not lost.plans
        pool.submit([third])  # the other planner is there already
        assert len(pool.wait([third.request_id]).plans) == 1
        until(lambda: pool.stats().planners == {"ready": 2})
        stats = pool.stats()
        assert (stats.deaths, stats.restarts, stats.lost_with_planner, stats.refused) == (1, 1, 1, 0)
        assert victim not in stats.pids and len(set(stats.pids) & set(before)) == 1
        assert "planner-0" in stats.last_error
        pool.submit([first, second, third])
        assert len(collect(pool, 3).plans) == 3


def _searching(pool: PlannerPool) -> int:
    """The process of the planner that has a search; the least loaded of equals is the first."""
    return pool.stats().pids[0]


def test_with_all_planners_killed_the_engine_goes_on_as_system_1(checkpoint: Checkpoint) -> None:
    expected = run(Engine(checkpoint), generations())
    with pool_of(checkpoint, count=2, restart=NEVER_RESTART) as pool:
        for pid in pool.stats().pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: pool.stats().planners == {"retired": 2})
        asked = 0
        for config in (EngineConfig(clock="virtual"), WALL):
            engine = Engine(checkpoint, pool, config)
            assert run(engine, generations()) == expected
            outcomes = engine.metrics.outcomes
            assert sum(outcomes.values()) == engine.metrics.requests > 0
            assert set(outcomes) <= {Reason.LOST, Reason.ENDED}
            assert outcomes[Reason.LOST] > 0 or config is WALL
            asked += engine.metrics.requests
            until(lambda asked=asked: pool.stats().stranded == asked)
            pool.poll()


def test_killed_in_the_middle_of_a_generation_the_rest_is_said(checkpoint: Checkpoint) -> None:
    with pool_of(checkpoint, count=1, restart=NEVER_RESTART) as pool:
        engine = Engine(checkpoint, pool)
        said = 0
        for _ in engine.generate(generations(tokens=24, lag=0)):
            said += 1
            if said == 20:
                for pid in pool.stats().pids:
                    os.kill(pid, signal.SIGKILL)
        assert said == 4 * 24
        assert engine.metrics.outcomes[Reason.LOST] > 0 and engine.metrics.outcomes[Reason.ON_TIME] > 0
        assert sum(engine.metrics.outcomes.values()) == engine.metrics.requests


def test_no_planners_at_all(checkpoint: Checkpoint) -> None:
    with pool_of(checkpoint, count=0) as pool:
        assert run(Engine(checkpoint, pool), generations()) == run(Engine(checkpoint), generations())
        assert pool.stats().planners == {}


def test_with_every_planner_stalled_decoding_goes_on_and_what_cannot_wait_is_shed(checkpoint: Checkpoint) -> None:
    """Counts steps, not seconds: had one step waited for a plan, it would wait for an hour."""
    slow_requests = [dataclasses.replace(request, generation_id="slow") for request in generations(tokens=40)[:1]]
    expected = run(Engine(checkpoint), slow_requests)
    with pool_of(checkpoint, count=1, max_batch=1, shed=True, planner_class=slow_planner_class()) as pool:
        engine = Engine(checkpoint, pool, WALL)
        assert run(engine, slow_requests) == expected
        asked = engine.metrics.requests - engine.metrics.outcomes[Reason.DECLINED]
        # What waits is shed when it expires.
        until(lambda: pool.stats().requests == asked and not pool.stats().waiting, 30)
        stats = pool.stats()
        # One is searched; a second one may have been sent before the first was seen to stall.
        assert stats.in_flight in (1, 2) and stats.plans == 0 and stats.shed == asked - stats.in_flight
        # The engine has heard of some of them; the news of the others is there.
        assert engine.metrics.outcomes[Reason.SHED] + len(pool.poll().shed) == stats.shed
    # Leaving the block closed the pool in mid-search, and its processes are gone.


def test_the_decode_thread_makes_no_ray_call(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(threading.current_thread().name)
            if threading.current_thread().name == "decode":
                raise AssertionError(f"{name} in the decode thread")
            return function(*arguments, **named)

        return call

    with pool_of(checkpoint, count=1) as pool:
        for name in ("get", "put", "wait", "kill", "cancel"):
            monkeypatch.setattr(ray, name, watched(name, getattr(ray, name)))
        handle = ray.actor.ActorHandle
        monkeypatch.setattr(handle, "_actor_method_call", watched("a call", handle._actor_method_call))
        asked = 0
        for config in (EngineConfig(clock="virtual"), WALL):
            engine = Engine(checkpoint, pool, config)
            said: list[Any] = []
            thread = threading.Thread(
                target=lambda engine=engine, said=said: said.append(run(engine, generations(lag=0))), name="decode"
            )
            thread.start()
            thread.join(60)
            assert [len(tokens) for tokens in said[0].values()] == [12] * 4
            assert engine.metrics.injections > 0 or config is WALL
            asked += engine.metrics.requests
            until(lambda asked=asked: pool.stats().plans == asked)
            pool.poll()
    assert set(calls) == {"planner-pool"}


def test_a_request_that_cannot_be_planned_is_no_fault_of_the_actor(checkpoint: Checkpoint) -> None:
    class Telling(PlannerActor):
        def plan(self, requests: list[PlanRequest], sent_at: float) -> list[Plan]:
            import torch

            try:
                return super().plan(requests, sent_at)
            except ValueError as error:
                raise ValueError(f"{torch.get_num_threads()} threads, {error}") from error

    good, bad = make_requests(checkpoint, 2)
    bad = dataclasses.replace(bad, token=10**6)
    with pool_of(checkpoint, count=1, max_batch=1, threads=2, planner_class=Telling) as pool:
        pids = pool.stats().pids
        pool.submit([bad, good])
        found = collect(pool, 2)
        assert [plan.request_id for plan in found.plans] == [good.request_id]
        assert [request.request_id for request in found.lost] == [bad.request_id]
        stats = pool.stats()
        assert (stats.refused, stats.deaths, stats.restarts) == (1, 0, 0) and stats.pids == pids
        # The search runs with the threads of the settings, in whatever thread Ray has it run.
        assert "ValueError: 2 threads, request" in stats.last_error and "token = 1000000" in stats.last_error


def test_new_weights_reach_every_planner_also_one_that_replaces_another(checkpoint: Checkpoint) -> None:
    requests = make_requests(checkpoint, 4)
    newer = dataclasses.replace(tiny_checkpoint(seed=11), model_version=4)
    with pool_of(checkpoint, count=2, max_batch=1) as pool:
        assert pool.stats().versions == (3, 3)
        pool.update_weights(newer)
        pool.submit(requests)
        plans = collect(pool, 4).plans
        assert {plan.model_version for plan in plans} == {4}
        assert {plan.planner_id for plan in plans} == {"planner-0", "planner-1"}
        until(lambda: pool.stats().versions == (4, 4))
        os.kill(pool.stats().pids[0], signal.SIGKILL)  # idle: nobody has asked it anything
        until(lambda: pool.stats().restarts == 1 and pool.stats().versions == (4, 4))
        assert pool.stats().lost_with_planner == 0


def test_a_planner_that_cannot_start_is_counted_and_nobody_waits_for_it(checkpoint: Checkpoint) -> None:
    class Unlucky(PlannerActor):
        def __init__(self, *arguments: Any) -> None:
            raise ValueError("no memory on this device")

    pool = PlannerPool(
        checkpoint, PlannersConfig(count=1), shed=False, restart=NEVER_RESTART, num_cpus=0.5, planner_class=Unlucky
    )
    requests = make_requests(checkpoint, 2)
    pool.submit(requests)
    assert pool.wait([request.request_id for request in requests]).lost == requests
    assert pool.wait_until_ready() == 0
    assert pool.stats().planners == {"retired": 1} and pool.stats().stranded == 2
    pool.close()


def test_closing_wakes_who_waits_and_afterwards_requests_are_lost_at_once(checkpoint: Checkpoint) -> None:
    first, second = make_requests(checkpoint, 2)
    with pool_of(checkpoint, count=1, planner_class=slow_planner_class()) as pool:
        pool.submit([slow(first, 5)])
        found: list[Arrivals] = []
        waiter = threading.Thread(target=lambda: found.append(pool.wait([5])))
        waiter.start()
        until(lambda: pool.stats().in_flight == 1)
    waiter.join(60)
    assert [lost.request_id for lost in found[0].lost] == [5]
    pool.submit([second])
    assert pool.wait([second.request_id]).lost == [second]
    pool.close()
    stats = pool.stats()
    assert (stats.pids, stats.in_flight, stats.planners) == ((), 0, {"retired": 1})


def test_a_bug_in_the_dispatcher_does_not_leave_the_engine_waiting(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(checkpoint, 2)
    with pool_of(checkpoint, count=1) as pool:

        def fail(*_: Any) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(pool, "_send", fail)
        for request in requests:
            pool.submit([request])
            assert pool.wait([request.request_id]).lost == [request]
        assert "a bug" in pool.stats().last_error


def test_errors_of_the_deliberation_of_the_actor_and_of_ray_are_kept_apart() -> None:
    refused = RayTaskError("plan", "traceback", ValueError("bad")).as_instanceof_cause()
    assert classify(refused) is Failure.PLANNER_ERROR
    assert classify(ActorDiedError()) is Failure.ACTOR_DIED
    assert classify(ActorUnavailableError("no connection", None)) is Failure.UNREACHABLE
    assert classify(ObjectStoreFullError("full")) is Failure.RESULT_LOST
