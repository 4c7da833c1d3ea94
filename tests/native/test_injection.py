"""The native injection is the one of PyTorch, gradients included, to rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crsm import native
from crsm.injection import LARGEST_WRITE, head_norms, inject, inject_low_rank, outer_write

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)

sizes = st.integers(1, 20)


def example(B, H, P, N, R, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    alpha_B = torch.linspace(0, 1, B, dtype=dtype)
    return normal(B, H, P, N), normal(B, R, H * P) * scale, normal(B, R, N), alpha_B


@given(st.integers(1, 4), st.integers(1, 3), sizes, sizes, st.integers(1, 3), st.sampled_from([0.01, 1.0, 100.0]))
def test_it_is_the_injection_of_the_outer_product(B, H, P, N, R, scale):
    ssm, u, b, alpha = example(B, H, P, N, R, torch.float32, scale=scale)
    expected = inject(ssm, outer_write(u, b, H), alpha)
    torch.testing.assert_close(inject_low_rank(ssm, u, b, alpha), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_gradients_are_those_of_finite_differences(scale):
    ssm, u, b, alpha = example(3, 2, 5, 11, 2, torch.float64, scale=scale)

    def write(u, b):
        return inject_low_rank(ssm, u, b, alpha)

    assert torch.autograd.gradcheck(write, (u.requires_grad_(), b.requires_grad_()), atol=1e-6)


def test_gradients_are_those_of_pytorch_at_training_sizes():
    ssm, u, b, alpha = example(4, 6, 32, 32, 2, torch.float32)
    u.requires_grad_(), b.requires_grad_()
    grad = torch.randn(ssm.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(inject(ssm, outer_write(u, b, 6), alpha), (u, b), grad)
    found = torch.autograd.grad(inject_low_rank(ssm, u, b, alpha), (u, b), grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_shut_gate_leaves_the_bits():
    ssm, u, b, _ = example(2, 3, 4, 8, 1, torch.float32)
    assert torch.equal(inject_low_rank(ssm, u, b, torch.zeros(2)), ssm)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e20])
def test_no_norm_grows_over_many_injections(scale):
    ssm, u, b, _ = example(2, 3, 8, 16, 2, torch.float32, scale=scale)
    before = head_norms(ssm)
    for _ in range(200):
        ssm = inject_low_rank(ssm, u, b, torch.tensor([0.3, 1.0]))
    assert (head_norms(ssm) <= before).all()
    assert torch.isfinite(ssm).all()


def test_states_that_want_a_gradient_get_one():
    ssm, u, b, alpha = example(2, 2, 4, 8, 1, torch.float64)
    ssm.requires_grad_()
    inject_low_rank(ssm, u, b, alpha).sum().backward()
    assert ssm.grad is not None and ssm.grad.abs().sum() > 0


def test_arrays_that_do_not_fit_are_refused_by_name():
    core = native.require()
    ssm, u, b, alpha = example(2, 3, 4, 8, 1, torch.float32)
    out = torch.empty_like(ssm)
    with pytest.raises(ValueError, match=r"u has shape \(2, 1, 11\); allowed: \(2, any, 12\)"):
        core.inject(ssm, u[:, :, :11].contiguous(), b, alpha, LARGEST_WRITE, out)
    with pytest.raises(ValueError, match="b: wrong dtype; allowed: float32"):
        core.inject(ssm, u, b.double(), alpha, LARGEST_WRITE, out)
    with pytest.raises(ValueError, match="ssm: not contiguous"):
        core.inject(ssm.transpose(2, 3), u, b, alpha, LARGEST_WRITE, out)
