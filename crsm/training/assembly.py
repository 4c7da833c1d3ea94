"""Stage 4: the plan writer, on states of the frozen backbone; afterwards the gates are calibrated.

``loss = CE(planned tokens) + after_weight · KL(uninjected ‖ injected, tokens after the plan)``

Self-supervised: any continuation, right or wrong, is its own plan. The KL term makes a write end with its plan; without
it the tokens after a plan are ruined. Part of the states already carry the write of an earlier plan, which is withdrawn
half of the time, as it is in generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.config import AssemblyStageConfig
from crsm.data.sequences import AttemptGroup, attempt_groups
from crsm.data.tokenizer import Tokenizer
from crsm.injection import carry, inject_low_rank, withdraw
from crsm.model import CRSM
from crsm.tasks.base import Task, keyed_rng
from crsm.training.stage import Metrics, Stage, scalar, tensor_for
from crsm.training.traces import Texts, Trace, trace_backbone
from crsm.types import LayerState, ModelState


class Drawn(NamedTuple):
    """The random choices of one group: where to write what, how strongly. B sequences."""

    target: int
    """Answer token before whose consumption the plan is written."""
    length_B: np.ndarray
    """Tokens of the plan, 1 to ``plan_length``."""
    alpha_B: np.ndarray
    earlier_B: np.ndarray
    """0: no earlier write; 1: of the same attempt; 2: of another attempt at the problem."""
    withdrawn_B: np.ndarray
    """Whether the earlier write is taken out again first."""
    planned: int = 0
    """Tokens that the plans of the whole group say, over all workers."""
    after: int = 0
    """Tokens that follow them."""


class AssemblyStage(Stage):
    name = "stage_4"
    trains = ("writer",)
    settings: AssemblyStageConfig

    def __init__(
        self,
        model: CRSM,
        settings: AssemblyStageConfig,
        seed: int,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        plan_length: int,
        attempts: int = 4,
    ) -> None:
        super().__init__(model, settings, seed)
        self.tasks, self.tokenizer, self.plan_length, self.attempts = tasks, tokenizer, plan_length, attempts

    def batch(self, step: int, micro: int, rank: int, world: int) -> list[tuple[AttemptGroup, int]]:
        """Groups, each with the seed of its random choices (the same on every worker)."""
        accumulate = self.settings.optimizer.accumulate
        index = step * accumulate + micro
        groups = attempt_groups(
            self.tasks,
            self.tokenizer,
            attempts=self.attempts,
            seed=self.seed,
            step=index,
            batch=max(len(self.tasks), self.settings.batch // self.attempts // accumulate),
            rank=rank,
            world=world,
        )
        return [(group, index) for group in groups]

    def forward(self, batch: list[tuple[AttemptGroup, int]]) -> tuple[Tensor, Metrics]:
        loss = torch.zeros((), device=self.device)
        metrics: Metrics = {}
        for group, index in batch:
            texts = Texts.from_group(group, self.world, self.device)
            name = self.tasks[group.task_index].name
            drawn = self._draw(texts, keyed_rng("writer", name, self.seed, index))
            follow_M, after_M = write_losses(self.model, texts, drawn)
            follow, after = follow_M.sum() / max(1, drawn.planned), after_M.sum() / max(1, drawn.after)
            loss = loss + texts.share * (follow + self.settings.after_weight * after)
            # Of this worker's part, as far as it stands for the whole.
            metrics[f"follow_loss/{name}"] = self.world * scalar(follow)
            metrics[f"after_kl/{name}"] = self.world * scalar(after)
        metrics["loss"] = scalar(loss)
        return loss, metrics

    def _draw(self, texts: Texts, rng: np.random.Generator) -> Drawn:
        """For all rows of the group, so that every worker draws the same, of which this worker takes its own."""
        sequences, own = len(texts.whole.lengths_B), texts.own
        # Somewhere in a row that is drawn: rows that have ended by then take no part, and this one does.
        some = int(texts.whole.lengths_B[int(rng.integers(sequences))])
        target = int(rng.integers(0, max(1, some - 1)))
        left_B = np.maximum(0, texts.whole.lengths_B - 1 - target)
        length_B = np.minimum(rng.integers(1, self.plan_length + 1, size=sequences), np.maximum(1, left_B))
        planned = int(np.minimum(length_B, left_B).sum())
        earlier = rng.random(sequences) < self.settings.earlier_write if target > 0 else np.zeros(sequences, bool)
        which_B = np.where(earlier, rng.integers(1, 3, size=sequences), 0)
        alpha_B = rng.choice(self.settings.rates, size=sequences).astype(np.float32)
        withdrawn_B = rng.random(sequences) < 0.5
        rows = (length_B[own], alpha_B[own], which_B[own], withdrawn_B[own])
        return Drawn(target, *rows, planned, int(left_B.sum()) - planned)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Follow rate of held-out plans written at a random position, and the KL that is left after them."""
        metrics: Metrics = {}
        groups = attempt_groups(
            self.tasks,
            self.tokenizer,
            attempts=self.attempts,
            seed=self.seed,
            step=0,
            batch=max(len(self.tasks), self.settings.evaluate_problems // self.attempts),
            split="valid",
        )
        for group in groups:
            texts = Texts.from_group(group, device=self.device)
            name = self.tasks[group.task_index].name
            rng = keyed_rng("writer evaluation", name, self.seed)
            rates = []
            afters = []
            for _ in range(4):
                drawn = self._draw(texts, rng)
                follow_M, after_M = write_losses(self.model, texts, drawn, hits=True)
                rates.append(scalar(follow_M.mean()))
                afters.append(scalar(after_M.sum()) / max(1, len(after_M)))
            metrics[f"valid/follow_rate/{name}"] = float(np.mean(rates))
            metrics[f"valid/after_kl/{name}"] = float(np.mean(afters))
        return metrics

    def finish(self) -> dict[str, Any]:
        return {"writer": self.evaluate()}


def write_losses(model: CRSM, texts: Texts, drawn: Drawn, hits: bool = False) -> tuple[Tensor, Tensor]:
    """What a write does to the tokens it plans and to those after it.

    Returns:
        Cross-entropy of every planned token (or, with ``hits``, 1 where it is the most likely one), and the KL from the
        uninjected backbone of every token after the plan.
    """
    target = drawn.target
    roots = (target,) if target == 0 else (target - 1, target)
    trace = trace_backbone(model.backbone, texts, roots, (0,))
    state = trace.states_R[-1]
    if drawn.earlier_B.any():
        state = _with_earlier_write(model, texts, drawn, trace, state)
    length_B = tensor_for(model, drawn.length_B)
    alpha_B = tensor_for(model, drawn.alpha_B)
    line_BM = _lines(texts.answer_BT, target + 1, int(length_B.max()))
    state = _inject_line(model, state, line_BM, length_B, alpha_B)
    hidden_BTLD, _ = model.backbone(texts.answer_BT[:, target:], state)
    # Logits after consuming token `target` predict answer token `target + 1`, the first of the plan.
    log_probs_BTV = model.logits(hidden_BTLD[:, :-1]).log_softmax(dim=-1)
    following_BT = texts.answer_BT[:, target + 1 :]
    step_T = torch.arange(following_BT.shape[1], device=following_BT.device)
    real_BT = step_T + target + 1 < texts.length_B[:, None]
    planned_BT = (step_T < length_B[:, None]) & real_BT
    after_BT = ~planned_BT & real_BT
    if hits:
        follow_M = (log_probs_BTV.argmax(dim=-1) == following_BT)[planned_BT].float()
    else:
        follow_M = F.nll_loss(log_probs_BTV[planned_BT], following_BT[planned_BT], reduction="none")
    with torch.no_grad():
        plain_BTV = model.logits(trace.hidden_SBLD[target + 1 : -1].transpose(0, 1)).log_softmax(dim=-1)
    kl_BT = (plain_BTV.exp() * (plain_BTV - log_probs_BTV)).sum(dim=-1)
    return follow_M, kl_BT[after_BT]


def _lines(answer_BT: Tensor, start: int, length: int) -> Tensor:
    line_BM = answer_BT[:, start : start + length]
    return F.pad(line_BM, (0, length - line_BM.shape[1]))


def _inject_line(model: CRSM, state: ModelState, line_BM: Tensor, length_B: Tensor, alpha_B: Tensor) -> ModelState:
    write = model.writer(line_BM, length_B)
    return state.with_ssm(
        tuple(
            inject_low_rank(layer.ssm_BHPN, write.u_BLRE[:, index], write.b_BLRN[:, index], alpha_B)
            for index, layer in enumerate(state.layers)
        )
    )


@torch.no_grad()
def _with_earlier_write(model: CRSM, texts: Texts, drawn: Drawn, trace: Trace, clean: ModelState) -> ModelState:
    """States at the target; in some rows an earlier plan was written one token before."""
    target, answer_BT = drawn.target, texts.answer_BT
    rows = tensor_for(model, np.flatnonzero(drawn.earlier_B))
    before = trace.states_R[0].rows(rows)
    # Another attempt at the same problem: the neighbour inside its block of attempts.
    other = rows // texts.attempts * texts.attempts + (rows + 1) % texts.attempts
    source = torch.where(tensor_for(model, drawn.earlier_B == 2)[rows], other, rows)
    length_B = tensor_for(model, drawn.length_B)[rows]
    line_BM = _lines(answer_BT[source], target, int(length_B.max()))
    written = _inject_line(model, before, line_BM, length_B, tensor_for(model, drawn.alpha_B)[rows])
    out = model.backbone.step(answer_BT[rows, target - 1], written)
    withdrawn = tensor_for(model, drawn.withdrawn_B)[rows].nonzero()[:, 0]
    layers = []
    for index, layer in enumerate(out.state.layers):
        ssm_BHPN = layer.ssm_BHPN
        delta = (written.layers[index].ssm_BHPN - before.layers[index].ssm_BHPN)[withdrawn]
        taken = withdraw(ssm_BHPN[withdrawn], carry(delta, out.decay_LBH[index][withdrawn]))
        layers.append(
            LayerState(
                clean.layers[index].conv_BCK.index_copy(0, rows, layer.conv_BCK),
                clean.layers[index].ssm_BHPN.index_copy(0, rows, ssm_BHPN.index_copy(0, withdrawn, taken)),
            )
        )
    return ModelState(tuple(layers))
