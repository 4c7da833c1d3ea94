"""Steering a batch: what is in force where, how it is carried, and how it goes again."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crsm.injection import inject, outer_write, withdraw
from crsm.model import Checkpoint
from crsm.steering import NEVER, Steering, advance, concat_steering, no_steering, steer
from crsm.types import Injection, ModelState, Plan, concat_states
from tests.fixtures import PROMPT, a_request, assert_same_state, make_plan, norms, random_state, tiny_checkpoint

LAYERS = 2
TOKENS = (11, 20, 9, 28, 14, 7)


def injection_at(plan: Plan, position: int, *alpha: float) -> Injection:
    return Injection(plan, position, alpha or (0.5,) * LAYERS)


def consume(
    checkpoint: Checkpoint, state: ModelState, steering: Steering, token: int, remember: int = 8
) -> tuple[ModelState, Steering]:
    with torch.inference_mode():
        out = checkpoint.model.backbone.step(torch.full((state.batch_size,), token), state)
    return out.state, advance(steering, out.decay_LBH, remember)


def write_of(plan: Plan, layer: int, heads: int = 4) -> Tensor:
    return outer_write(torch.tensor(plan.write_u_LRE[layer])[None], torch.tensor(plan.write_b_LRN[layer])[None], heads)


def batch_of(*states: ModelState) -> ModelState:
    return concat_states(list(states))


def test_with_nothing_due_the_very_same_objects_come_back() -> None:
    checkpoint = tiny_checkpoint()
    state = random_state(checkpoint)
    steering = no_steering(state)
    assert steer(state, steering, {}, [6], [True]) == (state, steering)
    shut = injection_at(make_plan(a_request(), checkpoint), 6, 0.0, 0.0)
    assert steer(state, steering, {0: shut}, [6], [True]) == (state, steering)


def test_a_plan_is_written_into_its_row_and_its_layers_only() -> None:
    checkpoint = tiny_checkpoint()
    state = batch_of(random_state(checkpoint), random_state(checkpoint, TOKENS), random_state(checkpoint, (9, 9)))
    plan = make_plan(a_request(), checkpoint)
    new, steering = steer(state, no_steering(state), {1: injection_at(plan, 6, 0.0, 0.4)}, [6, 6, 6], [True] * 3)
    want = inject(state.layers[1].ssm_BHPN[1:2], write_of(plan, 1), torch.tensor([0.4]))
    assert torch.equal(new.layers[1].ssm_BHPN[1:2], want) and not torch.equal(want, state.layers[1].ssm_BHPN[1:2])
    assert torch.equal(new.layers[0].ssm_BHPN, state.layers[0].ssm_BHPN)
    for row in (0, 2):
        assert_same_state(new.rows(slice(row, row + 1)), state.rows(slice(row, row + 1)))
    assert torch.equal(steering.delta_LBHPN[1], new.layers[1].ssm_BHPN - state.layers[1].ssm_BHPN)
    assert not steering.delta_LBHPN[0].any()
    # The plan says two tokens, for positions 7 and 8: before 8 is consumed it is spent.
    assert steering.expires_B == (NEVER, 8, NEVER)


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(1, 5))
def test_a_late_write_is_carried_exactly(seed: int, late: int) -> None:
    """In layer 0 the state after a write that came ``late`` tokens late is that after the write on time, if α is the
    same and no clipping interferes: Mamba-2 has one decay per head and step."""
    checkpoint = _checkpoint()
    state = random_state(checkpoint)
    # Large beside what a few tokens add, so that the write goes on pointing inwards.
    state = state.with_ssm(tuple(20 * layer.ssm_BHPN for layer in state.layers))
    plan = _inward_plan(checkpoint, state, seed)
    on_time, steering = steer(state, no_steering(state), {0: injection_at(plan, 6)}, [6], [False])
    delayed, memory = state, no_steering(state)
    for token in TOKENS[:late]:
        on_time, steering = consume(checkpoint, on_time, steering, token)
        delayed, memory = consume(checkpoint, delayed, memory, token)
    before = delayed
    delayed, _ = steer(delayed, memory, {0: injection_at(plan, 6 + late)}, [6 + late], [False])
    moved = (delayed.layers[0].ssm_BHPN - before.layers[0].ssm_BHPN).norm()
    scale = delayed.layers[0].ssm_BHPN.abs().max()
    difference = (delayed.layers[0].ssm_BHPN - on_time.layers[0].ssm_BHPN).abs().max()
    assert difference < 1e-6 * scale and moved > 1e-2 * scale, (difference, moved, scale)


def _inward_plan(checkpoint: Checkpoint, state: ModelState, seed: int) -> Plan:
    """A write that shortens every head, now and later: nothing is clipped."""
    plan = make_plan(a_request(), checkpoint, seed=seed)
    rows = []
    for layer, b_RN in zip(state.layers, plan.write_b_LRN, strict=True):
        read_HP = layer.ssm_BHPN[0] @ torch.tensor(b_RN[0])
        rows.append((-0.5 * read_HP / float((b_RN[0] ** 2).sum())).flatten()[None].numpy())
    return dataclasses.replace(plan, write_u_LRE=np.stack(rows))


_CHECKPOINTS: list[Checkpoint] = []


def _checkpoint() -> Checkpoint:
    if not _CHECKPOINTS:
        _CHECKPOINTS.append(tiny_checkpoint())
    return _CHECKPOINTS[0]


def test_a_spent_write_leaves_at_its_end_and_in_the_first_layer_without_a_trace() -> None:
    checkpoint = tiny_checkpoint()
    state = plain = random_state(checkpoint)
    steering = no_steering(state)
    # Shortened heads cannot be given their norm back at once, but here they grow with what is consumed meanwhile.
    plan = _inward_plan(checkpoint, state, 0)
    state, steering = steer(state, steering, {0: injection_at(plan, 6, 0.01, 0.01)}, [6], [True])
    for token in TOKENS[:2]:
        state, steering = consume(checkpoint, state, steering, token)
        plain, _ = consume(checkpoint, plain, no_steering(plain), token)
    unspent, _ = steer(state, steering, {}, [7], [True])
    assert_same_state(unspent, state)
    clean, steering = steer(state, steering, {}, [8], [True])
    written = (state.layers[0].ssm_BHPN - plain.layers[0].ssm_BHPN).norm()
    left = (clean.layers[0].ssm_BHPN - plain.layers[0].ssm_BHPN).norm()
    # Cut to the norm before it, the direction is the plain one; along it a hair of the norm is missing.
    assert left < 1.0001 * written
    cosine = torch.cosine_similarity(clean.layers[0].ssm_BHPN.flatten(2), plain.layers[0].ssm_BHPN.flatten(2), dim=2)
    np.testing.assert_allclose(cosine, 1.0, atol=1e-6)
    assert steering.expires_B == (NEVER,) and not any(delta.any() for delta in steering.delta_LBHPN)
    again, _ = steer(clean, steering, {}, [9], [True])
    assert_same_state(again, clean)


def test_a_newer_plan_takes_the_older_write_out_first() -> None:
    checkpoint = tiny_checkpoint()
    state = random_state(checkpoint)
    older = make_plan(a_request(), checkpoint, seed=1, line=(20,) * 5)
    newer = make_plan(a_request(position=7), checkpoint, seed=2, line=(20,) * 5)
    written, steering = steer(state, no_steering(state), {0: injection_at(older, 6)}, [6], [True])
    deltas = steering.delta_LBHPN
    with torch.inference_mode():
        out = checkpoint.model.backbone.step(torch.tensor([11]), written)
    steering = advance(steering, out.decay_LBH, 0)
    assert steering.decays_WLBH == ()
    got, steering = steer(out.state, steering, {0: injection_at(newer, 7, 0.0, 0.5)}, [7], [True])
    for index, layer in enumerate(out.state.layers):
        rid = withdraw(layer.ssm_BHPN, deltas[index] * out.decay_LBH[index][..., None, None])
        want = inject(rid, write_of(newer, index), torch.tensor([0.5 * index]))
        assert torch.equal(got.layers[index].ssm_BHPN, want)
        assert torch.equal(steering.delta_LBHPN[index], want - rid)
    assert steering.expires_B == (7 + 5,)


def test_untracked_writes_are_left_to_fade() -> None:
    checkpoint = tiny_checkpoint()
    state = random_state(checkpoint)
    plan = make_plan(a_request(), checkpoint)
    written, steering = steer(state, no_steering(state), {0: injection_at(plan, 6)}, [6], [False])
    assert steering.expires_B == (NEVER,) and not any(delta.any() for delta in steering.delta_LBHPN)
    kept, _ = steer(written, steering, {}, [100], [False])
    assert_same_state(kept, written)


def test_rows_and_concat_move_everything_with_its_row() -> None:
    checkpoint = tiny_checkpoint()
    one, other = random_state(checkpoint), random_state(checkpoint, TOKENS)
    plans = [make_plan(a_request(), checkpoint, seed=seed) for seed in (1, 2)]
    parts = []
    for index, state in enumerate((one, other)):
        state, steering = steer(state, no_steering(state), {0: injection_at(plans[index], 6)}, [6], [True])
        for token in TOKENS[: 3 - index]:
            state, steering = consume(checkpoint, state, steering, token)
        parts.append(steering)
    joined = concat_steering(parts)
    assert len(joined.decays_WLBH) == 3 and joined.expires_B == (8, 8)
    for row, part in enumerate(parts):
        (back,) = (joined.rows(torch.tensor([row])),)
        assert back.expires_B == part.expires_B
        for mine, theirs in zip(back.delta_LBHPN, part.delta_LBHPN, strict=True):
            assert torch.equal(mine, theirs)
        for depth in range(1, len(part.decays_WLBH) + 1):
            for mine, theirs in zip(back.decays_WLBH[-depth], part.decays_WLBH[-depth], strict=True):
                assert torch.equal(mine, theirs)
    # The second joined later: nothing is carried away where it remembers nothing.
    assert all((decay == 1).all() for decay in joined.rows(torch.tensor([1])).decays_WLBH[0])
    swapped = joined.rows(torch.tensor([1, 0, 1]))
    assert torch.equal(swapped.delta_LBHPN[0][2], joined.delta_LBHPN[0][1])


def test_only_the_last_decays_are_remembered() -> None:
    checkpoint = tiny_checkpoint()
    state = random_state(checkpoint)
    steering = no_steering(state)
    seen = []
    for token in TOKENS:
        with torch.inference_mode():
            out = checkpoint.model.backbone.step(torch.tensor([token]), state)
        state, steering = out.state, advance(steering, out.decay_LBH, 3)
        seen.append(out.decay_LBH)
    assert len(steering.decays_WLBH) == 3
    for kept, wanted in zip(steering.decays_WLBH, seen[-3:], strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(kept, wanted, strict=True))


@settings(max_examples=15)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.01, 1.0, 1e4]), st.booleans()), min_size=1, max_size=6))
def test_steering_never_makes_a_norm_grow(schedule: list[tuple[float, float, bool]]) -> None:
    checkpoint = _checkpoint()
    state = batch_of(random_state(checkpoint, PROMPT), random_state(checkpoint, TOKENS))
    steering = no_steering(state)
    for step, (gate, scale, write) in enumerate(schedule):
        position = 6 + step
        plan = make_plan(a_request(position=position), checkpoint, scale=scale, seed=step)
        due = {step % 2: injection_at(plan, position, gate, gate)} if write else {}
        before = norms(state)
        state, steering = steer(state, steering, due, [position] * 2, [True, False])
        assert (norms(state) <= before * (1 + 2e-6)).all()
        state, steering = consume(checkpoint, state, steering, TOKENS[step])
