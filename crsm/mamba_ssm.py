"""System 1: the Mamba-2 backbone, with the parameter names and initialisation of ``mamba-ssm`` (arXiv 2405.21060).

``backbone.layers.N.mixer.in_proj.weight``, ``A_log``, ``dt_bias``, ``D``, … are those of the public checkpoints. The
recurrent state is a value: :meth:`Backbone.forward` and :meth:`Backbone.step` take one and return a new one. ``step``
equals ``forward``, position by position.

Letters: B batch, T time, L layers, D d_model, H heads, P head dimension, N d_state, C convolution channels
(H·P + 2·N), K convolution width, E = H·P inner width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crsm.config import BackboneConfig
from crsm.kernels import Kernels, reference, select_kernels
from crsm.kernels.module import KernelModule
from crsm.types import LayerState, ModelState, StepOutput


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, kernels: Kernels = reference) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm of ``y · silu(z)``: the norm before Mamba-2's output projection."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return reference.gated_rms_norm(y, z, self.weight, self.eps)


class Projection(nn.Linear):
    """A dense layer without bias, on the kernels of whoever owns it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor, kernels: Kernels = reference) -> Tensor:
        return kernels.linear(x, self.weight)


def _count_changes(segment_BT: Tensor) -> Tensor:
    """Documents of a row counted from 0, whatever they were called: kernels rely on ids that do not come back."""
    return F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0)).cumsum(dim=1)


class Mixer(KernelModule):
    """One Mamba-2 mixer: projection, short convolution, state-space recurrence, gate, projection."""

    def __init__(self, config: BackboneConfig, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.config = config
        inner, heads, channels = config.d_inner, config.n_heads, config.conv_channels
        # Order of the projection: [z, x, B, C, dt]; x, B and C pass through the convolution together.
        self.in_proj = Projection(config.d_model, inner + channels + heads)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        # dt starts log-uniform in [0.001, 0.1]; dt_bias is its inverse softplus.
        dt_H = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt_H + torch.log(-torch.expm1(-dt_H)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = GatedRMSNorm(inner, config.norm_eps)
        self.out_proj = Projection(inner, config.d_model)

    def forward(self, x_BTD: Tensor, state: LayerState, segment_BT: Tensor | None) -> tuple[Tensor, LayerState]:
        y_BTE, conv_BCK, ssm_BHPN = self.kernels.mixer(
            self.in_proj(x_BTD, self.kernels),
            self.conv1d.weight.squeeze(1),
            self._conv_bias,
            self.dt_bias,
            self._A,
            self.D,
            self.norm.weight,
            self.norm.eps,
            state.conv_BCK,
            state.ssm_BHPN,
            self.config.chunk_size,
            segment_BT,
        )
        return self.out_proj(y_BTE, self.kernels), LayerState(conv_BCK, ssm_BHPN)

    def step(self, x_BD: Tensor, state: LayerState) -> tuple[Tensor, LayerState, Tensor]:
        z_BE, xBC_BC, dt_BH = reference.split_projection(self.in_proj(x_BD), state.ssm_BHPN)
        xBC_BC, conv_BCK = self.kernels.causal_conv_step(
            xBC_BC, self.conv1d.weight.squeeze(1), self._conv_bias, state.conv_BCK
        )
        x_BE, B_BN, C_BN = reference.split_mixed(reference.at_least_fp32(F.silu(xBC_BC)), state.ssm_BHPN)
        x_BHP = x_BE.unflatten(-1, (self.config.n_heads, self.config.headdim))
        dt_BH = F.softplus(reference.at_least_fp32(dt_BH) + reference.at_least_fp32(self.dt_bias))
        y_BHP, ssm_BHPN, decay_BH = self.kernels.state_step(x_BHP, dt_BH, self._A, B_BN, C_BN, state.ssm_BHPN)
        y_BE = (y_BHP + self.D[:, None] * x_BHP).flatten(1).to(x_BD.dtype)
        return self.out_proj(self.norm(y_BE, z_BE)), LayerState(conv_BCK, ssm_BHPN), decay_BH

    @property
    def _A(self) -> Tensor:
        return -reference.at_least_fp32(self.A_log).exp()

    @property
    def _conv_bias(self) -> Tensor:
        assert self.conv1d.bias is not None
        return self.conv1d.bias


class Layer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: BackboneConfig, kernels: Kernels) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config, kernels)

    def forward(self, x_BTD: Tensor, state: LayerState, segment_BT: Tensor | None) -> tuple[Tensor, LayerState]:
        y_BTD, state = self.mixer(self.norm(x_BTD, self.mixer.kernels), state, segment_BT)
        return x_BTD + y_BTD, state

    def step(self, x_BD: Tensor, state: LayerState) -> tuple[Tensor, LayerState, Tensor]:
        y_BD, state, decay_BH = self.mixer.step(self.norm(x_BD), state)
        return x_BD + y_BD, state, decay_BH


