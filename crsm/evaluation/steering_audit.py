"""Does a write steer, what else does it change, and does the state stay bounded?

Every figure is paired: the same text is consumed twice from the same state, once with a write and once without. Given
the planned tokens before it, a planned token is *followed* when it is the most likely one; a plan is followed when all
of its tokens are, which is what greedy decoding from there would say.

Letters: B rows, T tokens consumed after the write, V vocabulary, L layers, H heads; R, E, N as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crsm.config import DeliberationConfig, EngineConfig
from crsm.data.sequences import encode_answer, encode_prompt
from crsm.deliberation import as_injection
from crsm.evaluation.recording_planners import RecordingPlanners
from crsm.evaluation.solving import solve
from crsm.injection import head_norms, inject, outer_write
from crsm.model import CRSM, Checkpoint
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.steering import advance, no_steering, steer
from crsm.tasks.base import Problem, Task, keyed_rng
from crsm.types import Channel, Injection, ModelState, Plan

ADVERSARIAL_NORM = 1e6
"""Norm of an adversarial write over that of the state."""
TOKENS_AFTER = 32
"""Tokens after a plan that are looked at."""
WRITES = ("writer", "random", "adversarial")


class Line(NamedTuple):
    """A whole answer to a problem, right or wrong."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """The verdict included."""
    correct: bool


class Audit(NamedTuple):
    """What one set of writes did; a row per line. P planned tokens, at most T."""

    followed_B: Tensor
    """Whether the plan was followed to its end."""
    alone_B: Tensor
    """Whether the same tokens come without the write."""
    gain_B: Tensor
    """Log-probability of all planned tokens together, with the write minus without."""
    first_kl_B: Tensor
    """KL(without ‖ with) of the first distribution after the write, in nats."""
    after_kl: Tensor
    """The same for every token after the plan, all rows together."""


def lines_of(checkpoint: Checkpoint, task: Task, problems: Sequence[Problem], seed: int) -> list[Line]:
    """The solution of every problem, and a wrong attempt at it where the task has any."""
    tokenizer = checkpoint.tokenizer
    lines = []
    for index, problem in enumerate(problems):
        prompt = tuple(encode_prompt(problem, tokenizer))
        right = (*encode_answer(problem.solution, tokenizer), tokenizer.verdict_id(True))
        lines.append(Line(prompt, right, True))
        attempts = task.attempts(problem, keyed_rng("wrong line", task.name, seed, index), 8)
        wrong = next((attempt.text for attempt in attempts if not attempt.correct), None)
        if wrong is not None:
            lines.append(Line(prompt, (*encode_answer(wrong, tokenizer), tokenizer.verdict_id(False)), False))
    return lines


def follow_rates(
    checkpoint: Checkpoint,
    lines: Sequence[Line],
    *,
    rates: Sequence[float],
    positions: int = 5,
    settings: DeliberationConfig | None = None,
) -> list[dict[str, Any]]:
    """Oracle plans, written at each of the first answer positions at each rate.

    Args:
        checkpoint: with a trained writer.
        lines: what is planned: the next tokens of a line, after the line's own beginning.
        rates: α of every layer.
        positions: answer tokens before whose consumption a plan is written.
        settings: plan length, and whether a spent plan is withdrawn; None: the checkpoint's.

    Returns:
        A row per position, rate and kind of line: ``follow_rate``, ``alone`` (without the write), ``log_prob_gain``,
        ``next_kl``, ``after_kl``, ``lines``.
    """
    settings = settings or checkpoint.config.deliberation
    rows = []
    for correct in sorted({line.correct for line in lines}, reverse=True):
        for position in range(positions):
            # The plan needs a token, and so does what comes before it.
            kept = [line for line in lines if line.correct == correct and len(line.answer) > position + 1]
            for rate in rates if kept else ():
                audit = _concat([audit_writes(checkpoint, group, position, rate, settings) for group in _alike(kept)])
                rows.append(
                    {
                        "line": "right" if correct else "wrong",
                        "position": position,
                        "rate": rate,
                        "follow_rate": _mean(audit.followed_B.float()),
                        "alone": _mean(audit.alone_B.float()),
                        "log_prob_gain": _mean(audit.gain_B),
                        "next_kl": _mean(audit.first_kl_B),
                        "after_kl": _mean(audit.after_kl),
                        "lines": len(kept),
                    }
                )
    return rows


@torch.inference_mode()
def audit_writes(
    checkpoint: Checkpoint, lines: Sequence[Line], position: int, rate: float, settings: DeliberationConfig
) -> Audit:
    """Writes, into the state before the answer token at ``position``, the tokens of the line that follow it.

    Args:
        checkpoint: with a trained writer.
        lines: of equal lengths, prompt and answer.
        position: index into the answer.
        rate: α of every layer.
        settings: plan length, and whether a spent plan is withdrawn.
    """
    model = checkpoint.model
    before_BT = torch.tensor([line.prompt + line.answer[:position] for line in lines])
    after_BT = torch.tensor([line.answer[position:] for line in lines])
    _, _, state = model.prefill(before_BT)
    length = min(settings.plan_length, after_BT.shape[1] - 1)
    after_BT = after_BT[:, : 1 + length + TOKENS_AFTER]
    injections = _oracle_injections(model, after_BT[:, 1 : 1 + length], before_BT.shape[1], rate, settings)
    plain_BTV = _consume(model, state, after_BT[:, :-1], {}, before_BT.shape[1], settings.withdraw)
    steered_BTV = _consume(model, state, after_BT[:, :-1], injections, before_BT.shape[1], settings.withdraw)
    said_BT = after_BT[:, 1:]
    planned = slice(0, length)

    def whole(log_probs_BTV: Tensor) -> Tensor:
        return (log_probs_BTV.argmax(dim=-1) == said_BT)[:, planned].all(dim=1)

    def likelihood(log_probs_BTV: Tensor) -> Tensor:
        return log_probs_BTV.gather(2, said_BT[..., None]).squeeze(2)[:, planned].sum(dim=1)

    # Not negative but for rounding.
    kl_BT = (plain_BTV.exp() * (plain_BTV - steered_BTV)).sum(dim=-1).clamp_min(0)
    return Audit(
        whole(steered_BTV),
        whole(plain_BTV),
        likelihood(steered_BTV) - likelihood(plain_BTV),
        kl_BT[:, 0],
        kl_BT[:, length:].flatten(),
    )


def _oracle_injections(
    model: CRSM, line_BM: Tensor, position: int, rate: float, settings: DeliberationConfig
) -> dict[int, Injection]:
    write = model.writer(line_BM, torch.full((len(line_BM),), line_BM.shape[1]))
    layers = model.config.model.backbone.n_layer
    said = settings.model_copy(update={"injection_rate": rate, "channel": Channel.STATE})
    return {
        row: as_injection(
            Plan(
                request_id=row,
                generation_id="audit",
                position=position,
                target=position,
                assumed=(),
                line=tuple(line_BM[row].tolist()),
                value_root_L=np.zeros(layers, np.float32),
                value_plan_L=np.ones(layers, np.float32),
                uncertainty=0.0,
                confidence_L=np.ones(layers, np.float32),
                write_u_LRE=write.u_BLRE[row].numpy(),
                write_b_LRN=write.b_BLRN[row].numpy(),
                policy_tokens_A=line_BM[row, :1].numpy(),
                policy_probs_A=np.ones(1, np.float32),
                planner_id="oracle",
            ),
            position,
            said,
        )
        for row in range(len(line_BM))
    }


def _consume(
    model: CRSM, state: ModelState, tokens_BT: Tensor, injections: dict[int, Injection], position: int, tracked: bool
) -> Tensor:
    """Log-probabilities after each token (B, T, V), with plans written before the first, as the engine does it."""
    steering, batch = no_steering(state), len(tokens_BT)
    log_probs = []
    for step in range(tokens_BT.shape[1]):
        due = injections if step == 0 else {}
        state, steering = steer(state, steering, due, [position + step] * batch, [tracked] * batch)
        out = model.backbone.step(tokens_BT[:, step], state)
        state, steering = out.state, advance(steering, out.decay_LBH, 0)
        log_probs.append(model.logits(out.hidden_BLD).log_softmax(dim=-1))
    return torch.stack(log_probs, dim=1)


def _alike(lines: Sequence[Line]) -> list[list[Line]]:
    groups: dict[tuple[int, int], list[Line]] = {}
    for line in lines:
        groups.setdefault((len(line.prompt), len(line.answer)), []).append(line)
    return list(groups.values())


def _concat(audits: Sequence[Audit]) -> Audit:
    return Audit(*(torch.cat(parts) for parts in zip(*audits, strict=True)))


def _mean(values: Tensor) -> float:
    """NaN without any."""
    return float(values.mean()) if len(values) else float("nan")


# --------------------------------------------------------------------------------------------------- gates in use


def gate_sparsity(checkpoint: Checkpoint, task: Task, problems: Sequence[Problem]) -> dict[str, Any]:
    """How often and how far the gates of System 2's own plans open, per layer.

    Returns:
        ``plans`` made, ``applied``, and per layer ``shut`` (share of plans with a gate of exactly 0, NaN without any),
        ``confidence`` (mean of the open ones, None without any), ``applied`` (writes that reached the layer).
    """
    config = checkpoint.config
    recorder = RecordingPlanners(InlinePlanners(Deliberator.from_checkpoint(checkpoint), config.planners.max_batch))
    run = solve(
        checkpoint,
        task,
        problems,
        planners=recorder,
        engine=EngineConfig(clock="virtual", max_batch=config.engine.max_batch),
    )
    count = config.model.backbone.n_layer
    confidence_ML = np.array([plan.confidence_L for plan in recorder.plans], np.float32).reshape(-1, count)
    layers = []
    for layer in range(count):
        confidence_M = confidence_ML[:, layer]
        opened_M = confidence_M[confidence_M > 0]
        layers.append(
            {
                "layer": layer,
                "shut": float((confidence_M == 0).mean()) if len(confidence_M) else float("nan"),
                "confidence": float(opened_M.mean()) if len(opened_M) else None,
                "applied": run.metrics.injections_per_layer[layer],
            }
        )
    return {"plans": len(recorder.plans), "applied": run.metrics.injections, "layers": layers}


# ------------------------------------------------------------------------------------------------ stability


@torch.inference_mode()
def stability(
    checkpoint: Checkpoint, text: Sequence[int], *, rate: float, write: str = "writer", seed: int = 0
) -> dict[str, Any]:
    """One long generation with a write before every token, none of them ever withdrawn.

    Args:
        checkpoint: the model.
        text: the tokens to consume, one after the other, without a reset.
        rate: α of every layer.
        write: ``writer``: the next tokens of the text, as the writer writes them; ``random``: a direction of the same
            norm; ``adversarial``: a random direction a million times larger than the state.
        seed: of the random directions.

    Returns:
        Over all writes, layers and heads, the ratio of a head's norm after a write to that before it (``max_ratio``,
        ``mean_ratio``); ``max_growth``, the largest head norm of this generation over the largest of the same text
        without any write; ``finite``; ``bounded``: no write made any head grow.
    """
    model, sizes = checkpoint.model, checkpoint.config.model.backbone
    length = checkpoint.config.deliberation.plan_length
    generator = torch.Generator().manual_seed(seed)
    state = plain = model.backbone.initial_state(1)
    largest = largest_plain = 0.0
    ratios = []
    for index in range(len(text) - 1):
        line = list(text[index + 1 : index + 1 + length])
        planned = model.writer(torch.tensor([line]), torch.tensor([len(line)]))
        ssm = []
        for layer, layer_state in enumerate(state.layers):
            h_BHPN = layer_state.ssm_BHPN
            write_BHPN = outer_write(planned.u_BLRE[:, layer], planned.b_BLRN[:, layer], sizes.n_heads)
            if write != "writer":
                noise_BHPN = torch.randn(h_BHPN.shape, generator=generator)
                norm = ADVERSARIAL_NORM * (h_BHPN.norm() + 1) if write == "adversarial" else write_BHPN.norm()
                write_BHPN = noise_BHPN * (norm / noise_BHPN.norm())
            new_BHPN = inject(h_BHPN, write_BHPN, torch.full((1,), rate))
            before_BH, after_BH = head_norms(h_BHPN), head_norms(new_BHPN)
            ratios.append((after_BH / before_BH)[before_BH > 0])
            assert not (after_BH[before_BH == 0] > 0).any(), "a write filled an empty head"
            ssm.append(new_BHPN)
        token_B = torch.tensor([text[index]])
        state = model.backbone.step(token_B, state.with_ssm(tuple(ssm))).state
        plain = model.backbone.step(token_B, plain).state
        largest = max(largest, _largest(state))
        largest_plain = max(largest_plain, _largest(plain))
    ratio_M = torch.cat(ratios)
    return {
        "write": write,
        "rate": rate,
        "writes": len(text) - 1,
        "max_ratio": float(ratio_M.max()),
        "mean_ratio": float(ratio_M.mean()),
        "max_growth": largest / largest_plain,
        "finite": bool(np.isfinite(largest)),
        "bounded": bool((ratio_M <= 1).all()) and bool(np.isfinite(largest)),
    }


def _largest(state: ModelState) -> float:
    return max(float(head_norms(layer.ssm_BHPN).max()) for layer in state.layers)


def long_text(checkpoint: Checkpoint, lines: Sequence[Line], tokens: int) -> list[int]:
    """Problems with their answers, one after the other, up to a number of tokens."""
    text: list[int] = []
    while len(text) < tokens:
        for line in lines:
            text += (*line.prompt, *line.answer)
    return text[:tokens]
