"""Reads of the state-space memory: the native core gives what a matrix product gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crsm import native
from crsm.native.memory_read import read_memory

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)


def arrays(count, width, state, dtype):
    generator = torch.Generator().manual_seed(count * 1000 + width * 10 + state)
    return (
        torch.randn(count, width, state, generator=generator, dtype=dtype),
        torch.randn(count, state, generator=generator, dtype=dtype),
        torch.randn(count, width, generator=generator, dtype=dtype),
    )


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.sampled_from([torch.float32, torch.float64]))
def test_a_read_is_a_product_and_so_is_its_gradient(count, width, state, dtype):
    memory, query, dread = arrays(count, width, state, dtype)
    read, dquery = torch.empty(count, width, dtype=dtype), torch.empty(count, state, dtype=dtype)
    core = native.require()
    core.memory_read(memory, query, read)
    core.memory_read_backward(memory, dread, dquery)
    exact = memory.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(read.double(), (exact @ query.double()[..., None])[..., 0], rtol=0, atol=tolerance)
    torch.testing.assert_close(dquery.double(), (dread.double()[:, None] @ exact)[:, 0], rtol=0, atol=tolerance)


def test_the_result_does_not_depend_on_threads():
    memory, query, _ = arrays(300, 64, 32, torch.float32)
    one, two = torch.empty(300, 64), torch.empty(300, 64)
    native.require().memory_read(memory, query, one, 1)
    native.require().memory_read(memory, query, two, 2)
    assert torch.equal(one, two)


def test_arrays_that_do_not_fit_are_refused_by_name():
    memory, query, _ = arrays(2, 3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"query has shape \(2, 3\); allowed: \(2, 4\)"):
        native.require().memory_read(memory, query[:, :3].contiguous(), torch.empty(2, 3))
    with pytest.raises(ValueError, match="read: wrong dtype; allowed: float32"):
        native.require().memory_read(memory, query, torch.empty(2, 3, dtype=torch.float64))


def test_gradients_of_the_query_are_those_of_finite_differences():
    memory, query, _ = arrays(6, 8, 5, torch.float64)
    memory_BMHPN, query_BMN = memory.view(2, 3, 2, 4, 5), query.view(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: read_memory(memory_BMHPN, q), (query_BMN,))


def test_a_memory_that_wants_a_gradient_gets_one():
    memory, query, _ = arrays(6, 8, 5, torch.float64)
    memory_BMHPN, query_BMN = memory.view(2, 3, 2, 4, 5).requires_grad_(), query.view(2, 3, 5)
    read_memory(memory_BMHPN, query_BMN).sum().backward()
    expected = query_BMN[:, :, None, None].expand(memory_BMHPN.shape)
    assert torch.equal(memory_BMHPN.grad, expected)
