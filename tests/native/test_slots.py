"""The native slots step as the decoder does, and steer as PyTorch does, to rounding; no norm ever grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crsm import native
from crsm.mamba_ssm import Layer
from crsm.model import CRSM

if not native.available():
    pytest.skip(f"no native core: {native.MISSING}", allow_module_level=True)

from crsm.native.decoder import NativeDecoder
from crsm.slots import NativeSlots, Slots, make_slots
from crsm.steering import NEVER, advance, no_steering, steer
from crsm.types import Injection, ModelState, Plan
from tests.fixtures import assert_same_state, norms
from tests.native.test_decoder import LARGE, SHAPES, SMALL, random_model, random_tokens
from tests.test_slots import (
    CAPACITY,
    CHECKS,
    MakeSlots,
    Move,
    Values,
    assert_same,
    checkpoint,
    play,
    prefilled,
    scripts,
)


def native_slots(capacity: int) -> Slots:
    model = checkpoint().model
    slots = make_slots(model, NativeDecoder(model), capacity)
    assert isinstance(slots, NativeSlots)
    return slots


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_that_"))
def test_native_slots(check: Callable[[MakeSlots], None]) -> None:
    check(native_slots)


def assert_close(one: ModelState, other: ModelState) -> None:
    """To rounding, head by head."""
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        difference = (mine.ssm_BHPN - theirs.ssm_BHPN).flatten(2).norm(dim=2)
        assert (difference <= 1e-5 * theirs.ssm_BHPN.flatten(2).norm(dim=2)).all()


@settings(max_examples=60)
@given(scripts)
def test_a_step_has_the_decoders_bits_and_a_write_those_of_pytorch_to_rounding(script: list[Move]) -> None:
    decoder = NativeDecoder(checkpoint().model)

    def compare(slots: Slots, values: Values, named: Sequence[int]) -> None:
        for slot in named:
            found, want = slots.save(slot), values.held[slot]
            if slot not in values.changed:
                assert_same(found, want)
            assert_close(found[0], want[0])
            assert found[2].expires_B == want[2].expires_B
            for mine, theirs, layer in zip(found[2].delta_LBHPN, want[2].delta_LBHPN, want[0].layers, strict=True):
                assert (mine - theirs).abs().max() <= 1e-5 * layer.ssm_BHPN.norm()
            # They go on from the same bits.
            values.held[slot] = (found[0], found[1], dataclasses.replace(want[2], delta_LBHPN=found[2].delta_LBHPN))

    with torch.inference_mode():
        play(NativeSlots(decoder, CAPACITY), Values(checkpoint(), decoder), script, compare)


def random_plan(model: CRSM, seed: int, rank: int = 2, scale: float = 1.0) -> Plan:
    sizes, rng = model.config.model.backbone, np.random.default_rng(seed)
    nothing = np.zeros(sizes.n_layer, np.float32)
    return Plan(
        request_id=0,
        generation_id="g",
        position=6,
        target=6,
        assumed=(),
        line=(0,) * 3,
        value_root_L=nothing,
        value_plan_L=nothing,
        uncertainty=0.0,
        confidence_L=nothing,
        write_u_LRE=(scale * rng.normal(size=(sizes.n_layer, rank, sizes.d_inner))).astype(np.float32),
        write_b_LRN=rng.normal(size=(sizes.n_layer, rank, sizes.d_state)).astype(np.float32),
        policy_tokens_A=np.zeros(0, np.int64),
        policy_probs_A=np.zeros(0, np.float32),
    )


def consumed(model: CRSM, batch: int) -> tuple[Tensor, ModelState]:
    """Residual streams and states after a few tokens."""
    hidden_BTLD, state = model.backbone(random_tokens(model, batch, 5))
    return hidden_BTLD[:, -1], state


@pytest.mark.parametrize("sizes", [*SHAPES, LARGE], ids=lambda sizes: f"d{sizes['d_model']}")
@pytest.mark.parametrize("batch", [1, 3, 29])
def test_models_of_any_shape_are_steered_and_stepped(sizes: dict[str, Any], batch: int) -> None:
    model = random_model(**sizes)
    decoder = NativeDecoder(model, threads=2)
    slots = NativeSlots(decoder, 2 * batch)
    named = [2 * row + 1 for row in range(batch)][::-1]
    hidden_BLD, state = consumed(model, batch)
    slots.put(named, state, hidden_BLD)
    steering = no_steering(state)
    gates = tuple(0.3 + 0.7 * (layer % 2) for layer in range(len(state.layers)))
    for place in range(4):
        late = 1 if place == 2 else 0
        plans = (
            {}
            if place % 2
            else {row: Injection(random_plan(model, row + place), 6 + late, gates) for row in range(batch)}
        )
        positions, tracked = [6 + late if place % 2 == 0 else 20 * place] * batch, [True] * batch
        state, steering = steer(state, steering, plans, positions, tracked)
        slots.steer(named, plans, positions, tracked)
        for row, slot in enumerate(named):
            found, _, in_force = slots.save(slot)
            assert_close(found, state.rows(slice(row, row + 1)))
            assert in_force.expires_B == (steering.expires_B[row],)
        parts = [slots.save(slot)[0] for slot in named]
        state = ModelState(
            tuple(
                type(layer)(
                    *(torch.cat(tensors) for tensors in zip(*(part.layers[index] for part in parts), strict=True))
                )
                for index, layer in enumerate(state.layers)
            )
        )
        token_B = random_tokens(model, batch)
        logits_BV, out = decoder.step_logits(token_B, state)
        assert torch.equal(slots.step(token_B, named, 2), logits_BV)
        state, steering = out.state, advance(steering, out.decay_LBH, 2)
        for row, slot in enumerate(named):
            found, hidden_1LD, remembered = slots.save(slot)
            assert_same_state(found, state.rows(slice(row, row + 1)))
            assert torch.equal(hidden_1LD[0], out.hidden_BLD[row])
            for mine, theirs in zip(remembered.decays_WLBH[-1], out.decay_LBH, strict=True):
                assert torch.equal(mine[0], theirs[row])
    assert steering.expires_B == (NEVER,) * batch


def test_a_slots_token_has_the_same_bits_whoever_is_named_beside_it_and_on_any_number_of_threads() -> None:
    model = random_model(**SMALL)
    hidden_BLD, state = consumed(model, 64)
    token_B = random_tokens(model, 64)
    whole = NativeSlots(NativeDecoder(model, threads=1), 64)
    whole.put(range(64), state, hidden_BLD)
    logits_BV = whole.step(token_B, range(64), 3)
    for threads in (1, 2):
        slots = NativeSlots(NativeDecoder(model, threads=threads), 64)
        for rows in ([63], [5, 60], list(range(13)), list(range(62, 20, -1))):
            slots.put(range(64), state, hidden_BLD)
            assert torch.equal(slots.step(token_B[rows], rows, 3), logits_BV[rows])
            for row in rows:
                assert_same(slots.save(row), whole.save(row))


# Norms ---------------------------------------------------------------------------------------------------------------

factors = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e15, 1e19, 3e38])
attacks = st.lists(
    st.tuples(st.integers(0, 2**16), factors, factors, st.floats(0, 1), st.booleans(), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150)
@given(st.sampled_from([*SHAPES[:1], *SHAPES[3:]]), st.sampled_from([0.0, 1e-12, 1.0, 1e6]), st.integers(1, 3), attacks)
def test_no_heads_norm_ever_grows(
    sizes: dict[str, Any], size: float, rank: int, attacks: list[tuple[int, float, float, float, bool, bool]]
) -> None:
    """Through writes of any size, opposed ones whose sum is no number among them, and withdrawals, at rates up to 1."""
    model = _model(sizes)
    hidden_BLD, state = consumed(model, 1)
    state = state.with_ssm(tuple(size * layer.ssm_BHPN for layer in state.layers))
    slots = NativeSlots(NativeDecoder(model), 1)
    slots.put([0], state, hidden_BLD)
    first = before = norms(state)
    for position, (seed, u, b, gate, due, tracked) in enumerate(attacks):
        plan = random_plan(model, seed, rank)
        plan = dataclasses.replace(
            plan,
            target=position,
            write_u_LRE=_scaled(plan.write_u_LRE, u),
            write_b_LRN=_scaled(plan.write_b_LRN, b),
        )
        gates = (gate,) * len(state.layers)
        slots.steer([0], {0: Injection(plan, position, gates)} if due else {}, [position], [tracked])
        now = slots.save(0)[0]
        after = norms(now)
        assert torch.isfinite(after).all()
        assert (after <= before * (1 + 2e-6)).all() and (after <= first * (1 + 2e-6)).all()
        before = after


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """Times a factor, cut to what float32 holds."""
    largest = float(np.finfo(np.float32).max)
    return np.clip(array.astype(np.float64) * factor, -largest, largest).astype(np.float32)


_MODELS: dict[int, CRSM] = {}


def _model(sizes: dict[str, Any]) -> CRSM:
    return _MODELS.setdefault(sizes["d_model"], random_model(**sizes))


def test_no_norm_grows_over_a_thousand_writes_and_withdrawals() -> None:
    model = random_model(**SMALL)
    hidden_BLD, state = consumed(model, 1)
    slots = NativeSlots(NativeDecoder(model), 1)
    slots.put([0], state, hidden_BLD)
    before = norms(state)
    for position in range(1000):
        plan = dataclasses.replace(random_plan(model, position, scale=0.1), target=position)
        slots.steer([0], {0: Injection(plan, position, (1.0, 0.3, 0.01))}, [position], [position % 3 > 0])
    assert (norms(slots.save(0)[0]) <= before).all()


# The model changes, and refusals -------------------------------------------------------------------------------------


def test_changed_weights_are_noticed() -> None:
    model = random_model(**SMALL)
    decoder = NativeDecoder(model)
    slots = NativeSlots(decoder, 1)
    hidden_BLD, state = consumed(model, 1)
    token_B = random_tokens(model, 1)
    cast(Layer, model.backbone.layers[1]).mixer.in_proj.weight *= 0.5
    slots.put([0], state, hidden_BLD)
    assert torch.equal(slots.step(token_B, [0], 0), NativeDecoder(model).step_logits(token_B, state)[0])


def test_bad_input_is_refused_by_name_and_changes_nothing() -> None:
    slots = native_slots(3)
    state, hidden_BLD = prefilled(0, 2)
    slots.put([0, 2], state, hidden_BLD)
    before = [slots.save(slot) for slot in (0, 2)]
    plan = random_plan(checkpoint().model, 0, rank=1)
    long = dataclasses.replace(plan, write_u_LRE=np.zeros((2, 1, 33), np.float32))
    other = dataclasses.replace(plan, write_b_LRN=np.zeros((2, 2, 8), np.float32))
    token_B = torch.tensor([3, 4])
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: slots.step(token_B, [0, 3], 1), "slot 3; allowed: 0 to 2"),
        (lambda: slots.step(token_B, [-1, 0], 1), "slot -1; allowed: 0 to 2"),
        (lambda: slots.step(token_B, [2, 2], 1), "slots name 2 twice; allowed: each once"),
        (lambda: slots.step(token_B, [0], 1), "token_B has 2 entries; allowed: 1, one for each of slots"),
        (lambda: slots.step(token_B.int(), [0, 2], 1), "token_B: wrong dtype; allowed: int64"),
        (lambda: slots.step(torch.tensor([3, -4]), [0, 2], 1), r"token_B\[1\] = -4; allowed: 0 to"),
        (lambda: slots.step(token_B, [0, 2], -1), "remember = -1; allowed: at least 0"),
        (lambda: slots.steer([0, 0], {}, [1, 1], [True] * 2), "slots name 0 twice"),
        (lambda: slots.steer([0], {}, [1, 1], [True]), "positions has 2 entries; allowed: 1"),
        (lambda: slots.steer([0], {}, [1], []), "tracked has 0 entries; allowed: 1"),
        (
            lambda: slots.steer([0], {1: Injection(plan, 6, (1.0, 1.0))}, [6], [True]),
            "injections name index 1; allowed: an index into slots",
        ),
        (
            lambda: slots.steer([0], {0: Injection(long, 6, (1.0, 1.0))}, [6], [True]),
            r"write_u_LRE has shape \(2, 1, 33\); allowed: \(2, 1, 32\)",
        ),
        (
            lambda: slots.steer([0], {0: Injection(other, 6, (1.0, 1.0))}, [6], [True]),
            r"write_b_LRN has shape \(2, 2, 8\); allowed: \(2, 1, 8\)",
        ),
        (lambda: slots.steer([0], {0: Injection(plan, 6, (1.0,))}, [6], [True]), "alpha_L has 1 entries; allowed: 2"),
        (lambda: slots.put([0], state, hidden_BLD), r"conv_BCK has shape \(2, .*\); allowed: \(1, "),
        (lambda: slots.read([0], [2], False), "layer 2; allowed: 0 to 1"),
        (lambda: slots.save(5), "slot 5; allowed: 0 to 2"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for saved, slot in zip(before, (0, 2), strict=True):
        assert_same(slots.save(slot), saved)
    with pytest.raises(ValueError, match="head = False; allowed: logits of a decoder with a head"):
        NativeSlots(NativeDecoder(checkpoint().model.backbone), 1)
