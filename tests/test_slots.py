"""Slots are the pure functions of steering and decoding, with the values kept in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crsm.decoding import Decoder, TorchDecoder
from crsm.model import Checkpoint
from crsm.slots import Slots, TorchSlots
from crsm.steering import NEVER, Steering, advance, concat_steering, no_steering, steer
from crsm.types import Injection, ModelState, Plan, concat_states
from tests.fixtures import a_request, assert_same_state, make_plan, tiny_checkpoint

LAYERS = 2
CAPACITY = 4

checkpoint = functools.cache(tiny_checkpoint)


class Values:
    """What slots are to be: values by slot, the pure functions on batches of them."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder) -> None:
        self.checkpoint, self.decoder = checkpoint, decoder
        self.held: dict[int, tuple[ModelState, Tensor, Steering]] = {}
        self.changed: set[int] = set()
        """Slots whose SSM states the last steering changed."""

    def put(self, slots: Sequence[int], state: ModelState, hidden_BLD: Tensor) -> None:
        for row, slot in enumerate(slots):
            alone = state.rows(slice(row, row + 1))
            self.held[slot] = (alone, hidden_BLD[row : row + 1], no_steering(alone))

    def steer(
        self, slots: Sequence[int], injections: dict[int, Injection], positions: list[int], tracked: list[bool]
    ) -> None:
        before, steering = self.batch(slots)
        state, steering = steer(before, steering, injections, positions, tracked)
        self.changed = {
            slot
            for row, slot in enumerate(slots)
            if not all(
                torch.equal(one.ssm_BHPN[row], other.ssm_BHPN[row])
                for one, other in zip(before.layers, state.layers, strict=True)
            )
        }
        self.unbatch(slots, state, torch.cat([self.held[slot][1] for slot in slots]), steering)

    def step(self, token_B: Tensor, slots: Sequence[int], remember: int) -> Tensor:
        state, steering = self.batch(slots)
        out = self.decoder.step(token_B, state)
        self.unbatch(slots, out.state, out.hidden_BLD, advance(steering, out.decay_LBH, remember))
        return self.decoder.logits(out.hidden_BLD)

    def batch(self, slots: Sequence[int]) -> tuple[ModelState, Steering]:
        held = [self.held[slot] for slot in slots]
        return concat_states([state for state, _, _ in held]), concat_steering([steering for _, _, steering in held])

    def unbatch(self, slots: Sequence[int], state: ModelState, hidden_BLD: Tensor, steering: Steering) -> None:
        for row, slot in enumerate(slots):
            index = torch.tensor([row])
            self.held[slot] = (state.rows(index), hidden_BLD[index], steering.rows(index))


