"""Events as JSON, of plans that planners really make and of plans that make no sense."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from actors.serving.event_json import EventJson
from actors.serving.generation_log import GenerationLog
from crsm.engine import Engine
from crsm.event_log import read_log
from crsm.generation import GenerationRequest
from crsm.plan_events import PlanEvent
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.search.consensus import consensus
from crsm.types import Injection, Reason, Token
from tests.fixtures import PROMPT, a_request, make_plan, tiny_checkpoint
from tests.serving.fakes import TOKENIZER, FakeBackend

CHECKPOINT = tiny_checkpoint()
SERVED = FakeBackend().model
NOTES = EventJson(SERVED)
PLAN = make_plan(a_request(lag=2), CHECKPOINT, line=(21, 22))


def an_event(kind: str, **changes: object) -> PlanEvent:
    return PlanEvent("g", kind, 0.25, 5, 7, 9, 2, **changes)  # type: ignore[arg-type]


def test_a_request_says_when_for_which_token_and_how_far_ahead() -> None:
    assert NOTES.event(an_event("request")) == {
        "type": "crsm.request",
        "t": 0.25,
        "request": 5,
        "position": 7,
        "target": 9,
        "lag": 2,
    }


def test_a_plan_says_its_value_its_gates_and_its_line_in_words() -> None:
    told = NOTES.event(an_event("plan", plan=PLAN))
    weights, penalty = (
        np.float32(SERVED.consensus_weights_L),
        np.float32(SERVED.config.model.critic.uncertainty_penalty),
    )
    assert told["value_planned"] == pytest.approx(float(consensus(PLAN.value_plan_L, weights, penalty)), abs=1e-6)
    assert told["line"] == TOKENIZER.decode([21, 22]) and told["line_tokens"] == [21, 22]
    assert told["gates"] == pytest.approx(PLAN.confidence_L.tolist(), abs=1e-6)
    assert [each["id"] for each in told["policy"]] == PLAN.policy_tokens_A.tolist()
    assert "tree" not in told


def test_an_injection_says_how_late_and_how_strong() -> None:
    injection = Injection(PLAN, PLAN.target + 1, (0.5, 0.25))
    told = NOTES.event(an_event("inject", plan=PLAN, injection=injection, reason=Reason.LATE))
    assert (told["type"], told["late"], told["reason"], told["alpha"]) == ("crsm.inject", 1, "late", [0.5, 0.25])
    note = NOTES.injection(Token("g", PLAN.target + 2, 21, -0.1, injection=injection))
    assert (note["position"], note["token"], note["late"], note["lag"]) == (
        PLAN.target + 1,
        21,
        1,
        PLAN.target - PLAN.position,
    )


def test_what_was_declined_before_it_was_a_request_has_no_number() -> None:
    told = NOTES.event(dataclasses.replace(an_event("reject", reason=Reason.DECLINED), request_id=-1))
    assert (told["type"], told["request"], told["reason"]) == ("crsm.reject", None, "declined")


def test_a_plan_that_makes_no_sense_is_still_json() -> None:
    plan = dataclasses.replace(
        PLAN,
        line=(10**6, -1, 21),
        uncertainty=math.nan,
        value_plan_L=np.full_like(PLAN.value_plan_L, np.inf),
        value_root_L=np.zeros(17, np.float32),
        confidence_L=np.full_like(PLAN.confidence_L, np.nan),
        policy_probs_A=np.full_like(PLAN.policy_probs_A, -np.inf),
        sketch_S6=np.full((3, 6), np.nan, np.float32),
    )
    told = json.loads(json.dumps(NOTES.event(an_event("plan", plan=plan)), allow_nan=False))
    assert told["value_now"] is None is told["value_planned"] and told["uncertainty"] is None
    assert told["line"] == f"\ufffd\ufffd{TOKENIZER.token(21)}"
    assert "tree" not in told


def test_events_of_a_real_generation_with_trees_and_its_log_can_be_replayed(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    engine = Engine(CHECKPOINT, InlinePlanners(Deliberator.from_checkpoint(CHECKPOINT)))
    request = GenerationRequest(
        PROMPT, CHECKPOINT.config.sampling, CHECKPOINT.config.deliberation, 8, "g", watch=True, trees=True
    )
    engine.submit(request)
    log, said, events = GenerationLog(request, SERVED), [], []
    while engine.busy:
        tokens = engine.step()
        for event in engine.take_events():
            events.append(NOTES.event(event))
            log.event(event)
        for token in tokens:
            said.append(token)
            log.token(token)
    plans = [event for event in events if event["type"] == "crsm.plan"]
    assert plans and {event["type"] for event in events} >= {"crsm.request", "crsm.plan", "crsm.inject"}
    for plan in plans:
        assert plan["tree"]["token"] is None and plan["tree"]["visits"] >= sum(
            child["visits"] for child in plan["tree"]["children"]
        )
        visits = [child["visits"] for child in plan["tree"]["children"]]
        assert visits == sorted(visits, reverse=True)
        assert plan["tree"]["children"][0]["text"] == TOKENIZER.token(plan["tree"]["children"][0]["token"])
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    file.write_text("\n".join(log.take()) + "\n")
    (logged,) = read_log(file)
    assert logged.tokens == [token.token for token in said]
    replayed = Engine(CHECKPOINT, injection_source=lambda _, position: logged.injections.get(position))
    (again,) = replayed.generate_all([GenerationRequest(logged.prompt, logged.sampling, logged.deliberation)])
    assert again == logged.tokens and set(logged.injections) == {
        token.injection.position for token in said if token.injection
    }
