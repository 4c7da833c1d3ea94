"""Stage 2: the world model, on traces of the frozen backbone, from every position a planner may be asked at.

Per unrolled step: ``policy_weight · KL(backbone ‖ imagined) + value_weight · BCE(values) + cosine_weight · (1 − cos)``,
where policy and values are read from the imagined residual stream by the backbone's own fused head and critics. All
roots are unrolled at once: as the token index advances, the roots whose future is used up drop out. A model trained
only from the end of the prompt predicts nonsense from later positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.config import DynamicsStageConfig
from crsm.data.sequences import AttemptGroup, attempt_groups
from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.statistics import pairwise_branch_accuracy
from crsm.latent_dynamics import Snapshot, WorldModel
from crsm.model import CRSM
from crsm.tasks.base import Task
from crsm.training.stage import Metrics, Stage, scalar
from crsm.training.traces import Texts, Trace, trace_backbone


class DynamicsStage(Stage):
    name = "stage_2"
    trains = ("world_model",)
    settings: DynamicsStageConfig

    def __init__(
        self, model: CRSM, settings: DynamicsStageConfig, seed: int, tasks: Sequence[Task], tokenizer: Tokenizer
    ) -> None:
        super().__init__(model, settings, seed)
        self.tasks, self.tokenizer = tasks, tokenizer

    def batch(self, step: int, micro: int, rank: int, world: int) -> list[AttemptGroup]:
        settings = self.settings
        accumulate = settings.optimizer.accumulate
        return attempt_groups(
            self.tasks,
            self.tokenizer,
            attempts=settings.attempts,
            seed=self.seed,
            step=step * accumulate + micro,
            batch=settings.batch // accumulate,
            rank=rank,
            world=world,
        )

    def forward(self, batch: list[AttemptGroup]) -> tuple[Tensor, Metrics]:
        settings = self.settings
        # Attached to the weights also where this worker's texts end before all roots.
        loss = 0.0 * self.model.world_model.encoder.bias.sum()
        metrics: Metrics = {}
        for group in batch:
            texts = Texts.from_group(group, self.world, self.device)
            roots = self._roots(texts)
            trace = trace_backbone(self.model.backbone, texts, roots, self.model.world_model.read_layers)
            rows = rows_of_steps(texts, roots, settings.unroll)
            policy = value = cosine = torch.zeros((), device=self.device)
            for step in unroll(self.model, self.model.world_model, trace, texts, settings.unroll):
                real, judged = rows[step.step - 1]
                policy = policy + step.policy_kl_M.sum() / real / len(rows)
                value = value + (step.value_loss_M * step.judged_M).sum() / max(1, judged) / len(rows)
                cosine = cosine + step.cosine_M.sum() / real / len(rows)
            weighted = settings.policy_weight * policy + settings.value_weight * value + settings.cosine_weight * cosine
            loss = loss + texts.share * weighted
            name = self.tasks[group.task_index].name
            metrics |= {
                # Of this worker's part, as far as it stands for the whole.
                f"policy_kl/{name}": self.world * scalar(policy),
                f"value_loss/{name}": self.world * scalar(value),
                f"cosine_distance/{name}": self.world * scalar(cosine),
            }
        metrics["loss"] = scalar(loss)
        return loss, metrics

    def _roots(self, texts: Texts) -> tuple[int, ...]:
        """Every position of the answers, or some of them at random, the same on every worker."""
        every, count = int(texts.whole.lengths_B.max()), self.settings.roots
        if count is None or count >= every:
            return tuple(range(every))
        # From the texts themselves, so that the loss stays a function of its batch.
        picked = np.random.default_rng(texts.whole.checksum).choice(every, size=count, replace=False)
        return tuple(sorted(int(root) for root in picked))

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        metrics: Metrics = {}
        for task, rows in self._fidelity().items():
            for row in rows:
                for key in ("policy_kl", "value_error", "branch_accuracy"):
                    metrics[f"valid/{key}/{task}/step_{int(row['step'])}"] = row[key]
        return metrics

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        table = self._fidelity()
        horizon = trust_horizon(table, self.settings.trust_kl, self.settings.trust_value_error)
        return {"fidelity": table, "trust_horizon": horizon}

    def _fidelity(self) -> Fidelity:
        return fidelity(self.model, self.model.world_model, self.tasks, self._held_out(), self.settings.unroll)

    def _held_out(self) -> list[AttemptGroup]:
        return attempt_groups(
            self.tasks,
            self.tokenizer,
            attempts=self.settings.attempts,
            seed=self.seed,
            step=0,
            batch=max(len(self.tasks), self.settings.evaluate_problems),
            split="valid",
        )


class UnrolledStep(NamedTuple):
    """How well step ``step`` of the imagination agrees with the backbone, over M = active roots × sequences."""

    step: int
    policy_kl_M: Tensor
    value_loss_M: Tensor
    value_error_M: Tensor
    cosine_M: Tensor
    consensus_M: Tensor
    """Consensus of the imagined values."""
    judged_M: Tensor
    """Rows that do not stand on the verdict: value heads are not trained there."""
    last_M: Tensor
    """Rows that stand on the last token before the verdict."""
    index_M: Tensor
    """Sequence of each row."""


def rows_of_steps(texts: Texts, roots: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """How many rows of the whole group, over all workers, each unrolled step has, and how many of them are judged; as
    many steps as have any."""
    consumed_SR = np.arange(1, steps + 1)[:, None] + np.asarray(roots)
    lengths_B = texts.whole.lengths_B
    real_S = (consumed_SR[..., None] <= lengths_B).sum(axis=(1, 2))
    judged_S = (consumed_SR[..., None] < lengths_B).sum(axis=(1, 2))
    return [(int(real), int(judged)) for real, judged in zip(real_S, judged_S, strict=True) if real]


def masked_mean(x_M: Tensor, mask_M: Tensor) -> Tensor:
    """Mean where the mask holds; 0 where it holds nowhere."""
    return (x_M * mask_M).sum() / mask_M.sum().clamp_min(1)


def unroll(model: CRSM, world_model: WorldModel, trace: Trace, texts: Texts, steps: int) -> Iterator[UnrolledStep]:
    """Unrolls the world model along the answers from all roots at once and compares it with the backbone."""
    sequences = len(texts.answer_BT)
    # Not the width of the rows: one worker's part of a step may hold none that is as long as the padding.
    tokens = int(texts.length_B.max())
    device = texts.answer_BT.device
    roots_R = torch.tensor(trace.roots, device=device)
    with torch.no_grad():
        target_SBV = model.logits(trace.hidden_SBLD).log_softmax(dim=-1)
        value_SBL = model.critic(trace.hidden_SBLD)
    conv = None
    if world_model.needs_conv:
        conv = torch.cat([torch.stack([layer.conv_BCK for layer in state.layers], dim=1) for state in trace.states_R])
    snapshot = Snapshot(trace.hidden_SBLD[roots_R].flatten(0, 1), trace.memory_RBMHPN.flatten(0, 1), conv)
    latent = world_model.begin(snapshot)
    for step in range(1, steps + 1):
        active = int((roots_R + step <= tokens).sum())
        if active == 0:
            return
        rows = slice(0, active * sequences)
        latent, snapshot = tuple(part[rows] for part in latent), snapshot.rows(rows)
        consumed_R = roots_R[:active] + step
        latent, imagined_MLD = world_model.advance(latent, snapshot, texts.answer_BT.T[consumed_R - 1].flatten())
        real_M = (consumed_R[:, None] <= texts.length_B).flatten()
        position_M = consumed_R.repeat_interleave(sequences)[real_M]
        index_M = torch.arange(sequences, device=device).repeat(active)[real_M]
        imagined_MLD = imagined_MLD[real_M]
        target_MV = target_SBV[consumed_R].flatten(0, 1)[real_M]
        value_ML = value_SBL[consumed_R].flatten(0, 1)[real_M]
        predicted_MV = model.logits(imagined_MLD).log_softmax(dim=-1)
        logits_ML = model.critic.logits(imagined_MLD)
        imagined_ML = logits_ML.detach().sigmoid()
        hidden_MLD = trace.hidden_SBLD[consumed_R].flatten(0, 1)[real_M]
        yield UnrolledStep(
            step=step,
            policy_kl_M=(target_MV.exp() * (target_MV - predicted_MV)).sum(dim=-1),
            value_loss_M=F.binary_cross_entropy_with_logits(logits_ML, value_ML, reduction="none").mean(dim=-1),
            value_error_M=(imagined_ML - value_ML).abs().mean(dim=-1),
            cosine_M=1 - F.cosine_similarity(imagined_MLD, hidden_MLD, dim=-1).mean(dim=-1),
            consensus_M=model.critic.consensus(imagined_ML),
            judged_M=position_M < texts.length_B[index_M],
            last_M=position_M == texts.length_B[index_M] - 1,
            index_M=index_M,
        )


Fidelity = dict[str, list[dict[str, float]]]
"""Per task, a row per number of imagined steps."""


MAX_ROOTS = 16
"""Roots of a fidelity measurement, evenly spaced over the answers (memory grows with them)."""


@torch.no_grad()
def fidelity(
    model: CRSM, world_model: WorldModel, tasks: Sequence[Task], groups: list[AttemptGroup], steps: int
) -> Fidelity:
    """Per task and number of imagined steps: policy KL (nats), value error, cosine, and branch accuracy.

    Branch accuracy is the share of pairs of attempts at one problem, one right and one wrong, imagined up to the last
    token before the verdict, whose order the imagined consensus gets right.
    """
    table: Fidelity = {}
    for group in groups:
        texts = Texts.from_group(group, device=model.lm_head.weight.device)
        every = texts.answer_BT.shape[1]
        roots = tuple(sorted({every * place // MAX_ROOTS for place in range(MAX_ROOTS)}))
        trace = trace_backbone(model.backbone, texts, roots, world_model.read_layers)
        table[tasks[group.task_index].name] = [
            {
                "step": float(step.step),
                "policy_kl": scalar(step.policy_kl_M.mean()),
                "value_error": scalar(masked_mean(step.value_error_M, step.judged_M)),
                "cosine": 1.0 - scalar(step.cosine_M.mean()),
                "branch_accuracy": _branch_accuracy(step, texts),
            }
            for step in unroll(model, world_model, trace, texts, steps)
        ]
    return table


def _branch_accuracy(step: UnrolledStep, texts: Texts) -> float:
    index = step.index_M[step.last_M].cpu().numpy()
    value = step.consensus_M[step.last_M].cpu().numpy()
    if len(index) == 0:
        return float("nan")
    return pairwise_branch_accuracy(value, texts.outcome_B[index], texts.problem_B[index])


def trust_horizon(table: Fidelity, kl: float, value_error: float) -> int:
    """Steps over which every task's mean policy KL and value error stay within the bounds, without a gap.

    A task whose answers have ended by a step says nothing of it.
    """
    horizon = 0
    for step in range(1, max(len(rows) for rows in table.values()) + 1):
        rows = [task[step - 1] for task in table.values() if len(task) >= step]
        # Written so that a NaN ends it too.
        if not all(row["policy_kl"] <= kl and row["value_error"] <= value_error for row in rows):
            break
        horizon = step
    return horizon
