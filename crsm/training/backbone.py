"""Stage 1: backbone, fusion and critics, on text, solutions, and attempts with their verdict.

``loss = CE(next token) + value_weight · BCE(value heads, outcome) − fusion_entropy · H(fusion)``

The critics learn from whole attempts, right and wrong ones, together with the backbone: value heads that are added to a
frozen backbone of this size afterwards learn nothing, because nothing in its state then tells good from bad. Imported
weights have seen more, so that there the critics may be trained alone (``freeze_backbone``): the loss is then the BCE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.config import BackboneStageConfig
from crsm.data.sequences import Batch
from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.statistics import roc_auc
from crsm.kernels.reference import full_precision
from crsm.model import CRSM
from crsm.tasks.base import Task
from crsm.training.rows import BackboneRows
from crsm.training.stage import Metrics, Stage, scalar, tensor_for


class BackboneStage(Stage):
    name = "stage_1"
    trains: tuple[str, ...] = ("backbone", "lm_head", "fusion", "critic")
    settings: BackboneStageConfig

    def __init__(
        self, model: CRSM, settings: BackboneStageConfig, seed: int, tasks: Sequence[Task], tokenizer: Tokenizer
    ) -> None:
        if settings.freeze_backbone:
            self.trains = ("critic",)
            if without := [task.name for task in tasks if not task.has_attempts]:
                raise ValueError(
                    f"stage_1.freeze_backbone with task {without[0]!r}, which has no attempts to learn from; allowed: "
                    "tasks that make them, or gsm8k with attempts_path (jobs.pipeline makes them)"
                )
        super().__init__(model, settings, seed)
        self.rows = BackboneRows(settings, seed, tasks, tokenizer)

    def batch(self, step: int, micro: int, rank: int, world: int) -> list[Batch]:
        return self.rows.batch(step, micro, rank, world, every_batch=self.in_step)

    def forward(self, batch: list[Batch]) -> tuple[Tensor, Metrics]:
        if self.settings.freeze_backbone:
            return self._value_loss(batch)
        entropy = self.model.fusion.entropy()
        loss = -self.settings.fusion_entropy * entropy
        metrics: Metrics = {"fusion_entropy": scalar(entropy)}
        for part in batch:
            lm, value = language_and_value_loss(self.model, part)
            if not part.is_blank:
                name = self.rows.name(part)
                metrics[f"loss/{name}"] = scalar(lm) / max(1, int(part.targets_mask_BT.sum()))
                metrics[f"value_loss/{name}"] = scalar(value) / max(1, int(part.value_mask_BT.sum()))
            # Sums over the whole step's totals: the same loss whatever the number of workers and tasks.
            loss = loss + self.world / part.step_targets * lm
            loss = loss + self.settings.value_weight * self.world / max(1, part.step_values) * value
        metrics["loss"] = scalar(loss)
        return loss, metrics

    def _value_loss(self, batch: list[Batch]) -> tuple[Tensor, Metrics]:
        """Of the critics alone."""
        metrics: Metrics = {}
        loss = 0.0 * self.model.critic.bias_L.sum()  # a worker's part may hold no judged token
        for part in batch:
            value_BT = tensor_for(self.model, part.value_mask_BT)
            with torch.no_grad():
                hidden_BTLD, _ = self.model.backbone(
                    tensor_for(self.model, part.tokens_BT), segment_BT=_segments(self.model, part)
                )
            outcome_M = tensor_for(self.model, part.outcome_BT)[value_BT]
            value = value_loss(self.model, hidden_BTLD[value_BT], outcome_M).sum()
            metrics[f"value_loss/{self.rows.name(part)}"] = scalar(value) / max(1, int(part.value_mask_BT.sum()))
            loss = loss + self.settings.value_weight * self.world / max(1, part.step_values) * value
        metrics["loss"] = scalar(loss)
        return loss, metrics

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Held-out loss, perplexity, and AUC of every layer's value at the answer's last token."""
        metrics: Metrics = {}
        for part in self.rows.held_out():
            lm, _ = language_and_value_loss(self.model, part)
            name = self.rows.name(part)
            metrics[f"valid/loss/{name}"] = scalar(lm) / int(part.targets_mask_BT.sum())
            metrics[f"valid/perplexity/{name}"] = math.exp(metrics[f"valid/loss/{name}"])
            for layer, auc in enumerate(_value_auc(self.model, part)):
                metrics[f"valid/value_auc/{name}/layer_{layer}"] = auc
        return metrics | self.rows.held_out_text(lambda part: scalar(language_and_value_loss(self.model, part)[0]))


def language_and_value_loss(model: CRSM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, and BCE of the values: sums over the batch's positions."""
    tokens_BT = tensor_for(model, batch.tokens_BT)
    hidden_BTLD, _ = model.backbone(tokens_BT, segment_BT=_segments(model, batch))
    # Logits only where they are needed: closed tasks train on answers, a small part of the tokens.
    target_BT = tensor_for(model, batch.targets_mask_BT)[:, 1:]
    logits_MV = model.logits(hidden_BTLD[:, :-1][target_BT])
    lm = F.cross_entropy(logits_MV, tokens_BT[:, 1:][target_BT], reduction="sum")
    value_BT = tensor_for(model, batch.value_mask_BT)
    if not bool(value_BT.any()):
        return lm, lm.new_zeros(())
    return lm, value_loss(model, hidden_BTLD[value_BT], tensor_for(model, batch.outcome_BT)[value_BT]).sum()


def value_loss(model: CRSM, hidden_MLD: Tensor, outcome_M: Tensor) -> Tensor:
    """BCE to outcomes (or soft targets): mean over the value heads, plus the consensus mixture's; (M,)."""
    with full_precision(hidden_MLD):
        logits_ML = model.critic.logits(hidden_MLD)
        target_ML = outcome_M[:, None].expand_as(logits_ML)
        heads_M = F.binary_cross_entropy_with_logits(logits_ML, target_ML, reduction="none").mean(dim=1)
        # The heads are shielded from the second term: it only teaches the consensus whom to trust.
        mixed_M = (model.critic.consensus_weights_L * logits_ML.detach().sigmoid()).sum(dim=1).clamp(1e-6, 1 - 1e-6)
        return heads_M + F.binary_cross_entropy(mixed_M, outcome_M, reduction="none")


def _segments(model: CRSM, batch: Batch) -> Tensor | None:
    return tensor_for(model, batch.segment_BT) if batch.packed else None


def _value_auc(model: CRSM, batch: Batch) -> list[float]:
    """Per layer, at the last judged token of every answer."""
    value_BT = batch.value_mask_BT
    if not value_BT.any():
        return []
    last_BT = value_BT & ~np.pad(value_BT[:, 1:], ((0, 0), (0, 1)))
    hidden_BTLD, _ = model.backbone(tensor_for(model, batch.tokens_BT), segment_BT=_segments(model, batch))
    values_ML = model.critic(hidden_BTLD[tensor_for(model, last_BT)]).cpu().numpy()
    outcome_M = batch.outcome_BT[last_BT]
    return [roc_auc(values_ML[:, layer], outcome_M) for layer in range(values_ML.shape[1])]
