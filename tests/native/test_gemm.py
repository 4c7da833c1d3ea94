"""Packed matrix products: what rounding does to weights, and that a row's result is its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm import native

if not native.available():
    pytest.skip(f"no native core: {native.MISSING}", allow_module_level=True)

core = native.require()
GROUP = 64
"""Inputs that share a scale in an int8 matrix."""

TYPES = ["fp32", "bf16", "int8"]


def product(x: np.ndarray, weight: np.ndarray, weights: str, threads: int = 1) -> np.ndarray:
    y = np.full((len(x), len(weight)), np.nan, np.float32)
    core.linear_as(x, weight, y, weights, threads)
    return y


def as_bf16(weight: np.ndarray) -> np.ndarray:
    """To the nearest of the numbers with 8 significant bits, ties to the even one, by way of float64."""
    _, exponent = np.frexp(weight.astype(np.float64))
    step = np.ldexp(1.0, exponent - 8)
    return np.round(weight / step) * step


def as_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded weights (N, K), and half the step between neighbours at each of them."""
    rounded, half = np.zeros(weight.shape), np.zeros(weight.shape)
    for start in range(0, weight.shape[1], GROUP):
        piece = weight[:, start : start + GROUP]
        scale = np.abs(piece).max(axis=1, keepdims=True) / np.float32(127)
        quotient = np.divide(piece, scale, out=np.zeros_like(piece), where=scale > 0)
        rounded[:, start : start + GROUP] = np.round(quotient) * scale.astype(np.float64)
        half[:, start : start + GROUP] = scale / 2
    return rounded, half


def rounded_weights(weight: np.ndarray, weights: str) -> np.ndarray:
    return {
        "fp32": lambda: weight.astype(np.float64),
        "bf16": lambda: as_bf16(weight),
        "int8": lambda: as_int8(weight)[0],
    }[weights]()


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 13, 49, 64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (32, 64), (33, 65), (130, 128), (97, 300)])
def test_a_product_is_that_of_the_rounded_weights(weights: str, rows: int, shape: tuple[int, int]) -> None:
    """Every result is a sum of K products in fp32: off by at most K units of rounding of the sum of their sizes."""
    rng = np.random.default_rng([rows, *shape])
    x, weight = rng.normal(size=(rows, shape[1])), rng.normal(size=shape)
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    exact = rounded_weights(weight, weights)
    bound = (shape[1] + 2) * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(exact).T)
    assert (np.abs(product(x, weight, weights) - x @ exact.T) <= bound).all()


def test_bf16_rounds_to_nearest_and_ties_to_even() -> None:
    unit = 2.0**-7  # of the last place, from 1 to 2
    weight = np.array([[1 + unit / 2], [1 + 1.5 * unit], [1 + 0.49 * unit], [1 + 0.51 * unit], [-1 - unit / 2], [-0.0]])
    want = [1.0, 1 + 2 * unit, 1.0, 1 + unit, -1.0, 0.0]
    found = product(np.ones((1, 1), np.float32), weight.astype(np.float32), "bf16")
    assert found[0].tolist() == want


def test_int8_has_a_scale_per_output_and_64_inputs_and_keeps_the_largest_weight() -> None:
    weight = np.zeros((3, 130), np.float32)
    weight[0, :64], weight[0, 64:128], weight[0, 128:] = 1.27, 127.0, 0.0
    weight[0, 1], weight[0, 65] = 0.0149, 1.5  # 1.49 and 1.5 steps of their groups; a tie goes to the even number
    weight[1] = np.linspace(-1, 1, 130)
    found = product(np.eye(130, dtype=np.float32), weight, "int8").T
    np.testing.assert_allclose(found[0, [0, 1, 64, 65, 128]], [1.27, 0.01, 127.0, 2.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found[1], as_int8(weight)[0][1], rtol=1e-6)
    assert not found[2].any()
    for start in (0, 64, 128):
        group = slice(start, start + 64)
        assert np.isclose(np.abs(found[1, group]).max(), np.abs(weight[1, group]).max(), rtol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_rounding_errors_keep_their_bounds(seed: int, size: float) -> None:
    """2^-8 of a weight as bf16; half a step of its group as int8."""
    rng = np.random.default_rng(seed)
    weight = (size * rng.normal(size=(9, 130)) * rng.choice([1, 1e-3], size=(9, 130))).astype(np.float32)
    unit = np.eye(130, dtype=np.float32)
    assert (np.abs(product(unit, weight, "bf16").T - weight) <= 2.0**-8 * np.abs(weight)).all()
    _, half = as_int8(weight)
    assert (np.abs(product(unit, weight, "int8").T - weight) <= half * (1 + 1e-5)).all()


@pytest.mark.parametrize("weights", TYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(weights: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(64, 300)).astype(np.float32), rng.normal(size=(1000, 300)).astype(np.float32)
    alone = np.concatenate([product(x[row : row + 1], weight, weights) for row in range(64)])
    for rows in (1, 2, 3, 11, 12, 13, 25, 48, 49, 64):
        for threads in (1, 2):
            assert np.array_equal(product(x[:rows], weight, weights, threads), alone[:rows])


def test_bad_arguments_are_refused_by_name() -> None:
    x, weight, y = np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"weights = 'fp16'; allowed: 'fp32', 'bf16', 'int8'"):
        core.linear_as(x, weight, y, "fp16")
    with pytest.raises(ValueError, match=r"x has shape \(2, 2\); allowed: \(any, 3\)"):
        core.linear_as(x[:, :2].copy(), weight, y, "int8")
    with pytest.raises(ValueError, match=r"weight: not contiguous"):
        core.linear_as(x, np.zeros((3, 4), np.float32).T, y, "bf16")
    with pytest.raises(ValueError, match=r"y: wrong dtype; allowed: float32"):
        core.linear_as(x, weight, y.astype(np.float64), "bf16")
