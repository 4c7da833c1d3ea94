"""Injection: no write, however hostile, makes a state grow; none at all leaves the very same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crsm.injection import carry, clip_to_norm, head_norms, inject, outer_write, withdraw

H, P, N = 2, 3, 4

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30, 3e38])
gates = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1, width=32))


def draw(seed: int, scale: float, batch: int = 2) -> Tensor:
    """Normal numbers times ``scale``, kept finite."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(batch, H, P, N)) * scale
    return torch.tensor(values.clip(-3.4e38, 3.4e38), dtype=torch.float32)


def norms_of(x_BHPN: Tensor) -> np.ndarray:
    """Exact enough to judge fp32."""
    return np.linalg.norm(x_BHPN.double().flatten(2).numpy(), axis=2)


def test_a_write_is_the_sum_of_its_outer_products() -> None:
    rng = np.random.default_rng(0)
    u, b = rng.normal(size=(2, 3, H * P)), rng.normal(size=(2, 3, N))
    got = outer_write(torch.tensor(u), torch.tensor(b), H)
    for row in range(2):
        want = np.sum([np.outer(u[row, rank], b[row, rank]) for rank in range(3)], axis=0)
        np.testing.assert_allclose(got[row].numpy(), want.reshape(H, P, N), rtol=1e-12)


def test_a_write_that_fits_the_ball_is_blended_in_by_alpha() -> None:
    state = draw(0, 1.0)
    write = -0.5 * state
    alpha = torch.tensor([0.3, 1.0])
    got = inject(state, write, alpha)
    np.testing.assert_allclose(got[0], (1 - 0.3 * 0.5) * state[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], 0.5 * state[1], rtol=1e-6)


def test_a_write_too_large_for_the_ball_keeps_its_direction() -> None:
    state, write = draw(0, 1.0), draw(1, 1e4)
    got = inject(state, write, torch.ones(2))
    want = (state + write).double()
    limit = norms_of(state)[..., None, None]
    np.testing.assert_allclose(got, want.numpy() / norms_of(want)[..., None, None] * limit, rtol=1e-4, atol=1e-6)


@given(seeds, scales, seeds, scales, gates)
@settings(max_examples=200)
def test_no_write_makes_a_heads_norm_grow(
    state_seed: int, state_scale: float, write_seed: int, write_scale: float, gate: float
) -> None:
    """Guarantee 2, for one injection: finite, and inside the ball of the norm before."""
    state = draw(state_seed, min(state_scale, 1e12))
    got = inject(state, draw(write_seed, write_scale), torch.tensor([gate, 1.0]))
    assert got.isfinite().all()
    # Squares of numbers under 1e-19 are 0 in fp32: norms that small cannot be told from 0.
    assert (norms_of(got) <= norms_of(state) * (1 + 1e-6) + 1e-18).all()


def test_a_write_whose_product_overflows_leaves_a_finite_state() -> None:
    """Both factors are finite numbers; what they make together is not."""
    state = draw(0, 1.0)
    write = outer_write(torch.full((2, 1, H * P), 1e30), torch.full((2, 1, N), 1e30), H)
    assert write.isinf().all()
    got = inject(state, write, torch.tensor([0.1, 1.0]))
    assert got.isfinite().all() and (norms_of(got) <= norms_of(state) * (1 + 1e-6)).all()


def test_products_that_cancel_beyond_all_numbers_leave_a_finite_state() -> None:
    """Two finite products of a write overflow with opposite signs: together they are no number."""
    state = draw(0, 1.0)
    u = torch.full((2, 2, H * P), 1e30)
    b = torch.stack([torch.full((2, N), 1e30), torch.full((2, N), -1e30)], dim=1)
    write = outer_write(u, b, H)
    assert write.isnan().all()
    got = inject(state, write, torch.tensor([0.1, 1.0]))
    assert got.isfinite().all() and (norms_of(got) <= norms_of(state) * (1 + 1e-6)).all()


