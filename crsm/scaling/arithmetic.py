"""Multiply-adds of a token in training, by the formula of state-space duality (Mamba-2, arXiv 2405.21060).

Forward, per token and layer, with chunks of Q tokens (letters as in :mod:`crsm.mamba_ssm`)::

    projections      D·I + E·D
    convolution      K·C
    inside a chunk   Q/2·N + Q/2·E          C·Bᵀ, shared by all heads, and its product with x; the causal half
    between chunks   2·E·N + E·N/Q          states of the chunks, their outputs, and passing them on

and once a token, the fused head: L·D for the mixture and D·V for the logits of a position that is a target. The
backward pass is twice the forward pass; checkpointed layers run forward once more. Two operations make one
multiply-add. Norms, activations, critics and the optimizer are left out: under 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from crsm.config import BackboneConfig
from crsm.scaling.parameters import layer_shape


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Multiply-adds of one token, forward."""

    projections: int
    convolution: int
    scan: float
    head: float
    """Mixture and logits, times the share of tokens that are targets."""

    @property
    def layers(self) -> float:
        return self.projections + self.convolution + self.scan

    @property
    def forward(self) -> float:
        return self.layers + self.head

    def train_flops(self, recomputed: bool = False) -> float:
        """Operations of a token in training, forward and backward.

        Args:
            recomputed: with the forward pass of the layers that activation checkpointing runs again.
        """
        return 2 * (3 * self.forward + (self.layers if recomputed else 0.0))


def token_cost(sizes: BackboneConfig, chunk: int, targets: float = 1.0) -> TokenCost:
    """The cost of a token.

    Args:
        sizes: of the backbone.
        chunk: tokens of a chunk, as the kernels cut them.
        targets: share of the tokens that are predicted.
    """
    shape, inner, states = layer_shape(sizes), sizes.d_inner, sizes.d_state
    scan = chunk / 2 * (states + inner) + 2 * inner * states + inner * states / chunk
    mixture, logits = sizes.n_layer * sizes.d_model, sizes.d_model * sizes.vocab_size
    return TokenCost(
        projections=sizes.n_layer * (shape.in_proj + shape.out_proj),
        convolution=sizes.n_layer * sizes.d_conv * sizes.conv_channels,
        scan=sizes.n_layer * scan,
        head=targets * (mixture + logits),
    )
