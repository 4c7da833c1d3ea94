"""Plan writer: turns a planned line of tokens into a low-rank write for every layer's SSM state.

A write is a sum of outer products ``Σ_r u_ir ⊗ b_ir``: the form in which the SSM writes a token itself. It has
``L·R·(H·P+N)`` numbers, small enough to send for every few tokens.

Letters: B batch, M tokens of the line, L layers, R rank, E = H·P inner width, N d_state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from crsm.config import ModelConfig
from crsm.kernels.reference import full_precision


class Write(NamedTuple):
    """What is added, per layer, before clipping and gating."""

    u_BLRE: Tensor
    b_BLRN: Tensor

    def rows(self, index: Tensor | slice) -> Write:
        return Write(self.u_BLRE[index], self.b_BLRN[index])


class PlanWriter(nn.Module):
    """A GRU over the line's token embeddings, read out into both factors of every layer."""

    def __init__(self, config: ModelConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        backbone, settings = config.backbone, config.writer
        self._embedding = (embedding,)  # the backbone's; not registered a second time
        self._u_shape = (backbone.n_layer, settings.rank, backbone.d_inner)
        self._b_shape = (backbone.n_layer, settings.rank, backbone.d_state)
        self.gru = nn.GRU(backbone.d_model, settings.width, batch_first=True)
        self.u = nn.Linear(settings.width, backbone.n_layer * settings.rank * backbone.d_inner)
        self.b = nn.Linear(settings.width, backbone.n_layer * settings.rank * backbone.d_state)

    def forward(self, line_BM: Tensor, length_B: Tensor) -> Write:
        """Writes for lines of several lengths.

        Args:
            line_BM: token ids, padded on the right with any id.
            length_B: tokens of each line, at least 1.
        """
        lengths = length_B.cpu()  # where packing wants them
        embedded_BMD = self._embedding[0](line_BM)
        packed = pack_padded_sequence(embedded_BMD, lengths, batch_first=True, enforce_sorted=False)
        # What goes into a state is as precise as the state, under autocast too.
        with full_precision(embedded_BMD):
            _, last_1BW = self.gru(packed)
            last_BW = last_1BW[0]
            return Write(self.u(last_BW).unflatten(1, self._u_shape), self.b(last_BW).unflatten(1, self._b_shape))


def random_write_like(write: Write, generator: torch.Generator) -> Write:
    """Random directions with the factor norms of ``write``: the control that shows what any write of that size does."""

    def like(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return noise * (x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    return Write(like(write.u_BLRE), like(write.b_BLRN))
