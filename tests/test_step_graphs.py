"""Steps that are recorded and replayed are those that are launched: buffers, the spare slot, when to record anew."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.decoding import TorchDecoder
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.placement import placed
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.slots import Slots, TorchSlots
from crsm.step_graphs import GraphedSlots, Work
from crsm.types import Injection, Token
from tests.fixtures import PROMPT, assert_same_state, tiny_checkpoint
from tests.second_device import DEVICE, second_device
from tests.test_slots import CAPACITY, a_plan, prefilled, scripts

checkpoint = functools.cache(tiny_checkpoint)


class Recorder:
    """What a CUDA graph does, on the CPU: the same work on the same memory, its results written over the old ones."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.recorded = self.replayed = 0
        self._fails_at = fails_at

    def __call__(self, work: Work) -> tuple[Callable[[], object], tuple[Tensor, Tensor]]:
        if self.recorded == self._fails_at:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.recorded += 1
        results = work()

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(results, work(), strict=True):
                old.copy_(new)

        return replay, results


def graphed(capacity: int, recorder: Recorder, of: Checkpoint | None = None) -> GraphedSlots:
    model = (of or checkpoint()).model
    return GraphedSlots(model, TorchDecoder(model), capacity, recorder)


def plain(capacity: int) -> TorchSlots:
    model = checkpoint().model
    return TorchSlots(model, TorchDecoder(model), capacity)