@given(seeds, st.sampled_from([1e-12, 1.0, 1e12]), gates)
def test_no_write_leaves_the_same_bits(seed: int, scale: float, gate: float) -> None:
    """Injecting a state's own value is a no-op, whatever the gate."""
    state = draw(seed, scale)
    assert torch.equal(inject(state, torch.zeros_like(state), torch.tensor([gate, 1.0])), state)


@given(seeds, scales)
def test_a_shut_gate_leaves_the_same_bits(seed: int, scale: float) -> None:
    state, write = draw(seed, 1.0), draw(seed + 1, scale)
    got = inject(state, write, torch.tensor([0.0, 1.0]))
    assert torch.equal(got[0], state[0])
    assert scale < 1e-6 or not torch.equal(got[1], state[1])


def test_norms_never_grow_over_ten_thousand_injections() -> None:
    """Rounding must not add up either: as judged in fp64, step after step."""
    rng = np.random.default_rng(0)
    state = draw(0, 1.0)
    start = norms_of(state)
    for step in range(10_000):
        aligned = state * 100.0 if step % 3 == 0 else draw(int(rng.integers(2**32)), 10.0 ** int(rng.integers(-4, 5)))
        state = inject(state, aligned, torch.tensor([0.2, 1.0]))
    assert (norms_of(state) <= start * (1 + 1e-6)).all()
    assert (norms_of(state) > 0).any()


def test_withdrawing_right_after_injecting_restores_the_state_where_nothing_was_clipped() -> None:
    state = draw(0, 1.0)
    written = inject(state, draw(1, 3.0), torch.tensor([0.2, 0.5]))
    delta = written - state
    # A large entry that the withdrawal makes smaller leaves room for the others to grow without clipping.
    aside = torch.zeros_like(state)
    aside[..., 0, 0] = 100.0 * delta[..., 0, 0].sign()
    np.testing.assert_allclose(withdraw(written + aside, delta), state + aside, atol=2e-5)


@given(seeds, seeds, st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_withdrawal_never_makes_a_norm_grow(state_seed: int, delta_seed: int, scale: float) -> None:
    """Where taking out would enlarge a head, it is cut to the norm it had, in the direction it would have had."""
    state, delta = draw(state_seed, 1.0), draw(delta_seed, scale)
    got = withdraw(state, delta)
    before, wanted = norms_of(state), norms_of(state - delta)
    np.testing.assert_allclose(norms_of(got), np.minimum(before, wanted), rtol=1e-5)
    assert (norms_of(got) <= before * (1 + 1e-6)).all()


def test_withdrawing_nothing_leaves_the_same_bits() -> None:
    state = draw(0, 1.0)
    delta = draw(1, 0.1)
    delta[0] = 0.0
    got = withdraw(state, delta)
    assert torch.equal(got[0], state[0]) and not torch.equal(got[1], state[1])


def test_carrying_multiplies_by_the_decay_of_the_head() -> None:
    delta = draw(0, 1.0)
    decay = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    got = carry(delta, decay)
    for row in range(2):
        for head in range(H):
            np.testing.assert_array_equal(got[row, head], delta[row, head] * decay[row, head])


def test_clipping_leaves_heads_within_the_limit_alone() -> None:
    state = draw(0, 1.0)
    limit = head_norms(state) * torch.tensor([[2.0, 0.5], [1.0, 0.0]])
    got = clip_to_norm(state, limit)
    assert torch.equal(got[0, 0], state[0, 0]) and torch.equal(got[1, 0], state[1, 0])
    np.testing.assert_allclose(got[0, 1], 0.5 * state[0, 1], rtol=1e-5)
    assert not got[1, 1].any()


@pytest.mark.parametrize("gate", [0.1, 1.0])
def test_gradients_of_an_injection_are_those_of_finite_differences(gate: float) -> None:
    """The writer learns through the clip, inside the ball and on its surface."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, H, P, N, dtype=torch.float64, generator=generator)
    for scale in (0.1, 10.0):
        write = scale * torch.randn(1, H, P, N, dtype=torch.float64, generator=generator)
        alpha = torch.tensor([gate], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x, a=alpha: inject(state, x, a), (write.requires_grad_(),), atol=1e-6)
