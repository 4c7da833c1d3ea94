"""What System 1 can do with more compute and no planner: many samples, a vote, a judge, a beam.

The rivals of System 2 at equal compute. All of them share one run over the prompt, as System 2 does.

Letters: B rows (problems × samples or beams), W samples or beams per problem, V vocabulary; L, D as everywhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crsm.model import CRSM, Checkpoint
from crsm.types import ModelState

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of System 1."""

    tokens: tuple[int, ...]
    """The terminal token included, if there was one."""
    logprob: float
    """Of all tokens together."""
    value: float
    """The critics' consensus at the leaf: the last token before the terminal one."""


@torch.inference_mode()
def sample_answers(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    *,
    count: int,
    max_tokens: int,
    seed: int,
    rows: int = 1024,
    first: int = 0,
) -> list[list[Sample]]:
    """``count`` independent answers to every prompt, at temperature 1.

    Args:
        checkpoint: the model.
        prompts: as tokens.
        count: samples of each; sample ``n`` of a problem is the same whatever ``count`` is.
        max_tokens: length at which an answer is cut.
        seed: of the sampling.
        rows: sequences decoded together.
        first: number of the first prompt, if these are some of many: a prompt's samples depend on its number.
    """
    found: dict[int, list[Sample]] = {}
    for indices in _batches(prompts, max(1, rows // count)):
        uniform_BT = np.concatenate(
            [
                np.random.default_rng([seed, first + index, n]).random((1, max_tokens))
                for index in indices
                for n in range(count)
            ]
        )
        logits_BV, hidden_BLD, state = checkpoint.model.prefill(torch.tensor([prompts[index] for index in indices]))
        repeat = torch.arange(len(indices)).repeat_interleave(count)
        samples = _sample(
            checkpoint, logits_BV[repeat], hidden_BLD[repeat], state.rows(repeat), torch.from_numpy(uniform_BT)
        )
        for place, index in enumerate(indices):
            found[index] = samples[place * count : (place + 1) * count]
    return [found[index] for index in range(len(prompts))]


def _sample(
    checkpoint: Checkpoint, logits_BV: Tensor, hidden_BLD: Tensor, state: ModelState, uniform_BT: Tensor
) -> list[Sample]:
    model, batch = checkpoint.model, len(logits_BV)
    terminal = torch.tensor(checkpoint.tokenizer.terminal_ids)
    alive_B = torch.ones(batch, dtype=torch.bool)
    value_B = model.critic.consensus(model.critic(hidden_BLD))
    logprob_B = torch.zeros(batch)
    said: list[list[int]] = [[] for _ in range(batch)]
    for step in range(uniform_BT.shape[1]):
        log_probs_BV = logits_BV.log_softmax(dim=-1)
        token_B = _draw(log_probs_BV, uniform_BT[:, step])
        logprob_B += torch.where(alive_B, log_probs_BV.gather(1, token_B[:, None]).squeeze(1), 0.0)
        for row in alive_B.nonzero().flatten().tolist():
            said[row].append(int(token_B[row]))
        alive_B = alive_B & ~torch.isin(token_B, terminal)
        if step + 1 == uniform_BT.shape[1] or not alive_B.any():
            break
        out = model.backbone.step(token_B, state)
        state = out.state
        logits_BV = model.logits(out.hidden_BLD)
        value_B = torch.where(alive_B, model.critic.consensus(model.critic(out.hidden_BLD)), value_B)
    return [Sample(tuple(said[row]), float(logprob_B[row]), float(value_B[row])) for row in range(batch)]


def _draw(log_probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse transform, a row each."""
    cumulative_BV = log_probs_BV.double().exp().cumsum(dim=1)
    picked_B1 = torch.searchsorted(cumulative_BV, (uniform_B * cumulative_BV[:, -1])[:, None], right=True)
    return picked_B1.squeeze(1).clamp_max(log_probs_BV.shape[1] - 1)


def best_of(samples: Sequence[Sample]) -> Sample:
    """The sample that the critics value most; the first of equals."""
    return max(samples, key=lambda sample: sample.value)


def majority(samples: Sequence[Sample], terminal: Sequence[int]) -> Sample:
    """The answer given most often, whatever verdict closes it; the first of equals (arXiv 2203.11171)."""
    ends = set(terminal)

    def said(sample: Sample) -> tuple[int, ...]:
        return sample.tokens[:-1] if sample.tokens and sample.tokens[-1] in ends else sample.tokens

    votes = Counter(said(sample) for sample in samples)
    return max(samples, key=lambda sample: votes[said(sample)])


@torch.inference_mode()
def beam_search(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], *, width: int, max_tokens: int
) -> list[tuple[Sample, int]]:
    """The likeliest answer that a beam of ``width`` finds, and the tokens that System 1 consumed for it.

    An answer that has ended stays in the beam with its log-probability; the beam ends when the best of it has ended.
    """
    terminal = checkpoint.tokenizer.terminal_ids
    return [_beam(checkpoint.model, prompt, width, max_tokens, terminal) for prompt in prompts]


def _beam(model: CRSM, prompt: Prompt, width: int, max_tokens: int, terminal: Sequence[int]) -> tuple[Sample, int]:
    logits_BV, _, state = model.prefill(torch.tensor([prompt]))
    ends = set(terminal)
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    consumed = 0
    for step in range(max_tokens):
        score_WV = torch.tensor([score for score, _ in beams])[:, None] + logits_BV.log_softmax(dim=-1)
        best = score_WV.flatten().topk(min(width, score_WV.numel()))
        candidates = [
            (score, beams[index // score_WV.shape[1]][1] + (index % score_WV.shape[1],), index // score_WV.shape[1])
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        going = [candidate for candidate in candidates if candidate[1][-1] not in ends]
        ended += [(score, tokens) for score, tokens, _ in candidates if tokens[-1] in ends]
        ended = sorted(ended, reverse=True)[:width]
        # Log-probabilities only fall: nothing that still runs can pass an ended answer above it.
        going = [candidate for candidate in going if not ended or candidate[0] > ended[0][0]]
        if not going or step + 1 == max_tokens:
            ended += [(score, tokens) for score, tokens, _ in going]
            break
        beams = [(score, tokens) for score, tokens, _ in going]
        out = model.backbone.step(
            torch.tensor([tokens[-1] for _, tokens, _ in going]), state.rows(torch.tensor([row for _, _, row in going]))
        )
        consumed += len(going)
        state, logits_BV = out.state, model.logits(out.hidden_BLD)
    score, tokens = max(ended)
    return Sample(tokens, score, float("nan")), consumed


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Indices of prompts of one length, ``size`` at most."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