def assert_same_slot(one: Slots, other: Slots, slot: int) -> None:
    """States, residual streams, what is in force and its end, and remembered decays."""
    (state, hidden, steering), (state_2, hidden_2, steering_2) = one.save(slot), other.save(slot)
    for mine, theirs in zip(state.layers, state_2.layers, strict=True):
        torch.testing.assert_close(mine.ssm_BHPN, theirs.ssm_BHPN, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.conv_BCK, theirs.conv_BCK, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hidden, hidden_2, atol=1e-5, rtol=1e-4)
    assert steering.expires_B == steering_2.expires_B
    for mine, theirs in zip(steering.delta_LBHPN, steering_2.delta_LBHPN, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert len(steering.decays_WLBH) == len(steering_2.decays_WLBH)
    for layers, layers_2 in zip(steering.decays_WLBH, steering_2.decays_WLBH, strict=True):
        for mine, theirs in zip(layers, layers_2, strict=True):
            torch.testing.assert_close(mine, theirs)


@settings(max_examples=25)
@given(scripts)
def test_whatever_joins_is_steered_and_steps_the_slots_are_those_of_launched_steps(script: list[Any]) -> None:
    recorder = Recorder()
    one, other = graphed(CAPACITY, recorder), plain(CAPACITY)
    for place, move in enumerate(script):
        joins = tuple(range(CAPACITY)) if place == 0 else move.joins
        injections = {
            row: Injection(a_plan(row, 20 + place, line=(21,) * write.length), 20 + place, write.alpha)
            for row, write in move.writes.items()
            if row < len(move.named)
        }
        token_B = [(3 * slot + place) % 20 for slot in move.named]
        logits = []
        for slots in (one, other):
            if joins:
                slots.put(joins, *prefilled(place, len(joins)))
            slots.steer(move.named, injections, [20 + place] * len(move.named), list(move.tracked[: len(move.named)]))
            logits.append(slots.step(token_B, move.named, move.remember))
        torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
        for slot in range(CAPACITY):
            assert_same_slot(one, other, slot)
    assert recorder.replayed == len(script)


def test_a_graph_is_recorded_once_for_every_size_up_to_a_power_of_two() -> None:
    recorder = Recorder()
    slots = graphed(5, recorder)
    slots.put(range(5), *prefilled(0, 5))
    counts = []
    for named in ([0], [1], [0, 1], [2, 0, 4], [0, 1, 2, 3], [4, 3, 2, 1, 0], [3], [0, 2, 3]):
        slots.step([7] * len(named), named, 0)
        counts.append(recorder.recorded)
    assert counts == [1, 1, 2, 3, 3, 4, 4, 4]
    assert recorder.replayed == 8


def test_what_is_in_force_has_graphs_of_its_own() -> None:
    recorder = Recorder()
    slots = graphed(2, recorder)
    slots.put([0, 1], *prefilled(0, 2))
    slots.step([3], [0], 0)
    slots.steer([0], {0: Injection(a_plan(1, 6, line=(20,) * 8), 6, (0.5, 0.5))}, [6], [True])
    slots.step([3], [0], 0)
    assert recorder.recorded == 2
    slots.step([3], [1], 0)  # nothing in force there
    assert recorder.recorded == 2


def test_recording_changes_no_slot() -> None:
    slots = graphed(2, Recorder())
    slots.put([0, 1], *prefilled(0, 2))
    before = [slots.save(slot)[0] for slot in (0, 1)]
    with torch.inference_mode():
        slots._graph(2, carried=True)
    for slot in (0, 1):
        assert_same_state(slots.save(slot)[0], before[slot])


def test_the_spare_slot_is_nobodys() -> None:
    slots = graphed(2, Recorder())
    assert slots.capacity == 2
    slots.grow(3)
    assert slots.capacity == 3
    with pytest.raises(ValueError, match="capacity = 2; allowed: at least 3"):
        slots.grow(2)
    with pytest.raises(ValueError, match="capacity = 0; allowed: at least 1"):
        graphed(0, Recorder())


def test_more_slots_are_other_memory_and_are_recorded_anew() -> None:
    recorder = Recorder()
    one, other = graphed(2, recorder), plain(2)
    for slots in (one, other):
        slots.put([0, 1], *prefilled(0, 2))
        slots.step([3, 4], [0, 1], 2)
        slots.grow(4)
        slots.put([2], *prefilled(1))
        logits = slots.step([5, 6], [1, 2], 2)
    assert recorder.recorded == 2
    assert logits.shape[0] == 2
    for slot in range(3):
        assert_same_slot(one, other, slot)


def test_what_a_step_returned_outlives_the_next_one() -> None:
    slots = graphed(2, Recorder())
    slots.put([0, 1], *prefilled(0, 2))
    first = slots.step([3, 4], [0, 1], 0)
    kept = first.clone()
    slots.step([5, 6], [0, 1], 0)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_where_recording_fails_steps_are_launched_and_that_is_said_once(fails_at: int, caplog: Any) -> None:
    one, other = graphed(3, Recorder(fails_at)), plain(3)
    with caplog.at_level(logging.WARNING, "crsm.step_graphs"):
        for slots in (one, other):
            slots.put(range(3), *prefilled(0, 3))
            for named in ([0], [0, 1], [0, 1, 2], [1], [2, 0]):
                slots.step([7] * len(named), named, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "steps are not replayed as CUDA graphs: operation not permitted when stream is capturing"
    ]
    for slot in range(3):
        assert_same_slot(one, other, slot)


def run(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, recorder: Recorder | None) -> list[Token]:
    """System 2 at work, three generations that join and leave, one slot at first."""

    def make(model: Any, decoder: Any, capacity: int, graphs: bool = True) -> Slots:
        return TorchSlots(model, decoder, 1) if recorder is None else GraphedSlots(model, decoder, 1, recorder)

    monkeypatch.setattr("crsm.engine.make_slots", make)
    deliberator = Deliberator.from_checkpoint(checkpoint, engine="python")
    engine = Engine(checkpoint, InlinePlanners(deliberator), EngineConfig(decoder="torch"))
    settings = DeliberationConfig(lag=0, injection_rate=0.9, plan_every=2)
    requests = [
        GenerationRequest(PROMPT[cut:], SamplingConfig(max_tokens=6 + 3 * cut), settings, 8, str(cut))
        for cut in range(3)
    ]
    said = list(engine.generate(requests))
    assert engine.metrics.injections
    return said


@pytest.mark.parametrize("where", ["here", "there"])
def test_an_engine_on_graphs_says_the_same_with_its_plans(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run(checkpoint(), monkeypatch, None)
    with second_device():
        recorder = Recorder()
        found = run(placed(checkpoint(), DEVICE) if where == "there" else checkpoint(), monkeypatch, recorder)
    assert recorder.replayed and recorder.recorded < recorder.replayed
    assert [(t.generation_id, t.token) for t in found] == [(t.generation_id, t.token) for t in want]
    assert [t.logprob for t in found] == pytest.approx([t.logprob for t in want], abs=1e-4)
