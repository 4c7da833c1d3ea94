"""Stage 3: the critics, on roll-outs of System 1 and System 2 labelled by their verified outcome.

The labels are outcomes and nothing else: which system made an answer does not matter. The backbone stays frozen.
Afterwards the critics are measured on held-out problems; their *pairwise branch accuracy* decides whether stage 4 may
open the gates, since a search with a poor judge does harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crsm.config import JudgmentStageConfig
from crsm.data.sequences import AttemptGroup, Batch, attempt_groups, make_batch
from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.rollouts import Rollout
from crsm.evaluation.statistics import expected_calibration_error, pairwise_branch_accuracy, roc_auc
from crsm.model import CRSM
from crsm.tasks.base import Task, keyed_rng
from crsm.training.backbone import value_loss
from crsm.training.dynamics import unroll
from crsm.training.stage import Metrics, Stage, scalar, tensor_for
from crsm.training.traces import Texts, trace_backbone


class JudgmentStage(Stage):
    name = "stage_3"
    trains = ("critic",)
    settings: JudgmentStageConfig

    def __init__(
        self,
        model: CRSM,
        settings: JudgmentStageConfig,
        seed: int,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        rollouts: Sequence[Rollout],
    ) -> None:
        super().__init__(model, settings, seed)
        if not rollouts:
            raise ValueError("rollouts is empty; allowed: at least one roll-out")
        self.tasks, self.tokenizer = tasks, tokenizer
        self._sequences = [rollout.sequence(tokenizer.terminal_ids) for rollout in rollouts]

    def batch(self, step: int, micro: int, rank: int, world: int) -> Batch:
        settings = self.settings
        count = settings.batch // settings.optimizer.accumulate
        rng = keyed_rng("judgment", self.seed, step * settings.optimizer.accumulate + micro)
        picked = rng.integers(0, len(self._sequences), size=count)
        whole = make_batch([self._sequences[index] for index in picked], pad_id=self.tokenizer.pad_id)
        return whole.rows(slice(count * rank // world, count * (rank + 1) // world))

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            hidden_BTLD, _ = self.model.backbone(tensor_for(self.model, batch.tokens_BT))
        value_BT = tensor_for(self.model, batch.value_mask_BT)
        outcome_M = tensor_for(self.model, batch.outcome_BT)[value_BT]
        loss = value_loss(self.model, hidden_BTLD[value_BT], outcome_M).sum() * self.world / batch.step_values
        return loss, {"loss": scalar(loss), "outcome_rate": float(batch.outcome_B.mean())}

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Calibration and ranking on held-out attempts; ``branch_accuracy`` is what the gate to stage 4 looks at."""
        metrics: Metrics = {}
        for name, figures in judge(self.model, self.tasks, self.tokenizer, self.settings, self.seed).items():
            for key, value in figures.items():
                metrics[f"valid/{key}/{name}"] = value
        return metrics

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        table = judge(self.model, self.tasks, self.tokenizer, self.settings, self.seed)
        worst = min(min(row["branch_accuracy"], row["imagined_branch_accuracy"]) for row in table.values())
        return {
            "judgment": table,
            "branch_accuracy": worst,
            # Not "worst >= …": a NaN (nothing to compare) must keep the gates shut too.
            "gates_may_open": bool(worst >= self.settings.gate_accuracy),
        }


HORIZON = 4
"""Imagined steps before the answer's last token from which branches are ranked: what a search typically looks over."""


@torch.no_grad()
def judge(
    model: CRSM, tasks: Sequence[Task], tokenizer: Tokenizer, settings: JudgmentStageConfig, seed: int
) -> dict[str, dict[str, float]]:
    """Per task, on held-out attempts at the last token before the verdict: AUC, ECE and pairwise branch accuracy of the
    consensus, as the backbone sees it, and branch accuracy as the world model that plans imagines it from ``HORIZON``
    tokens before."""
    table = {}
    groups = attempt_groups(
        tasks,
        tokenizer,
        attempts=4,
        seed=seed,
        step=1,
        batch=max(len(tasks), settings.evaluate_problems),
        split="valid",
    )
    for group in groups:
        # Block by block: rows of open text end at different tokens, and every root keeps the states of all its rows.
        problems = len(group.problems)
        size = problems if group.equal_prompts else BLOCK
        blocks = [_judge_block(model, group.rows(slice(start, start + size))) for start in range(0, problems, size)]
        outcome = np.concatenate([block.outcome for block in blocks])
        consensus = np.concatenate([block.consensus for block in blocks])
        problem = np.concatenate([block.problem + index * size for index, block in enumerate(blocks)])
        imagined_problem = np.concatenate([block.imagined_problem + index * size for index, block in enumerate(blocks)])
        table[tasks[group.task_index].name] = {
            "auc": roc_auc(consensus, outcome),
            "ece": expected_calibration_error(np.concatenate([block.mixed for block in blocks]), outcome),
            "branch_accuracy": pairwise_branch_accuracy(consensus, outcome, problem),
            "imagined_branch_accuracy": pairwise_branch_accuracy(
                np.concatenate([block.imagined for block in blocks]),
                np.concatenate([block.imagined_outcome for block in blocks]),
                imagined_problem,
            ),
        }
    return table


BLOCK = 4
"""Problems of open text that are judged together."""


class _Judged(NamedTuple):
    outcome: np.ndarray
    problem: np.ndarray
    consensus: np.ndarray
    mixed: np.ndarray
    """The consensus without its penalty: a probability."""
    imagined: np.ndarray
    """Consensus as the world model imagines it; with its outcomes and problems."""
    imagined_outcome: np.ndarray
    imagined_problem: np.ndarray


def _judge_block(model: CRSM, group: AttemptGroup) -> _Judged:
    texts = Texts.from_group(group, device=model.lm_head.weight.device)
    roots = tuple(sorted({max(0, int(length) - 1 - HORIZON) for length in texts.length_B}))
    world_model = model.planning_model()
    trace = trace_backbone(model.backbone, texts, roots, world_model.read_layers)
    rows = torch.arange(len(texts.length_B), device=texts.length_B.device)
    values_BL = model.critic(trace.hidden_SBLD[texts.length_B - 1, rows])
    steps = list(unroll(model, world_model, trace, texts, HORIZON))
    index = np.concatenate([step.index_M[step.last_M].cpu().numpy() for step in steps])
    return _Judged(
        texts.outcome_B,
        texts.problem_B,
        model.critic.consensus(values_BL).cpu().numpy(),
        (model.critic.consensus_weights_L * values_BL).sum(dim=1).cpu().numpy(),
        np.concatenate([step.consensus_M[step.last_M].cpu().numpy() for step in steps]),
        texts.outcome_B[index],
        texts.problem_B[index],
    )