def assert_same(one: tuple[ModelState, Tensor, Steering], other: tuple[ModelState, Tensor, Steering]) -> None:
    """Bit for bit; decays that only one remembers are 1."""
    assert_same_state(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[2].expires_B == other[2].expires_B
    for mine, theirs in zip(one[2].delta_LBHPN, other[2].delta_LBHPN, strict=True):
        assert torch.equal(mine, theirs)
    for back in range(1, 1 + max(len(one[2].decays_WLBH), len(other[2].decays_WLBH))):
        for layer in range(len(one[0].layers)):
            mine, theirs = (
                steering.decays_WLBH[-back][layer]
                if back <= len(steering.decays_WLBH)
                else torch.ones_like(steering.delta_LBHPN[layer][:, :, 0, 0])
                for steering in (one[2], other[2])
            )
            assert torch.equal(mine, theirs)


def a_plan(seed: int, position: int, late: int = 0, **changes: Any) -> Plan:
    request = a_request(position=position - late)
    return make_plan(request, checkpoint(), seed=seed, **changes)


def prefilled(seed: int, batch: int = 1) -> tuple[ModelState, Tensor]:
    tokens = np.random.default_rng(seed).integers(0, 20, (batch, 5))
    with torch.inference_mode():
        _, hidden_BLD, state = checkpoint().model.prefill(torch.tensor(tokens))
    return state, hidden_BLD


@dataclasses.dataclass(frozen=True)
class Write:
    """A plan for one of the named slots."""

    alpha: tuple[float, ...]
    late: int
    scale: float
    length: int


@dataclasses.dataclass(frozen=True)
class Move:
    """What happens at one position: some generations join, some are steered, some say a token."""

    joins: tuple[int, ...]
    named: tuple[int, ...]
    writes: dict[int, Write]
    tracked: tuple[bool, ...]
    remember: int


slots_of = st.lists(st.integers(0, CAPACITY - 1), min_size=1, unique=True).map(tuple)
gates = st.sampled_from([0.0, 0.3, 1.0])
writes = st.builds(
    Write, st.tuples(gates, gates), st.integers(0, 3), st.sampled_from([0.1, 1.0, 1e20]), st.integers(1, 3)
)
moves = st.builds(
    Move,
    st.just(()) | slots_of,
    slots_of,
    st.dictionaries(st.integers(0, CAPACITY - 1), writes, max_size=2),
    st.tuples(*[st.booleans()] * CAPACITY),
    st.sampled_from([3, 3, 3, 0, 5]),
)
scripts = st.lists(moves, min_size=1, max_size=7)


def play(
    slots: Slots, values: Values, script: list[Move], compare: Callable[[Slots, Values, Sequence[int]], None]
) -> None:
    """The same script for both. ``compare`` is called after every steering, for the slots that were named."""
    for place, move in enumerate(script):
        joins = tuple(range(CAPACITY)) if place == 0 else move.joins
        if joins:
            state, hidden_BLD = prefilled(place, len(joins))
            slots.put(joins, state, hidden_BLD)
            values.put(joins, state, hidden_BLD)
        position = 20 + place
        injections, remembered = {}, max(len(values.held[slot][2].decays_WLBH) for slot in move.named)
        for row, write in move.writes.items():
            if row < len(move.named):
                late = min(write.late, remembered)
                plan = a_plan(row, position, late, scale=write.scale, line=(21,) * write.length)
                injections[row] = Injection(plan, position, write.alpha)
        arguments = (move.named, injections, [position] * len(move.named), list(move.tracked[: len(move.named)]))
        slots.steer(*arguments)
        values.steer(*arguments)
        compare(slots, values, move.named)
        token_B = torch.tensor([(3 * slot + place) % 20 for slot in move.named])
        with torch.inference_mode():
            assert torch.equal(
                slots.step(token_B, move.named, move.remember), values.step(token_B, move.named, move.remember)
            )
        for slot in range(CAPACITY):
            assert_same(slots.save(slot), values.held[slot])


@settings(max_examples=60)
@given(scripts)
def test_slots_are_the_pure_functions_in_place_bit_for_bit(script: list[Move]) -> None:
    decoder = TorchDecoder(checkpoint().model)

    def compare(slots: Slots, values: Values, named: Sequence[int]) -> None:
        for slot in named:
            assert_same(slots.save(slot), values.held[slot])

    with torch.inference_mode():
        play(TorchSlots(checkpoint().model, decoder, CAPACITY), Values(checkpoint(), decoder), script, compare)


MakeSlots = Callable[[int], Slots]


def torch_slots(capacity: int) -> Slots:
    model = checkpoint().model
    return TorchSlots(model, TorchDecoder(model), capacity)


def check_that_a_slot_comes_back_as_it_was_saved(make: MakeSlots) -> None:
    slots, other = make(3), make(2)
    slots.put([2, 0], *prefilled(0, 2))
    for place in range(3):
        plans = {0: Injection(a_plan(1, 6, line=(20,) * 8), 6, (0.5, 0.0))} if place == 1 else {}
        slots.steer([2], plans, [6 + place], [True])
        slots.step(torch.tensor([3, 4]), [0, 2], 2)
    saved = slots.save(2)
    assert len(saved[2].decays_WLBH) == 2 and saved[2].expires_B == (14,)
    assert saved[2].delta_LBHPN[0].any() and not saved[2].delta_LBHPN[1].any()
    other.restore(1, *saved)
    assert_same(other.save(1), saved)
    # Both go on as one, late plans included.
    for place in range(3):
        plans = {0: Injection(a_plan(2, 8), 10, (0.5, 0.5))} if place == 1 else {}
        logits = []
        for copy, slot in ((slots, 2), (other, 1)):
            copy.steer([slot], plans, [9 + place], [True])
            logits.append(copy.step(torch.tensor([5]), [slot], 2))
        assert torch.equal(*logits)
        assert_same(other.save(1), slots.save(2))
    # What was saved is a copy.
    assert_same(saved, saved)
    slots.put([2], *prefilled(5))
    slots.restore(2, *saved)
    assert_same(slots.save(2), saved)


def check_that_growing_keeps_what_slots_hold(make: MakeSlots) -> None:
    slots = make(2)
    slots.put([0, 1], *prefilled(0, 2))
    slots.steer([1], {0: Injection(a_plan(1, 6), 6, (0.5, 0.5))}, [6], [True])
    slots.step(torch.tensor([3, 4]), [0, 1], 2)
    before = [slots.save(slot) for slot in (0, 1)]
    slots.grow(5)
    assert slots.capacity == 5
    for slot, saved in enumerate(before):
        assert_same(slots.save(slot), saved)
    slots.put([4], *prefilled(3))
    slots.step(torch.tensor([3, 4]), [4, 1], 2)
    assert_same(slots.save(0), before[0])
    with pytest.raises(ValueError, match=r"capacity = 4; allowed: at least 5"):
        slots.grow(4)


def check_that_snapshots_are_copies_in_the_order_asked_for(make: MakeSlots) -> None:
    slots = make(4)
    state, hidden_BLD = prefilled(0, 3)
    slots.put([3, 0, 2], state, hidden_BLD)
    hidden, ssm, conv = slots.read([2, 3], [1], conv=True)
    index = torch.tensor([2, 0])
    assert torch.equal(hidden, hidden_BLD[index])
    assert torch.equal(ssm, state.layers[1].ssm_BHPN[index][:, None])
    assert conv is not None and torch.equal(conv, torch.stack([layer.conv_BCK[index] for layer in state.layers], dim=1))
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (hidden, ssm, conv))
    copies = hidden.clone(), ssm.clone()
    slots.step(torch.tensor([1, 2]), [2, 3], 0)
    assert torch.equal(hidden, copies[0]) and torch.equal(ssm, copies[1])
    assert slots.read([2], [0, 1], conv=False)[2] is None
    assert slots.read([2, 0], [1, 0], conv=False)[1].shape == (2, 2, 4, 8, 8)


