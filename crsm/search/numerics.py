"""The float32 arithmetic of the search, each operation with a fixed order.

The search is specified to the last bit, so that an implementation in another language can be compared with it array by
array. Additions, multiplications, divisions and square roots are exact IEEE operations; everything that is not (an
exponential, a sum whose order a library may choose) is spelled out here as a sequence of such operations. None may be
fused into a multiply-add.

`B` denotes any batch of rows, `A` the actions of a node.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
TokenArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Under this the result would be subnormal; the search treats such a probability as zero.
_EXP_UNDERFLOW = np.float32(-87.0)
_LOG2_E = np.float32(1.44269504088896341)
# ln 2 in two parts: the first has few enough bits that its product with an exponent is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
# Minimax polynomial of (exp(r) - 1 - r) / r² on [-ln2/2, ln2/2], highest power first: Cephes, expf.c.
_EXP_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)


def exp(x: FloatArray) -> FloatArray:
    """The exponential of numbers that are not positive, within 2 units in the last place.

    The algorithm is that of Cephes: ``exp(x) = 2^k · exp(r)`` with ``k = floor(x·log2(e) + 1/2)``,
    ``r = (x − k·ln2_high) − k·ln2_low``, and ``exp(r) = (P(r)·r² + r) + 1`` with P by Horner's rule. A library's own
    exponential differs between processors in the last bit, and a visit can hang on that bit.

    Args:
        x: Numbers ≤ 0; -inf is allowed. Any shape.

    Returns:
        ``exp(x)``, exactly 1 at 0 and exactly 0 below -87. Same shape.
    """
    clamped = np.maximum(x, _EXP_UNDERFLOW)
    k = np.floor(clamped * _LOG2_E + _HALF)
    r = clamped - k * _LN2_HIGH
    r = r - k * _LN2_LOW
    polynomial = _EXP_COEFFICIENTS[0] * r + _EXP_COEFFICIENTS[1]
    for coefficient in _EXP_COEFFICIENTS[2:]:
        polynomial = polynomial * r + coefficient
    mantissa = (polynomial * (r * r) + r) + _ONE
    # 2^k by its bit pattern: k lies in [-126, 0], where every power of two is a normal number.
    power = ((k.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    result: FloatArray = np.where(x < _EXP_UNDERFLOW, np.float32(0.0), mantissa * power)
    return result


def sum_actions(x_BA: FloatArray) -> FloatArray:
    """The sum over actions, added one by one from the first to the last (a library may pair them up).

    Args:
        x_BA: Summands. Shape `[B, A]`.

    Returns:
        Shape `[B]`.
    """
    total_B: FloatArray = x_BA[:, 0]
    for action in range(1, x_BA.shape[1]):
        total_B = total_B + x_BA[:, action]
    return total_B


def softmax(logits_BA: FloatArray) -> FloatArray:
    """``exp(logits − max) / Σ exp(logits − max)`` over actions.

    Args:
        logits_BA: Logits, at least one of a row finite, none NaN or +inf. Shape `[B, A]`.

    Returns:
        Probabilities; exactly 0 where a logit is -inf. Shape `[B, A]`.
    """
    weights_BA = exp(logits_BA - logits_BA.max(axis=1, keepdims=True))
    result_BA: FloatArray = weights_BA / sum_actions(weights_BA)[:, np.newaxis]
    return result_BA
