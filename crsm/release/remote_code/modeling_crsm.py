"""CRSM for transformers: a Mamba-2 whose logits read a mixture of all layers. Pure PyTorch.

``generate`` is System 1: the language model alone, its cache the recurrent state, of one size whatever the length of
the text. ``generate_with_plans`` is System 2, planners that search ahead while it speaks; it needs the package
``crsm``, which reads the same folder.

Letters: B batch, T time, L layers, D d_model, H heads, P head dimension, N d_state, C convolution channels (H·P + 2·N),
K convolution width, E = H·P, Q tokens of a chunk. Per head (arXiv 2405.21060), with one decay a[t] = exp(dt[t]·A):

    h[t] = a[t]·h[t-1] + (dt[t]·x[t]) ⊗ B[t]        y[t] = h[t]·C[t] + D·x[t]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_crsm import CRSMConfig


@dataclass
class RecurrentState:
    """What the model remembers of a batch: for every layer the last K-1 inputs of the convolution, and h."""

    conv_LBCK: list[Tensor]
    ssm_LBHPN: list[Tensor]
    seen: int = 0
    """Tokens consumed, padding included."""
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Goes on with other beams."""
        self.conv_LBCK = [conv.index_select(0, beam_idx.to(conv.device)) for conv in self.conv_LBCK]
        self.ssm_LBHPN = [ssm.index_select(0, beam_idx.to(ssm.device)) for ssm in self.ssm_LBHPN]


def at_least_fp32(x: Tensor) -> Tensor:
    """What norms and the recurrence compute in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(nn.Module):
    """x / rms(x) · weight; of ``x · silu(gate)`` where there is a gate."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        return F.rms_norm(at_least_fp32(x), self.weight.shape, at_least_fp32(self.weight), self.eps).to(x.dtype)


def state_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BN: Tensor, C_BN: Tensor, h_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: h·C (B, H, P), and the new state."""
    added_BHPN = (x_BHP * dt_BH[..., None])[..., None] * B_BN[:, None, None]
    h_BHPN = h_BHPN * (dt_BH * A_H).exp()[..., None, None] + added_BHPN
    return (h_BHPN @ C_BN[:, None, :, None]).squeeze(-1), h_BHPN


def chunk_scan(
    x_BQHP: Tensor, dt_BQH: Tensor, A_H: Tensor, B_BQN: Tensor, C_BQN: Tensor, h_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The same over a chunk of tokens, all at once: h·C (B, Q, H, P), and the last state."""
    length = x_BQHP.shape[1]
    decay_BHQ = (dt_BQH * A_H).cumsum(dim=1).transpose(1, 2)  # logarithm of the product from the chunk's start
    later_QQ = torch.ones(length, length, dtype=torch.bool, device=x_BQHP.device).triu(1)
    log_BHQQ = (decay_BHQ[..., :, None] - decay_BHQ[..., None, :]).masked_fill(later_QQ, -torch.inf)
    dtx_BHQP = (x_BQHP * dt_BQH[..., None]).transpose(1, 2)
    scores_BQQ = C_BQN @ B_BQN.transpose(1, 2)
    inside_BHQP = (scores_BQQ[:, None] * log_BHQQ.exp()) @ dtx_BHQP
    before_BHQP = (C_BQN[:, None] @ h_BHPN.transpose(2, 3)) * decay_BHQ.exp()[..., None]
    leaving_BHQ = (decay_BHQ[..., -1:] - decay_BHQ).exp()
    added_BHPN = (dtx_BHQP * leaving_BHQ[..., None]).transpose(2, 3) @ B_BQN[:, None]
    h_BHPN = h_BHPN * decay_BHQ.exp()[..., -1, None, None] + added_BHPN
    return (inside_BHQP + before_BHQP).transpose(1, 2), h_BHPN


