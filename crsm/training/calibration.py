"""Calibration of the gates on held-out problems, after the writer is trained.

For plans made at every position of System 1's own answers: does following the plan lead to a verified answer, and would
System 1 have got there without it? A logistic fit per layer turns a plan's advantage into the probability that it is
right; the threshold keeps the plans that help, so that the expected accuracy does not fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.evaluation.recording_planners import RecordingPlanners
from crsm.evaluation.solving import Run, solve
from crsm.evaluation.statistics import expected_calibration_error, roc_auc
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.tasks.base import Task, problems
from crsm.types import Plan

KEPT_BENEFIT = 0.999
"""The threshold is the highest that keeps this share of the best possible benefit: what cannot help is not written."""


class Judged(NamedTuple):
    """M plans with what would have come of them."""

    advantage_ML: Tensor
    uncertainty_M: Tensor
    gain_M: Tensor
    """Consensus of the plan minus consensus of the root."""
    plan_right_M: np.ndarray
    alone_right_M: np.ndarray
    """Whether System 1's own answer, of which the plan knew the beginning, was right."""


def calibrate_gates(
    checkpoint: Checkpoint, tasks: Sequence[Task], *, count: int, seed: int, may_open: bool = True
) -> dict[str, Any]:
    """Fits the gates of ``checkpoint.model`` in place and reports the fit.

    Args:
        checkpoint: with a trained writer.
        tasks: their held-out problems (split ``valid``) are used.
        count: problems over all tasks.
        seed: of the problems.
        may_open: the verdict of stage 3; otherwise the gates stay shut whatever the fit says.
    """
    model = checkpoint.model
    if not may_open:
        model.gate.shut()
        return {"open": False, "reason": "pairwise branch accuracy is below the bar"}
    judged = concat_judged(
        [judge_plans(checkpoint, task, max(8, count // len(tasks)), seed, lag) for task in tasks for lag in (0, 1, 2)]
    )
    if not judged.plan_right_M.any():
        model.gate.shut()
        return {"open": False, "reason": "no plan led to a right answer", "plans": len(judged.plan_right_M)}
    penalty = model.critic.uncertainty_penalty
    score_ML = judged.advantage_ML - penalty * judged.uncertainty_M[:, None]
    fits = [fit_logistic(score_ML[:, layer].numpy(), judged.plan_right_M) for layer in range(score_ML.shape[1])]
    threshold, benefit = choose_threshold(judged.gain_M.numpy(), judged.plan_right_M, judged.alone_right_M)
    report: dict[str, Any] = {
        "plans": len(judged.plan_right_M),
        "plan_right": float(judged.plan_right_M.mean()),
        "system1_right": float(judged.alone_right_M.mean()),
        "slope": [slope for slope, _ in fits],
        "bias": [bias for _, bias in fits],
        "threshold": threshold,
        "benefit": benefit,
    }
    if benefit <= 0:
        model.gate.shut()
        return report | {"open": False, "reason": "following the plans does not raise the expected accuracy"}
    model.gate.calibrate(torch.tensor([f[0] for f in fits]), torch.tensor([f[1] for f in fits]), threshold)
    confidence_ML = model.gate(judged.advantage_ML, judged.uncertainty_M, judged.gain_M, penalty).numpy()
    written = confidence_ML.any(axis=1)
    return report | {
        "open": True,
        "written": float(written.mean()),
        "written_right": float(judged.plan_right_M[written].mean()),
        "ece": expected_calibration_error(confidence_ML[written, -1], judged.plan_right_M[written]),
        "auc": roc_auc(judged.gain_M.numpy(), judged.plan_right_M),
    }


def judge_plans(checkpoint: Checkpoint, task: Task, count: int, seed: int, lag: int) -> Judged:
    """Plans for every position of System 1's greedy answers, and where following each of them leads."""
    deliberation = checkpoint.config.deliberation.model_copy(update={"lag": lag, "hypotheses": 1, "max_plans": None})
    deliberator = Deliberator.from_checkpoint(checkpoint, forced_confidence=0.0)
    recorder = RecordingPlanners(InlinePlanners(deliberator, checkpoint.config.planners.max_batch))
    run = solve(
        checkpoint,
        task,
        problems(task, seed, "valid", count),
        planners=recorder,
        deliberation=deliberation,
        sampling=checkpoint.config.sampling.model_copy(update={"temperature": 0.0}),
        engine=_engine_settings(checkpoint),
    )
    usable = [plan for plan in recorder.plans if plan.line and _assumed_right(plan, run)]
    critic = checkpoint.model.critic
    layers = checkpoint.config.model.backbone.n_layer
    root_ML = torch.from_numpy(np.array([plan.value_root_L for plan in usable], np.float32).reshape(-1, layers))
    last_ML = torch.from_numpy(np.array([plan.value_plan_L for plan in usable], np.float32).reshape(-1, layers))
    with torch.inference_mode():
        gain_M = critic.consensus(last_ML) - critic.consensus(root_ML)
    alone = [run.answers[_index(plan)].correct for plan in usable]
    return Judged(
        last_ML - root_ML,
        torch.tensor([plan.uncertainty for plan in usable]),
        gain_M.clone(),
        _follow(checkpoint, task, usable, run),
        np.array(alone, dtype=bool),
    )


def _engine_settings(checkpoint: Checkpoint) -> EngineConfig:
    """The defaults, where and with as many generations as the checkpoint's settings say."""
    own = checkpoint.config.engine
    return EngineConfig(clock="virtual", max_batch=own.max_batch, device=own.device)


def _index(plan: Plan) -> int:
    return int(plan.generation_id.removeprefix("problem-"))


def _said_before(plan: Plan, run: Run) -> tuple[int, ...]:
    """What the generation had said up to and with the plan's target."""
    answer = run.answers[_index(plan)]
    return answer.tokens[: plan.target + 1 - len(answer.prompt)]


def _assumed_right(plan: Plan, run: Run) -> bool:
    said = _said_before(plan, run)
    whole = len(said) == plan.target + 1 - len(run.answers[_index(plan)].prompt)
    return whole and said[len(said) - len(plan.assumed) :] == plan.assumed


def _follow(checkpoint: Checkpoint, task: Task, plans: Sequence[Plan], run: Run) -> np.ndarray:
    """Whether System 1, made to say each plan's line, ends in a right answer."""
    terminal = set(checkpoint.tokenizer.terminal_ids)
    requests, begun = [], []
    for plan in plans:
        answer = run.answers[_index(plan)]
        said = (*_said_before(plan, run), *plan.line)
        begun.append(said)
        if said[-1] not in terminal:
            left = max(1, checkpoint.config.sampling.max_tokens - len(said))
            requests.append(
                GenerationRequest((*answer.prompt, *said), SamplingConfig(max_tokens=left), DeliberationConfig())
            )
    engine = Engine(checkpoint, None, _engine_settings(checkpoint))
    continued = iter(engine.generate_all(requests))
    right = []
    for plan, said in zip(plans, begun, strict=True):
        rest = () if said[-1] in terminal else tuple(next(continued))
        text = checkpoint.tokenizer.decode((*said, *rest))
        right.append(task.verify(run.answers[_index(plan)].problem, text))
    return np.array(right, dtype=bool)


def concat_judged(parts: Sequence[Judged]) -> Judged:
    return Judged(
        torch.cat([part.advantage_ML for part in parts]),
        torch.cat([part.uncertainty_M for part in parts]),
        torch.cat([part.gain_M for part in parts]),
        np.concatenate([part.plan_right_M for part in parts]),
        np.concatenate([part.alone_right_M for part in parts]),
    )


def fit_logistic(score_M: np.ndarray, right_M: np.ndarray, ridge: float = 1e-3) -> tuple[float, float]:
    """Slope ≥ 0 and bias of ``P(right) = σ(slope · score + bias)``: maximum likelihood with a small ridge, by Newton's
    method (Platt 1999). A slope that would be negative is 0, with the base rate as the bias."""
    x = np.stack([score_M.astype(np.float64), np.ones(len(score_M))], axis=1)
    y = right_M.astype(np.float64)
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - y) / len(y) + ridge * weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(y) + ridge * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    if weights[0] < 0:
        base = np.clip(y.mean(), 1e-3, 1 - 1e-3)
        return 0.0, float(np.log(base / (1 - base)))
    return float(weights[0]), float(weights[1])


def choose_threshold(gain_M: np.ndarray, plan_right_M: np.ndarray, alone_right_M: np.ndarray) -> tuple[float, float]:
    """The highest threshold on the gain that keeps nearly all of the benefit, and the benefit per plan.

    The benefit of a threshold is the mean, over all plans, of ``right with the plan − right without`` where the plan is
    written, and 0 where it is not.
    """
    order = np.argsort(-gain_M, kind="stable")
    benefit = np.cumsum(plan_right_M[order].astype(float) - alone_right_M[order].astype(float)) / len(gain_M)
    best = float(benefit.max())
    if best <= 0:
        return float("inf"), best
    enough = int(np.argmax(benefit >= KEPT_BENEFIT * best))
    # Half-way to the next gain, so that no plan sits exactly on the threshold.
    lower = gain_M[order][min(enough + 1, len(order) - 1)]
    return float((gain_M[order][enough] + lower) / 2), float(benefit[enough])
