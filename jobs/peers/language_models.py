"""Language models of the size of one of ours, of Hugging Face and mamba-ssm, as a stage of the same training loop.

Same rows in the same order, same optimizer, schedule, clipping and loss (cross-entropy at the same targets), same
evaluation: what differs is the model and where its weights start. A peer has no critics, so nothing of it is judged,
and it has no reset at the border of two documents in a row. ``torch.compile`` makes both about twice as fast here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crsm.config import BackboneConfig, BackboneStageConfig
from crsm.data.sequences import Batch
from crsm.data.tokenizer import Tokenizer
from crsm.model import CRSM
from crsm.tasks.base import Task
from crsm.training.rows import BackboneRows
from crsm.training.stage import Metrics, Stage, scalar

TEXT_PEERS = ("mamba2", "gpt2")
"""Of Hugging Face, on any device."""
PEERS = (*TEXT_PEERS, "mamba_ssm")
"""The last is ``mamba_ssm.MambaLMHeadModel``, on a GPU."""
_POSITIONS = 1024
_HEAD = 64
"""Width of an attention head, as in GPT-2."""
_PADDED = 64
"""Rows of a compiled model have a multiple of so many tokens: a graph for each of a few shapes. (One graph for all
shapes is what torch's compiler cannot make of transformers' Mamba-2.)"""


class NotInstalledError(ValueError):
    """A peer's library is missing, or cannot be loaded."""


def build_peer(name: str, sizes: BackboneConfig) -> nn.Module:
    """A freshly initialised peer (from torch's global generator).

    ``mamba2`` and ``mamba_ssm`` have the very sizes of our backbone; ``gpt2`` its width, and as many layers as come
    closest to its number of parameters.

    Raises:
        ValueError: an unknown peer, or a width that does not divide into attention heads.
        NotInstalledError: its library is not there.
    """
    if name not in PEERS:
        raise ValueError(f"peer {name!r}; allowed: {', '.join(PEERS)}")
    if name == "mamba_ssm":
        return _mamba_ssm(sizes)
    if name == "mamba2":
        from transformers import Mamba2Config, Mamba2ForCausalLM

        return Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=sizes.vocab_size,
                hidden_size=sizes.d_model,
                num_hidden_layers=sizes.n_layer,
                state_size=sizes.d_state,
                head_dim=sizes.headdim,
                num_heads=sizes.n_heads,
                expand=sizes.expand,
                conv_kernel=sizes.d_conv,
                chunk_size=sizes.chunk_size,
                layer_norm_epsilon=sizes.norm_eps,
                tie_word_embeddings=sizes.tie_embeddings,
                n_groups=1,
                use_cache=False,
            )
        )
    from transformers import GPT2Config, GPT2LMHeadModel

    width = sizes.d_model
    if width % _HEAD and width > _HEAD:
        raise ValueError(f"model.backbone.d_model = {width}; allowed for gpt2: a multiple of {_HEAD}")
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=sizes.vocab_size,
            n_positions=_POSITIONS,
            n_embd=width,
            n_layer=gpt2_layers(sizes),
            n_head=max(1, width // _HEAD),
            resid_pdrop=0.0,  # every row is seen once
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=sizes.tie_embeddings,
            use_cache=False,
        )
    )


def _mamba_ssm(sizes: BackboneConfig) -> nn.Module:
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except Exception as error:  # its extensions fail in ways of their own
        raise NotInstalledError(f"it is not installed: {error}") from None
    ssm = {"layer": "Mamba2", "d_state": sizes.d_state, "d_conv": sizes.d_conv, "expand": sizes.expand}
    model: nn.Module = MambaLMHeadModel(
        MambaConfig(
            d_model=sizes.d_model,
            n_layer=sizes.n_layer,
            vocab_size=sizes.vocab_size,
            ssm_cfg=ssm | {"headdim": sizes.headdim, "chunk_size": sizes.chunk_size},
            pad_vocab_size_multiple=1,
            tie_embeddings=sizes.tie_embeddings,
        )
    )
    return model


def gpt2_layers(sizes: BackboneConfig) -> int:
    """Layers of a GPT-2 of the backbone's width whose parameters come closest to the backbone's."""
    width, inner, state, heads = sizes.d_model, sizes.d_inner, sizes.d_state, sizes.n_heads
    mixer = width * (2 * inner + 2 * state + heads) + inner * width  # projections
    mixer += (inner + 2 * state) * (sizes.d_conv + 1) + 3 * heads + inner + width  # convolution, A, D, dt, norms
    block = 12 * width**2 + 13 * width
    return max(1, round((mixer * sizes.n_layer + width - (_POSITIONS + 2) * width) / block))


def language_parameters(model: nn.Module) -> int:
    """Parameters that say the next token: all of a peer's; of ours backbone, head and fusion."""
    if isinstance(model, CRSM):
        counts = model.num_parameters()
        return counts["backbone"] + counts["lm_head"] + counts["fusion"]
    return sum(parameter.numel() for parameter in model.parameters())


class PeerStage(Stage):
    """Stage 1 of a peer: its rows without what only critics need."""

    name = "peer"
    settings: BackboneStageConfig

    def __init__(
        self,
        peer: nn.Module,
        settings: BackboneStageConfig,
        seed: int,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        compiled: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        if compiled:
            peer.compile(dynamic=False)
        self.multiple = _PADDED if compiled else 1
        self.peer, self.settings, self.seed, self.world = peer, settings, seed, 1
        self.rows = BackboneRows(settings, seed, tasks, tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.peer.parameters()).device

    def batch(self, step: int, micro: int, rank: int, world: int) -> list[Batch]:
        return self.rows.batch(step, micro, rank, world)

    def forward(self, batch: list[Batch]) -> tuple[Tensor, Metrics]:
        loss = torch.zeros((), device=self.device)
        metrics: Metrics = {}
        for part in batch:
            own = self.cross_entropy(part)
            metrics[f"loss/{self.rows.name(part)}"] = scalar(own) / max(1, int(part.targets_mask_BT.sum()))
            loss = loss + self.world / part.step_targets * own
        metrics["loss"] = scalar(loss)
        return loss, metrics

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Of the next token, summed over the targets. Padding follows what is real, so nothing sees it."""
        tokens_BT = torch.from_numpy(batch.tokens_BT).to(self.device)
        target_BT = torch.from_numpy(batch.targets_mask_BT).to(self.device)[:, 1:]
        length = tokens_BT.shape[1]
        padded_BT = F.pad(tokens_BT, (0, -length % self.multiple))
        logits_BTV = self.peer(input_ids=padded_BT).logits[:, :length]
        return F.cross_entropy(logits_BTV[:, :-1][target_BT], tokens_BT[:, 1:][target_BT], reduction="sum")

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Held-out loss of every task; loss, perplexity and bits per byte of every source of text."""
        metrics: Metrics = {}
        for part in self.rows.held_out():
            loss = scalar(self.cross_entropy(part)) / int(part.targets_mask_BT.sum())
            metrics[f"valid/loss/{self.rows.name(part)}"] = loss
        return metrics | self.held_out_text(self.settings.evaluate_problems)

    @torch.no_grad()
    def held_out_text(self, rows: int) -> Metrics:
        """Figures of at most so many rows of each source."""
        return self.rows.held_out_text(lambda part: scalar(self.cross_entropy(part)), rows)
