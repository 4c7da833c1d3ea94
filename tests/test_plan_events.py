"""What a watched generation tells of its plans is what became of them, and watching changes nothing that is said."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from crsm.config import Channel, DeliberationConfig, EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.plan_events import PlanEvent
from crsm.planners import Arrivals, InlinePlanners
from crsm.reasoning import Deliberator
from crsm.search.sketch import nested
from crsm.types import Reason, Token
from tests.fixtures import PROMPT, FakePlanners, make_plan, tiny_checkpoint

CHECKPOINT = tiny_checkpoint()


def ask(name: str = "g", tokens: int = 12, **fields: Any) -> GenerationRequest:
    deliberation = DeliberationConfig(**({"lag": 1, "injection_rate": 0.9} | fields.pop("deliberation", {})))
    return GenerationRequest(PROMPT, SamplingConfig(max_tokens=tokens), deliberation, 8, name, **fields)


def system_2() -> InlinePlanners:
    return InlinePlanners(Deliberator.from_checkpoint(CHECKPOINT))


def run(engine: Engine, *requests: GenerationRequest) -> tuple[list[Token], list[PlanEvent]]:
    for request in requests:
        engine.submit(request)
    said: list[Token] = []
    events: list[PlanEvent] = []
    while engine.busy:
        said += engine.step()
        events += engine.take_events()
    return said, events


def test_every_request_is_told_once_and_ends_once_applied_or_with_a_reason() -> None:
    engine = Engine(CHECKPOINT, system_2())
    said, events = run(engine, ask(watch=True))
    asked = [event.request_id for event in events if event.kind == "request"]
    ended = [event for event in events if event.kind in ("inject", "reject")]
    assert len(asked) == engine.metrics.requests > 5
    assert sorted(event.request_id for event in ended) == sorted(asked)
    assert Counter(event.reason for event in ended) == engine.metrics.outcomes
    assert all(event.kind == "inject" for event in ended if event.reason in (Reason.ON_TIME, Reason.LATE))
    steered = {token.injection.position for token in said if token.injection is not None}
    assert {event.position for event in events if event.kind == "inject"} == steered != set()


def test_an_event_says_where_and_with_what() -> None:
    _, events = run(Engine(CHECKPOINT, system_2()), ask(watch=True, trees=True))
    first = events[0]
    assert (first.kind, first.position, first.target, first.lag) == ("request", len(PROMPT), len(PROMPT) + 1, 1)
    for event in events:
        assert event.generation_id == "g" and event.seconds >= 0
        assert (event.plan is not None) == (event.kind in ("plan", "inject"))
        assert (event.injection is not None) == (event.kind == "inject")
        if event.kind == "plan":
            assert event.plan is not None and event.plan.sketch_S6 is not None
            assert nested(event.plan.sketch_S6)["visits"] == event.plan.simulations + 1
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)


def test_trees_come_only_where_they_were_asked_for() -> None:
    _, events = run(Engine(CHECKPOINT, system_2()), ask(watch=True))
    assert all(event.plan.sketch_S6 is None for event in events if event.plan is not None)


def test_watching_one_of_two_tells_of_that_one_and_changes_no_token() -> None:
    said, events = run(Engine(CHECKPOINT, system_2()), ask("a", watch=True, trees=True), ask("b"))
    unwatched, nothing = run(Engine(CHECKPOINT, system_2()), ask("a"), ask("b"))
    assert {event.generation_id for event in events} == {"a"} and not nothing
    assert [token[:5] for token in said] == [token[:5] for token in unwatched]


def test_plans_that_are_lost_refused_or_made_for_another_text_are_told_as_such() -> None:
    # In turn: no answer, an outdated plan, one that assumed another token, one whose gates are shut.
    def answer(request: Any) -> Any:
        turn = (request.position - len(PROMPT)) % 4
        plan = make_plan(request, CHECKPOINT, assumed=(9,))
        return [None, [replace(plan, model_version=2)], [plan], [replace(plan, assumed=(9,))]][turn]

    engine = Engine(CHECKPOINT, FakePlanners(answer))
    _, events = run(engine, ask(watch=True))
    reasons = Counter(event.reason for event in events if event.kind == "reject")
    assert reasons == {reason: n for reason, n in engine.metrics.outcomes.items() if reason is not Reason.ON_TIME}
    assert reasons[Reason.LOST] >= 2 and reasons[Reason.OLD_VERSION] >= 2 and reasons[Reason.MISMATCH] >= 2


def test_a_plan_that_nobody_had_room_for_is_told_without_a_request() -> None:
    class NoRoom(FakePlanners):
        def room(self) -> int:
            return 0

    engine = Engine(CHECKPOINT, NoRoom(lambda request: []), EngineConfig(clock="wall"))
    _, events = run(engine, ask(watch=True))
    assert events and all((event.kind, event.request_id) == ("reject", -1) for event in events)
    assert {event.reason for event in events} == {Reason.DECLINED}
    assert len(events) == engine.metrics.outcomes[Reason.DECLINED]


@pytest.mark.parametrize("changes", [{"injection_rate": 0.0}, {"channel": Channel.OFF}])
def test_a_plan_in_time_that_writes_nothing_is_told_with_a_gate_of_nothing(changes: dict[str, Any]) -> None:
    said, events = run(Engine(CHECKPOINT, system_2()), ask(watch=True, deliberation=changes))
    applied = [event for event in events if event.kind == "inject"]
    assert applied and all(not any(event.injection.alpha_L) for event in applied if event.injection)
    assert all(token.injection is None for token in said)


def test_what_planners_said_a_while_ago_is_looked_up_before_they_are_asked() -> None:
    class ToldByPolling(FakePlanners):
        told = 0

        def room(self) -> int:
            return self.told

        def poll(self) -> Arrivals:
            self.told = 1
            return super().poll()

    engine = Engine(CHECKPOINT, ToldByPolling(lambda request: []), EngineConfig(clock="wall"))
    _, events = run(engine, ask(tokens=3, watch=True, deliberation={"lag": 0}))
    assert events[0].kind == "request" and engine.metrics.outcomes[Reason.DECLINED] == 0
