"""Stage 1: backbone, fusion and critics, on text, solutions, and attempts with their verdict.

``loss = CE(next token) + value_weight · BCE(value heads, outcome) − fusion_entropy · H(fusion)``

The critics learn from whole attempts, right and wrong ones, together with the backbone: value heads that are added to a
frozen backbone afterwards learn nothing, because nothing in its state then tells good from bad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.config import BackboneStageConfig
from crsm.data.loader import TextLoader
from crsm.data.mixture import build_mixture
from crsm.data.sequences import TEXT, Batch, training_batch
from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.statistics import roc_auc
from crsm.kernels.reference import full_precision
from crsm.model import CRSM
from crsm.tasks.base import Task
from crsm.training.stage import Metrics, Stage, scalar, tensor_for

_EVALUATION_ROWS = 8
"""Rows of held-out text that are looked at together."""


class BackboneStage(Stage):
    name = "stage_1"
    trains = ("backbone", "lm_head", "fusion", "critic")
    settings: BackboneStageConfig

    def __init__(
        self, model: CRSM, settings: BackboneStageConfig, seed: int, tasks: Sequence[Task], tokenizer: Tokenizer
    ) -> None:
        super().__init__(model, settings, seed)
        self.tasks, self.tokenizer = tasks, tokenizer
        self.text = None if settings.text is None else TextLoader(settings.text, tokenizer, seed)
        self.mixture = None
        if settings.text is not None or settings.curriculum:
            accumulate = settings.optimizer.accumulate
            self.mixture = build_mixture(
                settings,
                {task.name: task.weight for task in tasks},
                {} if self.text is None else self.text.tokens(),
                rows=settings.batch // accumulate,
                steps=settings.steps * accumulate,
            )

    def batch(self, step: int, micro: int, rank: int, world: int) -> list[Batch]:
        accumulate = self.settings.optimizer.accumulate
        return training_batch(
            self.tasks,
            self.tokenizer,
            self.settings,
            seed=self.seed,
            step=step * accumulate + micro,
            batch=self.settings.batch // accumulate,
            rank=rank,
            world=world,
            mixture=self.mixture,
            text=self.text,
            every_batch=self.in_step,
        )

    def forward(self, batch: list[Batch]) -> tuple[Tensor, Metrics]:
        entropy = self.model.fusion.entropy()
        loss = -self.settings.fusion_entropy * entropy
        metrics: Metrics = {"fusion_entropy": scalar(entropy)}
        for part in batch:
            lm, value = language_and_value_loss(self.model, part)
            if not part.is_blank:
                name = self._name(part)
                metrics[f"loss/{name}"] = scalar(lm) / max(1, int(part.targets_mask_BT.sum()))
                metrics[f"value_loss/{name}"] = scalar(value) / max(1, int(part.value_mask_BT.sum()))
            # Sums over the whole step's totals: the same loss whatever the number of workers and tasks.
            loss = loss + self.world / part.step_targets * lm
            loss = loss + self.settings.value_weight * self.world / max(1, part.step_values) * value
        metrics["loss"] = scalar(loss)
        return loss, metrics

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Held-out loss, perplexity, and AUC of every layer's value at the answer's last token."""
        metrics: Metrics = {}
        for part in training_batch(
            self.tasks,
            self.tokenizer,
            self.settings,
            seed=self.seed,
            step=0,
            batch=self.settings.evaluate_problems,
            split="valid",
        ):
            lm, _ = language_and_value_loss(self.model, part)
            name = self._name(part)
            metrics[f"valid/loss/{name}"] = scalar(lm) / int(part.targets_mask_BT.sum())
            metrics[f"valid/perplexity/{name}"] = math.exp(metrics[f"valid/loss/{name}"])
            for layer, auc in enumerate(_value_auc(self.model, part)):
                metrics[f"valid/value_auc/{name}/layer_{layer}"] = auc
        return metrics | self._evaluate_text()

    def _evaluate_text(self) -> Metrics:
        """Loss, perplexity and bits per byte of every source with held-out text: the last does not depend on the
        tokenizer."""
        metrics: Metrics = {}
        if self.text is None:
            return metrics
        bytes_V = self.tokenizer.byte_counts
        for source in self.text.tokens("valid"):
            loss, targets, size = 0.0, 0, 0
            for part in self.text.held_out(source, self.settings.evaluate_problems, _EVALUATION_ROWS):
                loss += scalar(language_and_value_loss(self.model, part)[0])
                targets += part.step_targets
                size += int(bytes_V[part.tokens_BT[part.targets_mask_BT]].sum())
            if targets and size:
                metrics[f"valid/loss/{source}"] = loss / targets
                metrics[f"valid/perplexity/{source}"] = math.exp(loss / targets)
                metrics[f"valid/bits_per_byte/{source}"] = loss / math.log(2) / size
        return metrics

    def _name(self, batch: Batch) -> str:
        index = int(batch.task_index_B[0])
        return "text" if index == TEXT else self.tasks[index].name


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