class Mixer(nn.Module):
    """Projection, short convolution, recurrence, gated norm, projection."""

    def __init__(self, config: CRSMConfig) -> None:
        super().__init__()
        self.inner = config.expand * config.d_model
        self.heads, self.d_state, self.chunk_size = self.inner // config.headdim, config.d_state, config.chunk_size
        channels = self.inner + 2 * self.d_state
        self.in_proj = nn.Linear(config.d_model, self.inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        dt_H = torch.exp(torch.rand(self.heads) * math.log(100) + math.log(0.001))
        self.dt_bias = nn.Parameter(dt_H + torch.log(-torch.expm1(-dt_H)))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.inner, config.norm_eps)
        self.out_proj = nn.Linear(self.inner, config.d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, conv_BCK: Tensor, h_BHPN: Tensor, mask_BT1: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mask_BT1 is not None:  # padding says nothing to the convolution …
            x_BTD = x_BTD * mask_BT1
        z_BTE, xBC_BTC, dt_BTH = self.in_proj(x_BTD).split(
            [self.inner, self.inner + 2 * self.d_state, self.heads], dim=-1
        )
        window_BCT = torch.cat([conv_BCK.to(xBC_BTC.dtype), xBC_BTC.transpose(1, 2)], dim=2)
        conv_BCK = window_BCT[:, :, window_BCT.shape[2] - conv_BCK.shape[2] :]
        xBC_BCT = F.conv1d(window_BCT, self.conv1d.weight, self.conv1d.bias, groups=self.conv1d.groups)
        xBC_BTC = at_least_fp32(F.silu(xBC_BCT.transpose(1, 2)))
        if mask_BT1 is not None:  # … and nothing to the state, which stays zero until the text begins
            xBC_BTC = xBC_BTC * mask_BT1
        x_BTE, B_BTN, C_BTN = xBC_BTC.split([self.inner, self.d_state, self.d_state], dim=-1)
        x_BTHP = x_BTE.unflatten(-1, (self.heads, -1))
        dt_BTH = F.softplus(at_least_fp32(dt_BTH) + at_least_fp32(self.dt_bias))
        A_H = -at_least_fp32(self.A_log).exp()
        y_BTHP, h_BHPN = self._scan(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, h_BHPN)
        y_BTE = (y_BTHP + at_least_fp32(self.D)[:, None] * x_BTHP).flatten(2).to(x_BTD.dtype)
        return self.out_proj(self.norm(y_BTE, z_BTE)), conv_BCK, h_BHPN

    def _scan(
        self, x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTN: Tensor, C_BTN: Tensor, h_BHPN: Tensor
    ) -> tuple[Tensor, Tensor]:
        if x_BTHP.shape[1] == 1:
            y_BHP, h_BHPN = state_step(x_BTHP[:, 0], dt_BTH[:, 0], A_H, B_BTN[:, 0], C_BTN[:, 0], h_BHPN)
            return y_BHP[:, None], h_BHPN
        pieces = []
        for start in range(0, x_BTHP.shape[1], self.chunk_size):
            part = slice(start, start + self.chunk_size)
            y_BQHP, h_BHPN = chunk_scan(x_BTHP[:, part], dt_BTH[:, part], A_H, B_BTN[:, part], C_BTN[:, part], h_BHPN)
            pieces.append(y_BQHP)
        return torch.cat(pieces, dim=1), h_BHPN


class Layer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: CRSMConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def forward(
        self, x_BTD: Tensor, conv_BCK: Tensor, h_BHPN: Tensor, mask_BT1: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y_BTD, conv_BCK, h_BHPN = self.mixer(self.norm(x_BTD), conv_BCK, h_BHPN, mask_BT1)
        return x_BTD + y_BTD, conv_BCK, h_BHPN


class Backbone(nn.Module):
    """Embedding, L residual layers, and the last norm, which is applied to their mixture."""

    def __init__(self, config: CRSMConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class Fusion(nn.Module):
    """The mixture over layers that the logits are read from."""

    def __init__(self, n_layer: int) -> None:
        super().__init__()
        self.logits_L = nn.Parameter(torch.zeros(n_layer))

    def forward(self, hidden_BTLD: Tensor) -> Tensor:
        return (self.logits_L.softmax(dim=0)[:, None].to(hidden_BTLD.dtype) * hidden_BTLD).sum(dim=-2)


class CRSMForCausalLM(PreTrainedModel, GenerationMixin):
    """System 1, with the way to System 2."""

    config_class = CRSMConfig
    base_model_prefix = "backbone"
    _is_stateful = True  # a recurrent state cannot be cut back, as speculative decoding would
    _no_split_modules: ClassVar = ["Layer"]
    _keep_in_fp32_modules_strict: ClassVar = ["A_log", "dt_bias", "D", "fusion"]

    def __init__(self, config: CRSMConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.fusion = Fusion(config.n_layer)
        self._system_2: Any = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the checkpoint, or are what the constructors made."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # it makes its own: a state, no keys and values

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def initial_state(self, batch_size: int) -> RecurrentState:
        """The state before the first token: zeros."""
        config, weight = self.config, self.backbone.embedding.weight
        inner = config.expand * config.d_model
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        conv_BCK = weight.new_zeros(batch_size, inner + 2 * config.d_state, config.d_conv - 1)
        heads = inner // config.headdim
        ssm_BHPN = weight.new_zeros(batch_size, heads, config.headdim, config.d_state, dtype=wide)
        return RecurrentState([conv_BCK] * config.n_layer, [ssm_BHPN] * config.n_layer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Consumes a piece of text.

        Args:
            input_ids, inputs_embeds: the piece (B, T) or its embeddings; exactly one of them.
            attention_mask: (B, T) or (B, tokens before + T); zeros only before the text of a row.
            past_key_values: the state to go on from, as an earlier call returned it; None: the beginning.
            labels: (B, T); position t is compared with the logits of t-1, -100 with none.
            use_cache: whether the state after the last token is returned.
            output_hidden_states: whether the residual stream after the embedding and after every layer is.
            logits_to_keep: of the last positions; 0: of all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("allowed: exactly one of input_ids and inputs_embeds")
        x_BTD = self.backbone.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        state = past_key_values if past_key_values is not None else self.initial_state(len(x_BTD))
        mask_BT1 = _left_padding(attention_mask, x_BTD, state)
        hidden, conv_states, ssm_states = [x_BTD], [], []
        for layer, conv_BCK, ssm_BHPN in zip(self.backbone.layers, state.conv_LBCK, state.ssm_LBHPN, strict=True):
            x_BTD, conv_BCK, ssm_BHPN = layer(x_BTD, conv_BCK, ssm_BHPN, mask_BT1)
            hidden.append(x_BTD)
            conv_states.append(conv_BCK)
            ssm_states.append(ssm_BHPN)
        kept_BTLD = torch.stack([layer_BTD[:, -logits_to_keep:] for layer_BTD in hidden[1:]], dim=2)
        head = self.backbone.embedding if self.lm_head is None else self.lm_head
        logits_BTV = F.linear(self.backbone.norm_f(self.fusion(kept_BTLD)), head.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=(
                RecurrentState(conv_states, ssm_states, state.seen + x_BTD.shape[1])
                if (self.config.use_cache if use_cache is None else use_cache)
                else None
            ),
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: RecurrentState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """The tokens that the state has not consumed; all of them where there is no state."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        if past_key_values is None and inputs_embeds is not None:
            inputs["inputs_embeds"] = inputs_embeds
        elif past_key_values is None:
            inputs["input_ids"] = input_ids
        else:
            whole = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            inputs["input_ids"] = input_ids[:, -max(1, whole - past_key_values.seen) :]
        return inputs | {"use_cache": True if use_cache is None else use_cache, "logits_to_keep": 1}

    # ------------------------------------------------------------------------------------------------- System 2

    @torch.no_grad()
    def generate_with_plans(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        settings: Iterable[str] = (),
        seed: int | None = None,
    ) -> Tensor:
        """Like ``generate``, with planners that search ahead while System 1 speaks. Runs on the CPU.

        The package ``crsm`` reads the weights of both systems from this model's folder or repository: changes made to
        this object's weights are not seen.

        Args:
            input_ids, attention_mask: prompts (B, T), padded on the left.
            settings: changes of the model's own settings: ``"deliberation.lag=1"``, ``"sampling.max_tokens=32"``, …
            seed: of sampling and search; None: the settings'.

        Returns:
            Prompts and answers (B, T'), padded on the right.

        Raises:
            ImportError: ``crsm`` is not installed.
        """
        try:
            from crsm.release.system_2 import System2
        except ImportError as error:
            raise ImportError(f"generate_with_plans needs the package crsm; pip install crsm ({error})") from error
        if self._system_2 is None:
            self._system_2 = System2.load(self.config._name_or_path)
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask_BT, strict=True)]
        answers = self._system_2.generate(prompts, settings, seed)
        tails = [torch.tensor(answer, dtype=input_ids.dtype, device=input_ids.device) for answer in answers]
        padding = self.generation_config.pad_token_id or 0
        tails_BT = nn.utils.rnn.pad_sequence(tails, batch_first=True, padding_value=padding)
        return torch.cat([input_ids, tails_BT], dim=1)


def _left_padding(attention_mask: Tensor | None, x_BTD: Tensor, state: RecurrentState) -> Tensor | None:
    """The mask of these tokens (B, T, 1), None where nothing is padded.

    Raises:
        ValueError: the mask has another shape, or a zero after a one: what a state has consumed cannot be skipped.
    """
    batch, length = x_BTD.shape[:2]
    if attention_mask is None or (length == 1 and state.seen):
        return None
    if attention_mask.shape not in ((batch, length), (batch, state.seen + length)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; allowed: {(batch, length)} or "
            f"{(batch, state.seen + length)}"
        )
    if bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise ValueError("attention_mask has a zero after a one; allowed: padding on the left (padding_side='left')")
    mask_BT = attention_mask[:, -length:]
    return None if bool(mask_BT.all()) else mask_BT[..., None].to(x_BTD.dtype)
