"""Prompts on their way into states, chunk by chunk, so that a long one does not hold up those who speak.

Where the chunks of a prompt end depends on the prompt alone: whoever else is served, the state has the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crsm.devices import device_of, index_on, state_on, to_device
from crsm.generation import Generation
from crsm.model import CRSM
from crsm.types import ModelState, concat_states


@dataclass(slots=True, eq=False)
class Prompt:
    """What one generation has yet to consume before it speaks."""

    generation: Generation
    tokens: tuple[int, ...]
    state: ModelState | None = None
    """After ``done`` tokens, batch of 1; None: the beginning."""
    done: int = 0

    def next_chunk(self, chunk: int) -> tuple[int, ...]:
        return self.tokens[self.done : self.done + chunk]


@dataclass(frozen=True, slots=True)
class Finished:
    """Prompts that were consumed to their ends in one call."""

    generations: list[Generation]
    logits_BV: Tensor
    hidden_BLD: Tensor
    state: ModelState


def choose_prompts(prompts: Sequence[Prompt], chunk: int, budget: int) -> list[Prompt]:
    """The first in the line whose next chunks fit into a budget of tokens; at least one."""
    chosen: list[Prompt] = []
    for prompt in prompts:
        budget -= len(prompt.next_chunk(chunk))
        if chosen and budget < 0:
            break
        chosen.append(prompt)
    return chosen


def consume_chunks(model: CRSM, prompts: Sequence[Prompt], chunk: int) -> Iterator[Finished]:
    """Consumes the next chunk of every prompt, those of equal length in one call; yields those that are through."""
    device = device_of(model)
    alike: dict[tuple[int, bool], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        alike[len(prompt.next_chunk(chunk)), prompt.state is None].append(prompt)
    for group in alike.values():
        tokens_BT = to_device(torch.tensor([prompt.next_chunk(chunk) for prompt in group]), device)
        before = [state_on(prompt.state, device) for prompt in group if prompt.state is not None]
        logits_BV, hidden_BLD, state = model.prefill(tokens_BT, concat_states(before) if before else None)
        through = []
        for row, prompt in enumerate(group):
            prompt.done += tokens_BT.shape[1]
            if prompt.done == len(prompt.tokens):
                through.append(row)
            else:
                prompt.state = state.rows(slice(row, row + 1))
        if through:
            rows = index_on(through, device)
            yield Finished(
                [group[row].generation for row in through], logits_BV[rows], hidden_BLD[rows], state.rows(rows)
            )
