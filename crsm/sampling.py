"""From logits to a token: greedy, temperature, top-k, top-p (arXiv 1904.09751). Pure, given the random number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crsm.config import SamplingConfig
from crsm.devices import to_host


def look_up(log_probs_BV: Tensor, rows: Sequence[int]) -> tuple[list[int], list[float], dict[int, Tensor]]:
    """What is read of log-probabilities on any device, in one crossing.

    Returns:
        The likeliest token of every row, its log-probability, and all log-probabilities (V,) of ``rows``, on the CPU.
    """
    likeliest_B = log_probs_BV.argmax(dim=-1)
    best_B = log_probs_BV.gather(1, likeliest_B[:, None])[:, 0]
    likeliest_B, best_B, *whole = to_host(likeliest_B, best_B, *(log_probs_BV[row] for row in rows))
    return likeliest_B.tolist(), best_B.tolist(), dict(zip(rows, whole, strict=True))


def choose_token(log_probs_V: Tensor, config: SamplingConfig, uniform: float) -> int:
    """Picks a token by inverse transform.

    Args:
        log_probs_V: log-probabilities (V,).
        config: temperature, top-k and top-p, in this order of application.
        uniform: a random number in [0, 1); unused when greedy.
    """
    if config.temperature == 0:
        return int(log_probs_V.argmax())
    # The largest becomes 0, so that no temperature is too small to divide by.
    scaled_V = (log_probs_V.double() - log_probs_V.max()) / config.temperature
    if 0 < config.top_k < scaled_V.numel():
        scaled_V = scaled_V.masked_fill(scaled_V < scaled_V.topk(config.top_k).values[-1], -torch.inf)
    probs_V = scaled_V.softmax(dim=0)
    if config.top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        # The smallest set of tokens whose mass reaches top_p; the first token always stays.
        outside_V = sorted_V.cumsum(dim=0) - sorted_V >= config.top_p
        probs_V[order_V[outside_V]] = 0.0
    cumulative_V = probs_V.cumsum(dim=0)
    picked = int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))
    return min(picked, int(probs_V.nonzero()[-1]))


def mix_policy(log_probs_V: Tensor, tokens_A: Tensor, probs_A: Tensor, weight: float) -> Tensor:
    """``log((1 − w)·p + w·π)``: the search's visit distribution mixed into the policy."""
    if weight == 0:
        return log_probs_V
    mixed_V = (1 - weight) * log_probs_V.exp()
    mixed_V[tokens_A] += weight * probs_A
    return mixed_V.clamp_min(1e-30).log()