class Backbone(nn.Module):
    """Embedding, L residual Mamba-2 layers, final norm. Returns the residual stream after every layer, not logits."""

    def __init__(self, config: BackboneConfig, kernels: Kernels | None = None) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"backbone.vocab_size = {config.vocab_size}; allowed: at least 1")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, kernels or select_kernels()) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.recompute = False
        """Whether a layer's activations are not kept for its gradients but computed a second time."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self._blocks:
            # GPT-2's residual scaling, as mamba-ssm does it: one residual branch a layer.
            with torch.no_grad():
                layer.mixer.out_proj.weight /= math.sqrt(config.n_layer)

    @property
    def _blocks(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    @property
    def kernels(self) -> Kernels:
        """What the layers run on; for what is computed beside them."""
        return self._blocks[0].mixer.kernels

    def initial_state(self, batch_size: int) -> ModelState:
        """The state before the first token: zeros."""
        config, weight = self.config, self.embedding.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        conv_BCK = weight.new_zeros(batch_size, config.conv_channels, config.d_conv - 1)
        ssm_BHPN = weight.new_zeros(batch_size, config.n_heads, config.headdim, config.d_state, dtype=wide)
        return ModelState(tuple(LayerState(conv_BCK, ssm_BHPN) for _ in range(config.n_layer)))

    def forward(
        self, tokens_BT: Tensor, state: ModelState | None = None, segment_BT: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Consumes a piece of text.

        Args:
            tokens_BT: token ids, T ≥ 1.
            state: where to go on from; None: the beginning.
            segment_BT: document of each token, for packed rows; the state is reset where it changes.

        Returns:
            Residual stream after every layer (B, T, L, D), and the state after the last token.

        Raises:
            ValueError: tokens are not (B, T) with T ≥ 1, or the state is of another batch or model.
        """
        if tokens_BT.ndim != 2 or tokens_BT.shape[1] < 1:
            raise ValueError(f"tokens_BT has shape {tuple(tokens_BT.shape)}; allowed: (B, T) with T ≥ 1")
        state = self._checked(state, tokens_BT.shape[0])
        if segment_BT is not None:
            segment_BT = _count_changes(segment_BT)
        x_BTD = self.embedding(tokens_BT)
        hidden, layers = [], []
        for layer, layer_state in zip(self._blocks, state.layers, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a layer is drawn at random.
                x_BTD, new_state = checkpoint(
                    layer, x_BTD, layer_state, segment_BT, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTD, new_state = layer(x_BTD, layer_state, segment_BT)
            hidden.append(x_BTD)
            layers.append(new_state)
        return torch.stack(hidden, dim=2), ModelState(tuple(layers))

    def step(self, token_B: Tensor, state: ModelState) -> StepOutput:
        """Consumes one token per sequence.

        Raises:
            ValueError: ``token_B`` is not (B,), or the state is of another batch or model.
        """
        if token_B.ndim != 1:
            raise ValueError(f"token_B has shape {tuple(token_B.shape)}; allowed: (B,)")
        state = self._checked(state, token_B.shape[0])
        x_BD = self.embedding(token_B)
        hidden, layers, decays = [], [], []
        for layer, layer_state in zip(self._blocks, state.layers, strict=True):
            x_BD, new_state, decay_BH = layer.step(x_BD, layer_state)
            hidden.append(x_BD)
            layers.append(new_state)
            decays.append(decay_BH)
        return StepOutput(torch.stack(hidden, dim=1), ModelState(tuple(layers)), tuple(decays))

    def _checked(self, state: ModelState | None, batch_size: int) -> ModelState:
        if state is None:
            return self.initial_state(batch_size)
        config = self.config
        if len(state.layers) != config.n_layer:
            raise ValueError(f"state has {len(state.layers)} layers; allowed: {config.n_layer}")
        ssm = (batch_size, config.n_heads, config.headdim, config.d_state)
        conv = (batch_size, config.conv_channels, config.d_conv - 1)
        for index, layer in enumerate(state.layers):
            if layer.ssm_BHPN.shape != ssm or layer.conv_BCK.shape != conv:
                raise ValueError(
                    f"state of layer {index} has shapes {tuple(layer.ssm_BHPN.shape)} and "
                    f"{tuple(layer.conv_BCK.shape)}; allowed: (B, H, P, N) = {ssm} and (B, C, K-1) = {conv}"
                )
        return state
