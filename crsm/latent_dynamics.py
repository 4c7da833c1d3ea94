"""World models: what System 2 imagines with.

A world model goes from the snapshot of one position, token by token, into futures that System 1 has not generated.
Two stand behind one interface:

* :class:`LatentDynamics`, a recurrent latent model that reads the root's SSM memory: ``g[0] = Enc(x[1..L,t])``,
  ``g[τ+1] = GRUCell([E[a], r], g[τ])``, ``x̂ = Dec(g)``. The read ``r`` is the operation that the SSM itself uses, with
  a query made from ``(g, E[a])``; so the model need not squeeze the whole prompt into one vector.
* :class:`ExactDynamics`, the backbone's own step: no error and nothing to train, at the price of a token of System 1
  for every imagined one.

Both return a predicted residual stream, and the backbone's own fused head and critics turn it into policy and values.

Letters: B batch, L layers, D d_model, H heads, P head dimension, N d_state, G width, M = number of read layers.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crsm.config import ModelConfig
from crsm.devices import to_device
from crsm.kernels import Kernels
from crsm.kernels.module import KernelModule
from crsm.mamba_ssm import Backbone
from crsm.native.memory_read import read_memory
from crsm.types import LayerState, ModelState


class Snapshot(NamedTuple):
    """What a world model starts from: one position of each of B sequences."""

    hidden_BLD: Tensor
    """Residual stream after every layer."""
    memory_BMHPN: Tensor
    """SSM states of the layers that are read, in the order of ``read_layers``."""
    conv_BLCK: Tensor | None = None
    """Convolution states of all layers; only the exact world model needs them."""

    def rows(self, index: Tensor | slice) -> Snapshot:
        conv = None if self.conv_BLCK is None else self.conv_BLCK[index]
        return Snapshot(self.hidden_BLD[index], self.memory_BMHPN[index], conv)

    def on(self, device: torch.device) -> Snapshot:
        """The same on a device."""
        conv = None if self.conv_BLCK is None else to_device(self.conv_BLCK, device)
        return Snapshot(to_device(self.hidden_BLD, device), to_device(self.memory_BMHPN, device), conv)


Latent = tuple[Tensor, ...]
"""The state of an imagined position: tensors with the batch first. What a search tree stores per node."""


class WorldModel(Protocol):
    """The interface that projection and search use."""

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Layers whose SSM states a snapshot must carry."""

    @property
    def needs_conv(self) -> bool:
        """Whether a snapshot must carry the convolution states."""

    def begin(self, snapshot: Snapshot) -> Latent:
        """The latent of the snapshot's own position."""

    def advance(self, latent: Latent, snapshot: Snapshot, token_B: Tensor) -> tuple[Latent, Tensor]:
        """Consumes one token: the new latent, and the predicted residual stream (B, L, D)."""


