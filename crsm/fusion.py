"""Hierarchical policy fusion: the logits are read from a learned mixture of all layers' residual streams.

``logits = W_emb · RMSNorm(Σ_i softmax(w)_i · x_i)``. With all weight on the last layer this is the original language
model, bit for bit. The norm and the matrix are the backbone's own and are passed in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """The mixture over layers."""

    def __init__(self, n_layer: int) -> None:
        super().__init__()
        # The last layer starts ahead: the mixture begins near an ordinary language model and is free to move.
        self.logits_L = nn.Parameter(torch.zeros(n_layer))
        with torch.no_grad():
            self.logits_L[-1] = 2.0
        self.logits_L._no_weight_decay = True  # type: ignore[attr-defined]

    @property
    def weights_L(self) -> Tensor:
        return self.logits_L.softmax(dim=0)

    def forward(self, hidden_LD: Tensor) -> Tensor:
        """Mixes (…, L, D) into (…, D)."""
        return (self.weights_L[:, None].to(hidden_LD.dtype) * hidden_LD).sum(dim=-2)

    def entropy(self) -> Tensor:
        """Entropy of the mixture in nats; its bonus in training keeps it from collapsing onto one layer."""
        weights_L = self.weights_L
        return -(weights_L * weights_L.clamp_min(1e-12).log()).sum()

    @torch.no_grad()
    def use_last_layer(self) -> None:
        """All weight, exactly, on the last layer: where an imported checkpoint starts."""
        self.logits_L.fill_(-torch.inf)
        self.logits_L[-1] = 0.0
