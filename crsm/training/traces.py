"""Traces of the frozen backbone over prompts and attempts: the data of stages 2 and 4.

The prompt is run once and its state copied to every attempt; the answers are then consumed together, and at chosen
positions (the *roots*, from which planners will be asked) the memory that a world model reads is kept.

Letters: B sequences (problems × attempts), R roots, T answer tokens, M read layers; L, D, H, P, N as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crsm.data.sequences import AttemptGroup, WholeGroup
from crsm.mamba_ssm import Backbone
from crsm.types import LayerState, ModelState


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts and what follows them, ready to be run in one batch."""

    prompt_BT: Tensor
    """One row per problem, padded on the left, so that all end together."""
    padding_B: Tensor
    """Tokens of padding in each row of ``prompt_BT``."""
    answer_BT: Tensor
    """What follows, one row per attempt, the attempts at a problem neighbouring; padded on the right."""
    length_B: Tensor
    """Tokens of each row of ``answer_BT``, the verdict (its last) included."""
    attempts: int
    outcome_B: np.ndarray
    problem_B: np.ndarray
    """Problem of each row."""
    share: float
    """Weight of the group in the step's mean, times the number of workers."""
    whole: WholeGroup
    """The group over all workers: a mean over its rows is a sum over these here, divided by what there is of all. Then
    the loss is the same whatever the number of workers."""

    @property
    def own(self) -> slice:
        """The rows here among those of the whole group."""
        return slice(self.whole.first_row, self.whole.first_row + len(self.answer_BT))

    @classmethod
    def from_group(cls, group: AttemptGroup, world: int = 1, device: torch.device | str = "cpu") -> Texts:
        """
        Args:
            group: the texts.
            world: number of workers that share the step.
            device: where the tensors shall be.
        """
        problems, attempts, _ = group.answers_BAt.shape
        longest = int(group.prompt_lengths_B.max())
        padding_B = longest - group.prompt_lengths_B
        prompt_BT = np.zeros((problems, longest), np.int64)
        for row, (prompt, padding) in enumerate(zip(group.prompts, padding_B, strict=True)):
            prompt_BT[row, padding:] = prompt
        return cls(
            prompt_BT=torch.from_numpy(prompt_BT).to(device),
            padding_B=torch.from_numpy(padding_B).to(device),
            answer_BT=torch.from_numpy(group.answers_BAt.reshape(problems * attempts, -1)).to(device),
            length_B=torch.from_numpy(group.answer_lengths_BA.reshape(-1)).to(device),
            attempts=attempts,
            outcome_B=group.outcome_BA.reshape(-1).astype(bool),
            problem_B=np.repeat(np.arange(problems), attempts),
            share=world * (len(group.whole.lengths_B) // attempts) / group.step_problems,
            whole=group.whole,
        )

    @property
    def segment_BT(self) -> Tensor | None:
        """What tells the padding of ``prompt_BT`` from the prompts, as documents of packed rows; None: no padding.

        The state is reset where a prompt begins, so that the padding before it leaves nothing behind.
        """
        if not bool(self.padding_B.any()):
            return None
        place_T = torch.arange(self.prompt_BT.shape[1], device=self.prompt_BT.device)
        return (place_T >= self.padding_B[:, None]).to(torch.int32)


class Trace(NamedTuple):
    hidden_SBLD: Tensor
    """Residual streams at S = T + 1 positions: the prompt's last token, then every answer token."""
    roots: tuple[int, ...]
    """Indices into S, ascending."""
    memory_RBMHPN: Tensor
    """SSM states at the roots."""
    states_R: tuple[ModelState, ...]
    """The whole states at the roots."""


@torch.no_grad()
def trace_backbone(backbone: Backbone, texts: Texts, roots: tuple[int, ...], read_layers: tuple[int, ...]) -> Trace:
    """Runs the frozen backbone over prompts and answers.

    Args:
        backbone: System 1.
        texts: what to run.
        roots: positions to keep states at, ascending: 0 is the prompt's end, s the position after ``s`` answer tokens.
        read_layers: layers whose SSM states go into ``memory_RBMHPN``.
    """
    hidden_BTLD, state = backbone(texts.prompt_BT, segment_BT=texts.segment_BT)
    hidden = [hidden_BTLD[:, -1:].repeat_interleave(texts.attempts, dim=0)]
    state = repeat_rows(state, texts.attempts)
    states, position = {0: state}, 0
    for root in (*[r for r in roots if r > 0], texts.answer_BT.shape[1]):
        if root > position:
            piece_BTLD, state = backbone(texts.answer_BT[:, position:root], state)
            hidden.append(piece_BTLD)
            position = root
        states[root] = state
    # Written once: at many roots this is the largest tensor of the step.
    like = state.layers[0].ssm_BHPN
    memory_RBMHPN = like.new_empty(len(roots), len(like), len(read_layers), *like.shape[1:])
    for memory_BMHPN, root in zip(memory_RBMHPN, roots, strict=True):
        for index, layer in enumerate(read_layers):
            memory_BMHPN[:, index] = states[root].layers[layer].ssm_BHPN
    return Trace(torch.cat(hidden, dim=1).transpose(0, 1), roots, memory_RBMHPN, tuple(states[root] for root in roots))


def repeat_rows(state: ModelState, times: int) -> ModelState:
    """Every row ``times`` times, neighbouring."""
    return ModelState(
        tuple(LayerState(*(tensor.repeat_interleave(times, dim=0) for tensor in layer)) for layer in state.layers)
    )
