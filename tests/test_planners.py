"""Planners in threads: every request comes back exactly once, whatever happens to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from crsm.planners import Arrivals, ThreadPlanners, split_batch
from crsm.reasoning import Deliberator
from crsm.types import Plan, PlanRequest
from tests.fixtures import a_request, make_plan, tiny_checkpoint

CHECKPOINT = tiny_checkpoint()


def deliberator(answer: Callable[[Sequence[PlanRequest]], list[Plan]]) -> Deliberator:
    """A function in the place of a deliberator."""

    def deliberate(requests: Sequence[PlanRequest], should_stop: Callable[[], bool] | None = None) -> list[Plan]:
        return answer(requests)

    return cast(Deliberator, deliberate)


def plans_for(requests: Sequence[PlanRequest]) -> list[Plan]:
    return [make_plan(request, CHECKPOINT) for request in requests]


def requests_of(*ids: int) -> list[PlanRequest]:
    return [a_request(request_id=index) for index in ids]


@pytest.mark.parametrize("count", [1, 3])
def test_every_request_is_answered_once(count: int) -> None:
    planners = ThreadPlanners(deliberator(plans_for), count=count, max_batch=2)
    planners.submit(requests_of(0, 1, 2))
    planners.submit(requests_of(3, 4))
    arrivals = planners.wait({0, 1, 2, 3, 4})
    planners.close()
    assert sorted(plan.request_id for plan in arrivals.plans) == [0, 1, 2, 3, 4] and not arrivals.lost
    assert planners.poll() == Arrivals()


@pytest.mark.parametrize("error", [ValueError("bad"), KeyError("odd"), MemoryError(), RuntimeError("worse")])
def test_a_deliberation_that_fails_loses_its_batch_only_and_nobody_waits_for_ever(error: Exception) -> None:
    """Guarantee 6 in threads."""

    def fails_on_one(requests: Sequence[PlanRequest]) -> list[Plan]:
        if any(request.request_id == 1 for request in requests):
            raise error
        return plans_for(requests)

    planners = ThreadPlanners(deliberator(fails_on_one), max_batch=1)
    planners.submit(requests_of(0, 1, 2))
    arrivals = planners.wait({0, 1, 2})
    planners.close()
    assert [plan.request_id for plan in arrivals.plans] == [0, 2]
    assert [request.request_id for request in arrivals.lost] == [1]


def test_the_oldest_are_shed_when_all_are_busy_and_submitting_never_waits() -> None:
    busy, release = threading.Event(), threading.Event()

    def slow(requests: Sequence[PlanRequest]) -> list[Plan]:
        busy.set()
        release.wait(20)
        return plans_for(requests)

    planners = ThreadPlanners(deliberator(slow), max_batch=1, max_in_flight=2)
    planners.submit(requests_of(0))
    assert busy.wait(20)
    planners.submit(requests_of(1, 2, 3, 4))
    assert [request.request_id for request in planners.poll().shed] == [1, 2]
    release.set()
    arrivals = planners.wait({0, 3, 4})
    planners.close()
    assert [plan.request_id for plan in arrivals.plans] == [0, 3, 4]


def test_closing_stops_a_running_search_and_ends_the_threads() -> None:
    stopped = threading.Event()

    def deliberate(requests: Sequence[PlanRequest], should_stop: Callable[[], bool] | None = None) -> list[Plan]:
        assert should_stop is not None
        while not should_stop():
            stopped.wait(0.001)
        stopped.set()
        return []

    before = threading.active_count()
    planners = ThreadPlanners(cast(Deliberator, deliberate), count=2)
    planners.submit(requests_of(0))
    planners.close()
    assert stopped.is_set() and threading.active_count() == before


def test_batches_are_a_function_of_the_requests_alone() -> None:
    assert [[r.request_id for r in batch] for batch in split_batch(requests_of(0, 1, 2, 3, 4), 2)] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    assert split_batch([], 2) == []


def test_no_planner_threads_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"planners\.count = 0; allowed: at least 1"):
        ThreadPlanners(deliberator(plans_for), count=0)