def check_that_writes_in_bf16_are_widened(make: MakeSlots) -> None:
    slots = make(2)
    state, hidden_BLD = prefilled(0, 1)
    plan = a_plan(1, 6)
    bits = [(array.view(np.uint32) >> 16).astype(np.uint16) for array in (plan.write_u_LRE, plan.write_b_LRN)]
    rounded = [(half.astype(np.uint32) << 16).view(np.float32) for half in bits]
    for slot, arrays in enumerate((bits, rounded)):
        slots.put([slot], state, hidden_BLD)
        sent = dataclasses.replace(plan, write_u_LRE=arrays[0], write_b_LRN=arrays[1])
        slots.steer([slot], {0: Injection(sent, 6, (0.5, 0.5))}, [6], [True])
    assert_same(slots.save(0), slots.save(1))
    assert not torch.equal(slots.save(0)[0].layers[0].ssm_BHPN, state.layers[0].ssm_BHPN)


def check_that_a_slot_put_again_has_nothing_in_force(make: MakeSlots) -> None:
    slots = make(2)
    slots.put([0, 1], *prefilled(0, 2))
    slots.steer([0, 1], {i: Injection(a_plan(i, 6), 6, (0.5, 0.5)) for i in (0, 1)}, [6, 6], [True, True])
    slots.step(torch.tensor([3, 4]), [0, 1], 2)
    slots.free(0)
    fresh = prefilled(4, 1)
    slots.put([0], *fresh)
    state, hidden_BLD, steering = slots.save(0)
    assert_same_state(state, fresh[0])
    assert torch.equal(hidden_BLD, fresh[1])
    assert steering.expires_B == (NEVER,) and steering.decays_WLBH == ()
    assert not any(delta.any() for delta in steering.delta_LBHPN)
    slots.steer([0], {}, [1000], [True])
    assert_same_state(slots.save(0)[0], fresh[0])


def check_that_log_probs_are_those_of_the_logits(make: MakeSlots) -> None:
    slots = make(2)
    slots.put([0, 1], *prefilled(0, 2))
    held = [slots.save(slot) for slot in (0, 1)]
    logits_BV = slots.step([3, 4], [1, 0], 1)
    for slot in (0, 1):
        slots.restore(slot, *held[slot])
    log_probs_BV, likeliest = slots.step_log_probs(torch.tensor([3, 4]), [1, 0], 1)
    torch.testing.assert_close(log_probs_BV, logits_BV.log_softmax(dim=-1), rtol=1e-6, atol=1e-6)
    assert likeliest == logits_BV.argmax(dim=-1).tolist()


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_that_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_that_"))
def test_slots_in_torch(check: Callable[[MakeSlots], None]) -> None:
    check(torch_slots)


def test_bytes_per_slot_are_those_of_the_tensors() -> None:
    sizes = checkpoint().model.config.model.backbone
    slots = torch_slots(1)
    slots.put([0], *prefilled(0))
    for _ in range(3):
        slots.step(torch.tensor([3]), [0], 3)
    state, hidden_BLD, steering = slots.save(0)
    held = [*(tensor for layer in state.layers for tensor in layer), hidden_BLD, *steering.delta_LBHPN]
    held += [decay for layers in steering.decays_WLBH for decay in layers]
    assert Slots.bytes_per_slot(sizes, 3) == sum(4 * tensor.numel() for tensor in held)


def test_there_is_no_pool_without_slots() -> None:
    with pytest.raises(ValueError, match="capacity = 0; allowed: at least 1"):
        torch_slots(0)
