"""Multi-headed value critic: one value head per layer, and their consensus.

``v_i = σ(head_i(x_i))`` is the probability, as layer ``i`` sees it, that the continuation ends in a verified-correct
answer. The consensus ``V = Σ_i k_i v_i − λ · std_i(v_i)`` is lower where the layers disagree, so that the planner keeps
its hands off there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crsm.config import CriticConfig


class Critic(nn.Module):
    """Value heads of all layers, and the learned weights of their consensus."""

    def __init__(self, n_layer: int, d_model: int, config: CriticConfig) -> None:
        super().__init__()
        self.uncertainty_penalty = config.uncertainty_penalty
        self.weight_LD = nn.Parameter(torch.randn(n_layer, d_model) * d_model**-0.5)
        self.bias_L = nn.Parameter(torch.zeros(n_layer))
        self.consensus_logits_L = nn.Parameter(torch.zeros(n_layer))
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """Log-odds of a correct end per layer: (…, L, D) to (…, L)."""
        # The residual stream grows with depth; every head reads it at unit scale.
        normed_LD = F.rms_norm(hidden_LD, hidden_LD.shape[-1:], eps=1e-5)
        return (normed_LD * self.weight_LD).sum(dim=-1) + self.bias_L

    def forward(self, hidden_LD: Tensor) -> Tensor:
        """Values in [0, 1] per layer: (…, L, D) to (…, L)."""
        return self.logits(hidden_LD).sigmoid()

    @property
    def consensus_weights_L(self) -> Tensor:
        """k: non-negative, sums to 1."""
        return self.consensus_logits_L.softmax(dim=0)

    def consensus(self, values_L: Tensor) -> Tensor:
        """V of (…, L) values; (…)."""
        mean = (self.consensus_weights_L * values_L).sum(dim=-1)
        return mean - self.uncertainty_penalty * values_L.std(dim=-1, correction=0)
