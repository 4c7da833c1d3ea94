"""How a turn begins, from nothing or from a saved state, and how one is put aside."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crsm.deliberation import Deliberation
from crsm.generation import TOKENS_KEPT, Generation, GenerationRequest
from crsm.model import Checkpoint
from crsm.prompts import Prompt
from crsm.saved_generation import SavedGeneration, check_saved, pack, restore_random, state_without_write
from crsm.steering import Steering
from crsm.types import ModelState


def check_request(request: GenerationRequest, checkpoint: Checkpoint, *, goes_on: bool) -> None:
    """Whether a request can be carried out; ``goes_on``: its id is that of a parked generation.

    Raises:
        ValueError: naming what is wrong with it.
    """
    vocab, saved = checkpoint.model.config.model.backbone.vocab_size, request.start
    if not request.prompt and (saved is None or saved.finished):
        raise ValueError("prompt is empty; allowed: at least one token")
    for name, tokens in (("prompt", request.prompt), ("forced", request.forced)):
        if bad := [token for token in tokens if not 0 <= token < vocab]:
            raise ValueError(f"{name} holds token {bad[0]}; allowed: 0 to {vocab - 1}")
    if request.pace is not None and not request.pace > 0:
        raise ValueError(f"pace = {request.pace}; allowed: above 0, or None")
    if saved is not None and goes_on:
        raise ValueError(f"generation_id = {request.generation_id!r} is parked and start is set; allowed: one of them")
    if saved is not None:
        check_saved(saved, checkpoint)


def first_turn(generation: Generation, deliberation: Deliberation) -> Prompt:
    """What a fresh generation has to consume before it speaks; nothing if it goes on in the middle of a turn."""
    request, saved = generation.request, generation.request.start
    if saved is None and request.read_only:
        return _leave_the_last(generation, request.prompt, 0, None)
    if saved is None:
        generation.first = len(request.prompt)
        return Prompt(generation, request.prompt)
    if request.prompt:
        prompt = next_turn(generation, request, saved, deliberation)
    else:
        if not request.reseed:
            generation.rng = restore_random(saved.random_state)
        generation.tokens, generation.generated = list(saved.tokens), saved.generated
        generation.first = saved.position + 1 - len(saved.tokens)
        generation.plans_asked, generation.ask_at = saved.plans_asked, saved.generated + 1
        prompt = Prompt(generation, ())
    deliberation.adopt(generation, saved.plans)
    return prompt


def next_turn(
    generation: Generation, request: GenerationRequest, saved: SavedGeneration, deliberation: Deliberation
) -> Prompt:
    """A prompt that goes on from a saved state: the last token said, then what is new.

    If a plan was foreseen for the end of this prompt, the last token of the prompt is left to be consumed by a step,
    right before which the plan is written.
    """
    generation.request = request
    generation.rng = np.random.default_rng(request.sampling.seed)
    generation.generated, generation.plans_asked, generation.ask_at = 0, 0, 1
    generation.first, generation.tokens = saved.position + 1 + len(request.prompt), []
    consumed = (saved.tokens[-1], *request.prompt)
    last = saved.position + len(request.prompt)
    if generation.open_requests:
        deliberation.await_plans(generation, last)
    foreseen = (*saved.plans, *deliberation.waiting(generation))
    if request.read_only or any(plan.target == last for plan in foreseen):
        return _leave_the_last(generation, consumed, saved.position, state_without_write(saved))
    return Prompt(generation, consumed, state_without_write(saved))


def _leave_the_last(generation: Generation, tokens: tuple[int, ...], first: int, state: ModelState | None) -> Prompt:
    """A prompt whose last token is left to be consumed by a step; ``first``: position of its first."""
    kept = tokens[-TOKENS_KEPT:]
    generation.first, generation.tokens = first + len(tokens) - len(kept), list(kept)
    return Prompt(generation, tokens[:-1], state)


def put_aside(
    generation: Generation,
    checkpoint: Checkpoint,
    deliberation: Deliberation,
    state: ModelState,
    hidden_1LD: Tensor,
    steering: Steering | None,
) -> SavedGeneration:
    """A generation as a value, from what its slot holds; ``steering`` None: nothing is in force."""
    request = generation.request
    return SavedGeneration(
        generation_id=generation.id,
        model_version=checkpoint.model_version,
        weights_hash=checkpoint.weights_hash,
        position=generation.position,
        tokens=tuple(generation.tokens),
        generated=generation.generated,
        finished=not request.read_only and generation.finish_reason() is not None,
        sampling=request.sampling,
        deliberation=request.deliberation,
        simulations=request.simulations,
        pace=request.pace,
        plans_asked=generation.plans_asked,
        random_state=dict(generation.rng.bit_generator.state),
        plans=deliberation.waiting(generation),
        **pack(state, hidden_1LD, steering),
    )
