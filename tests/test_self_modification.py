"""The model says what was written into its memory, and only if the gate lets it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from crsm.config import DeliberationConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.types import Plan, PlanRequest, Token
from tests.fixtures import FakePlanners
from tests.recall import END, KEYS, QUERY, plan_towards, states_before_the_query, texts, trained, with_keys

READ = KEYS[2]
TEXT = (READ, 16, 18, 17, 22, 20, 19, END)
"""What was read. The model goes on with the query, at position 8, and then with its answer."""


def answer(plan: Plan | None, rate: float = 1.0) -> Token:
    """What is said right after the query, if ``plan`` is written just before the query is consumed."""

    def plans(request: PlanRequest) -> list[Plan]:
        address = {name: getattr(request, name) for name in ("request_id", "generation_id", "position", "target")}
        return [] if plan is None else [dataclasses.replace(plan, **address)]

    engine = Engine(trained(), FakePlanners(plans))
    request = GenerationRequest(
        TEXT, SamplingConfig(max_tokens=2), DeliberationConfig(lag=0, injection_rate=rate), simulations=1
    )
    query, told = engine.generate([request])
    assert query.token == QUERY
    return told


def plan_saying(key: int) -> Plan:
    """The write that turns the memory of ``TEXT`` into that of the same text begun with ``key``."""
    checkpoint = trained()
    text_BT = torch.tensor([[*TEXT, QUERY]])
    other_BT = with_keys(text_BT, torch.tensor([key]))
    memory, other = (states_before_the_query(checkpoint, text) for text in (text_BT, other_BT))
    return plan_towards(checkpoint, memory, other, position=len(TEXT))


def test_without_a_delta_the_answer_is_what_was_read() -> None:
    told = answer(None)
    assert told.token == READ and told.logprob > np.log(0.9)
    text_BT, key_B = texts(np.random.default_rng(9), 200)
    with torch.inference_mode():
        said_B = trained().model.prefill(text_BT)[0].argmax(dim=-1)
    assert (said_B == key_B).float().mean() > 0.95


@pytest.mark.parametrize("key", [key for key in KEYS if key != READ])
def test_a_delta_decides_what_is_said(key: int) -> None:
    """The same text, the same question; the answer is the key that was written, whichever it is."""
    told = answer(plan_saying(key))
    assert told.token == key and told.logprob > np.log(0.5)
    assert told.injection is not None and told.injection.position == len(TEXT)


def test_a_delta_behind_a_gate_of_zero_changes_no_bit() -> None:
    silent, plan = answer(None), plan_saying(KEYS[0])
    shut = dataclasses.replace(plan, confidence_L=np.zeros_like(plan.confidence_L))
    for told in (answer(shut), answer(plan, rate=0.0)):
        assert (told.token, told.logprob) == (silent.token, silent.logprob)
    assert answer(plan, rate=0.01).logprob != silent.logprob


def test_the_wider_the_gate_the_more_often_the_delta_is_heard() -> None:
    others = [key for key in KEYS if key != READ]
    heard = [sum(answer(plan_saying(key), rate=rate).token == key for key in others) for rate in (0.0, 0.1, 0.5, 1.0)]
    assert heard[:2] == [0, 0] and heard == sorted(heard) and heard[-1] == len(others)