class LatentDynamics(KernelModule):
    """Memory-reading GRU world model. The token embedding is the backbone's and is passed in, not owned."""

    def __init__(self, config: ModelConfig, embedding: nn.Embedding, kernels: Kernels | None = None) -> None:
        super().__init__(kernels)
        backbone, settings = config.backbone, config.world_model
        self._layers = settings.read_layers or tuple(range(backbone.n_layer))
        width, d_model, n_layer = settings.width, backbone.d_model, backbone.n_layer
        self._shape = (n_layer, d_model)
        self._embedding = (embedding,)  # in a tuple, so that it is not registered a second time
        self.encoder = nn.Linear(n_layer * d_model, width)
        self.query = nn.Linear(width + d_model, len(self._layers) * backbone.d_state)
        self.read = nn.Linear(len(self._layers) * backbone.d_inner, width)
        self.cell = nn.GRUCell(d_model + width, width)
        self.decoder_linear = nn.Linear(width, n_layer * d_model)
        self.decoder_in = nn.Linear(width, settings.decoder_width)
        self.decoder_out = nn.Linear(settings.decoder_width, n_layer * d_model)

    @property
    def embedding(self) -> nn.Embedding:
        """The backbone's."""
        return self._embedding[0]

    @property
    def read_layers(self) -> tuple[int, ...]:
        return self._layers

    @property
    def needs_conv(self) -> bool:
        return False

    def begin(self, snapshot: Snapshot) -> Latent:
        return (torch.tanh(self.dense(self.encoder, snapshot.hidden_BLD.flatten(1))),)

    def advance(self, latent: Latent, snapshot: Snapshot, token_B: Tensor) -> tuple[Latent, Tensor]:
        (g_BG,) = latent
        embedded_BD = self.embedding(token_B)
        query_BMN = self.dense(self.query, torch.cat([g_BG, embedded_BD], dim=1)).view(len(g_BG), len(self._layers), -1)
        # h·q per head, as System 1 reads its own memory with C; one query serves all heads of a layer.
        read_BE = read_memory(snapshot.memory_BMHPN, query_BMN).flatten(1)
        read_BE = F.rms_norm(read_BE, read_BE.shape[1:], eps=1e-6)
        g_BG = self._advance(torch.cat([embedded_BD, self.dense(self.read, read_BE)], dim=1), g_BG)
        return (g_BG,), self.decode(g_BG)

    def _advance(self, input_BI: Tensor, g_BG: Tensor) -> Tensor:
        """The GRU cell (arXiv 1406.1078, with PyTorch's place of the reset gate), its products on the kernels."""
        cell = self.cell
        input_reset, input_update, input_new = (self.kernels.linear(input_BI, cell.weight_ih) + cell.bias_ih).chunk(
            3, dim=1
        )
        state_reset, state_update, state_new = (self.kernels.linear(g_BG, cell.weight_hh) + cell.bias_hh).chunk(
            3, dim=1
        )
        reset_BG = torch.sigmoid(input_reset + state_reset)
        update_BG = torch.sigmoid(input_update + state_update)
        new_BG = torch.tanh(input_new + reset_BG * state_new)
        return torch.lerp(new_BG, g_BG, update_BG)

    def decode(self, g_BG: Tensor) -> Tensor:
        """Predicted residual stream of every layer (…, L, D)."""
        hidden_BX = F.silu(self.dense(self.decoder_in, g_BG))
        flat = self.dense(self.decoder_linear, g_BG) + self.dense(self.decoder_out, hidden_BX)
        return flat.unflatten(-1, self._shape)


class ExactDynamics:
    """The backbone itself as its own world model; a latent is the full recurrent state."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    @property
    def backbone(self) -> Backbone:
        return self._backbone

    @property
    def read_layers(self) -> tuple[int, ...]:
        return tuple(range(self._backbone.config.n_layer))

    @property
    def needs_conv(self) -> bool:
        return True

    def begin(self, snapshot: Snapshot) -> Latent:
        if snapshot.conv_BLCK is None:
            raise ValueError("snapshot.conv_BLCK = None; allowed: the convolution states, for the exact world model")
        return (snapshot.conv_BLCK, snapshot.memory_BMHPN)

    def advance(self, latent: Latent, snapshot: Snapshot, token_B: Tensor) -> tuple[Latent, Tensor]:
        conv_BLCK, ssm_BLHPN = latent
        layers = zip(conv_BLCK.unbind(1), ssm_BLHPN.unbind(1), strict=True)
        state = ModelState(tuple(LayerState(conv, ssm) for conv, ssm in layers))
        out = self._backbone.step(token_B, state)
        conv_BLCK = torch.stack([layer.conv_BCK for layer in out.state.layers], dim=1)
        ssm_BLHPN = torch.stack([layer.ssm_BHPN for layer in out.state.layers], dim=1)
        return (conv_BLCK, ssm_BLHPN), out.hidden_BLD


def take_snapshot(hidden_BLD: Tensor, state: ModelState, world_model: WorldModel) -> Snapshot:
    """What ``world_model`` needs of a position; copies, so that the state can go on."""
    memory = torch.stack([state.layers[layer].ssm_BHPN for layer in world_model.read_layers], dim=1)
    conv = torch.stack([layer.conv_BCK for layer in state.layers], dim=1) if world_model.needs_conv else None
    return Snapshot(hidden_BLD, memory, conv)
