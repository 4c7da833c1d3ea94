"""The pool on a local Ray under the wall clock: merged, ranked, shrunk and shed requests, frozen planners, scaling."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from actors.autoscaling import ScalingPolicy
from actors.fleet import RestartPolicy
from actors.planner import PlannerActor
from actors.pool import PlannerPool
from crsm.model import Checkpoint
from crsm.types import Plan, PlanRequest
from tests.actors.helpers import collect, is_running, make_requests, pool_of, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def held_planner_class(gate: Path) -> type[PlannerActor]:
    """Planners that search only once a file is there."""

    class HeldPlanner(PlannerActor):
        def plan(self, requests: list[PlanRequest], sent_at: float) -> list[Plan]:
            import time

            while not gate.exists():
                time.sleep(0.01)
            return super().plan(requests, sent_at)

    return HeldPlanner


def of_generations(requests: list[PlanRequest], **changes: Any) -> list[PlanRequest]:
    """Each of another generation, with nothing due."""
    return [
        dataclasses.replace(request, generation_id=f"g{i}", deadline=None, expires=None, **changes)
        for i, request in enumerate(requests)
    ]


def expect(pool: PlannerPool, seconds: float) -> None:
    """From now on the pool believes that a search of 64 simulations takes so long."""
    service = pool._state.service
    service._overhead, service._per_step, service._per_work, service.deviation = 0.0, 0.0, seconds, 0.0


def test_what_is_submitted_one_at_a_time_while_the_planner_is_busy_becomes_one_search(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    requests = of_generations(make_requests(checkpoint, 9))
    gate = tmp_path / "go"
    with pool_of(checkpoint, shed=True, max_in_flight=1, max_batch=16, planner_class=held_planner_class(gate)) as pool:
        pool.submit(requests[:1])
        until(lambda: pool.stats().in_flight == 1)
        for request in requests[1:]:
            pool.submit([request])
        assert pool.room() == 16 - 8
        until(lambda: pool.stats().waiting == 8)
        assert pool.room() == 16 - 8
        gate.touch()
        found = collect(pool, 9)
        assert found.plans[0].request_id == requests[0].request_id
        assert {plan.request_id for plan in found.plans} == {request.request_id for request in requests}
        stats = pool.stats()
        assert (stats.batches, stats.batched, stats.mean_batch, stats.shed) == (2, 9, 4.5, 0)
        assert stats.sent_bytes == sum(request.num_bytes for request in requests)
        assert stats.received_bytes == sum(plan.num_bytes for plan in found.plans)
        assert (stats.settled, stats.in_time, stats.in_time_rate) == (9, 9, 1.0) and stats.search_seconds > 0
        until(lambda: pool.room() == 16 + 16)


def test_the_most_valuable_goes_first_and_what_the_waiting_room_cannot_hold_is_shed(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    values = {1: 1.0, 2: 5.0, 3: 3.0, 4: 0.1}
    requests = of_generations(make_requests(checkpoint, 5))
    gate = tmp_path / "go"
    sizes: dict[str, Any] = {"max_in_flight": 1, "max_batch": 1, "max_waiting": 3}
    with pool_of(checkpoint, shed=True, planner_class=held_planner_class(gate), **sizes) as pool:
        pool.submit(requests[:1])
        until(lambda: pool.stats().in_flight == 1)
        pool.submit([dataclasses.replace(requests[i], value=value) for i, value in values.items()])
        until(lambda: pool.stats().shed == 1)
        assert pool.room() == 0
        gate.touch()
        found = collect(pool, 5)
        assert [plan.generation_id for plan in found.plans] == ["g0", "g2", "g3", "g1"]
        assert [request.generation_id for request in found.shed] == ["g4"] and not found.lost


def test_a_request_that_would_be_late_is_searched_for_less_long_and_a_hopeless_one_is_shed(
    checkpoint: Checkpoint,
) -> None:
    first, tight, hopeless, tried = of_generations(make_requests(checkpoint, 4), simulations=64)
    with pool_of(checkpoint, shed=True, max_batch=1, probe_interval=5.0) as pool:
        pool.submit([first])
        assert [plan.simulations for plan in collect(pool, 1).plans] == [64]
        expect(pool, 10.0)
        now = time.monotonic()
        pool.submit([dataclasses.replace(tight, deadline=now + 5.0, expires=now + 60.0)])
        # Five of ten seconds.
        assert [plan.simulations for plan in collect(pool, 1).plans] == [pytest.approx(31, abs=15)]
        assert pool.stats().shrunk == 1 and pool.stats().late == 0
        expect(pool, 1000.0)
        now = time.monotonic()
        pool.submit([dataclasses.replace(hopeless, deadline=now + 20.0, expires=now + 30.0)])
        assert [request.request_id for request in collect(pool, 1).shed] == [hopeless.request_id]
        assert pool.stats().shed == 1 and pool.stats().in_time_rate == pytest.approx(2 / 3)
        time.sleep(5.0)
        now = time.monotonic()
        pool.submit([dataclasses.replace(tried, deadline=now + 20.0, expires=now + 30.0)])
        assert [plan.simulations for plan in collect(pool, 1).plans] == [16] and pool.stats().probes == 1
        # Counters are published by the dispatcher a moment after the plan is.
        until(lambda: pool.stats().search_seconds == pytest.approx(250.0 * 0.4, rel=0.05))


def test_a_frozen_planner_is_replaced_and_costs_only_what_it_had(checkpoint: Checkpoint) -> None:
    requests = of_generations(make_requests(checkpoint, 8))
    health: dict[str, Any] = {"health_interval": 0.5, "health_timeout": 4.0, "max_batch": 1}
    with pool_of(checkpoint, count=2, shed=True, restart=RestartPolicy(first_delay=0.05), **health) as pool:
        pids = pool.stats().pids
        os.kill(pids[0], signal.SIGSTOP)
        try:
            pool.submit(requests[:2])
            found = collect(pool, 1)
            assert len(found.plans) == 1
            until(lambda: pool.stats().stalled_now == 1)
            for request in requests[2:]:  # all go to the one that is well
                pool.submit([request])
                assert [plan.request_id for plan in collect(pool, 1).plans] == [request.request_id]
            assert pool.stats().replaced == 0
            lost = collect(pool, 1).lost
            assert len(lost) == 1 and lost[0].request_id not in {plan.request_id for plan in found.plans}
            until(lambda: pool.stats().planners == {"ready": 2})
            until(lambda: not is_running(pids[0]), 15)
        finally:
            if is_running(pids[0]):
                os.kill(pids[0], signal.SIGKILL)
        stats = pool.stats()
        assert (stats.replaced, stats.restarts, stats.deaths, stats.lost_with_planner) == (1, 1, 0, 1)
        assert pids[0] not in stats.pids and pids[1] in stats.pids
        pool.submit(requests)
        assert len(collect(pool, 8).plans) + stats.shed >= 2


def test_planners_are_added_while_plans_are_late_and_removed_when_there_is_nothing_to_do(
    checkpoint: Checkpoint,
) -> None:
    requests = of_generations(make_requests(checkpoint, 4))
    policy = ScalingPolicy(1, 2, period=0.4, cool_down=1.0, min_settled=3)
    with pool_of(checkpoint, count=1, shed=True, max_batch=4, scaling=policy) as pool:
        first = pool.stats().pids
        asked = 0

        def is_larger() -> bool:
            nonlocal asked
            late = [
                dataclasses.replace(each, deadline=time.monotonic(), request_id=asked + each.request_id)
                for each in requests
            ]
            pool.submit(late)
            asked += len(late)
            collect(pool, len(late))
            return pool.stats().planners == {"ready": 2}

        until(is_larger)
        stats = pool.stats()
        assert stats.scaled_up == 1 and stats.late > 0 and stats.restarts == 0 and set(first) < set(stats.pids)
        until(lambda: pool.stats().planners == {"ready": 1, "parked": 1})
        assert pool.stats().pids == first and pool.stats().scaled_down == 1
        until(lambda: not any(is_running(pid) for pid in set(stats.pids) - set(first)), 15)
        assert pool.stats().deaths == 0 and pool.stats().last_error == ""
        pool.submit(requests)
        assert len(collect(pool, 4).plans) == 4
