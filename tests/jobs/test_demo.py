"""Where the demo's planner runs."""

import contextlib

import pytest

from crsm.planners import InlinePlanners, ThreadPlanners
from crsm.reasoning import Deliberator
from jobs import demo
from tests.fixtures import tiny_checkpoint


def test_a_ray_that_cannot_start_leaves_a_planner_in_a_thread_and_says_why(monkeypatch, capsys):
    @contextlib.contextmanager
    def broken(checkpoint):
        raise RuntimeError("no port is free")
        yield

    monkeypatch.setattr(demo, "planner_actors", broken)
    with demo.demo_planners(tiny_checkpoint(), use_actors=True) as (planners, kind):
        assert kind == "threads"
        assert isinstance(planners, ThreadPlanners)
    assert "Ray could not start (no port is free): the planner runs in a thread" in capsys.readouterr().err


def test_an_error_of_the_demo_itself_is_not_taken_for_rays(monkeypatch):
    checkpoint = tiny_checkpoint()

    @contextlib.contextmanager
    def working(checkpoint):
        yield InlinePlanners(Deliberator.from_checkpoint(checkpoint))

    monkeypatch.setattr(demo, "planner_actors", working)
    with pytest.raises(RuntimeError, match="its own"), demo.demo_planners(checkpoint, use_actors=True) as (_, kind):
        assert kind == "actors"
        raise RuntimeError("its own")
