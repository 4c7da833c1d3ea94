"""What a vector of per-layer values is worth: the layers' weighted mean, less a penalty where they disagree."""

from __future__ import annotations

import numpy as np

from crsm.search.numerics import FloatArray


def consensus(values_L: FloatArray, weights_L: FloatArray, penalty: float | np.float32) -> FloatArray:
    """``V = Σ_i k_i·v_i − λ·std_i(v_i)``, with the standard deviation of the population (divided by L).

    All in float32. Each sum over layers starts with layer 0 and adds the others in order::

        mean  = (v_0 + v_1 + … + v_{L-1}) / L
        var   = ((v_0 − mean)² + … + (v_{L-1} − mean)²) / L
        V     = (k_0·v_0 + k_1·v_1 + … + k_{L-1}·v_{L-1}) − λ·sqrt(var)

    Args:
        values_L: Values, layers last. Shape `[..., L]`.
        weights_L: The weights k. Shape `[L]`.
        penalty: The uncertainty penalty λ.

    Returns:
        Shape `[...]`.
    """
    num_layers = values_L.shape[-1]
    layers = [values_L[..., i] for i in range(num_layers)]
    count = np.float32(num_layers)
    weighted = weights_L[0] * layers[0]
    total = layers[0]
    for weight, layer in zip(weights_L[1:], layers[1:], strict=True):
        weighted = weighted + weight * layer
        total = total + layer
    mean = total / count
    deviation = layers[0] - mean
    squares = deviation * deviation
    for layer in layers[1:]:
        deviation = layer - mean
        squares = squares + deviation * deviation
    result: FloatArray = weighted - np.float32(penalty) * np.sqrt(squares / count)
    return result
