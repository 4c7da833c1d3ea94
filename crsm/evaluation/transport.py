"""How exact is it to carry a write by the decays? Per layer, against a model that really was written to in time.

A write makes a difference δ to a layer's state. k tokens later its effect is the state of the run with the write minus
that of the run without. Carried by the product of the decays, δ is that effect exactly in the first layer, whose inputs
are the tokens alone. The layers above it read what the ones below made of the write: their inputs, and so their decays,
differ, and what is carried is only a part of the effect.

Every figure is an error over the size of the effect, both as root mean squares over rows, heads and entries.

Letters: B rows, T tokens, L layers, H heads; P, N as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crsm.evaluation.steering_audit import Line
from crsm.injection import carry, head_norms, inject, outer_write, withdraw
from crsm.model import CRSM, Checkpoint
from crsm.types import ModelState

FIXED_DECAY = 0.9
"""Per token, of the rule of thumb that exact transport is compared with."""


class _Walk(NamedTuple):
    """States after some tokens, and the product of the decays on the way there; a tensor per layer."""

    state: ModelState
    decay_LBH: tuple[Tensor, ...]


@torch.inference_mode()
def transport_errors(
    checkpoint: Checkpoint, lines: Sequence[Line], *, rate: float, late: Sequence[int]
) -> list[dict[str, Any]]:
    """A plan written before the first answer token, and what the ways to carry it make of it ``late`` tokens later.

    Args:
        checkpoint: with a trained writer; its plan is the line's own next tokens.
        lines: prompts with answers, of equal lengths each; behind the answer the text begins anew.
        rate: α of every layer, on time and late.
        late: numbers of tokens consumed after the write.

    Returns:
        A row per number of tokens and layer: ``carried``, the error of δ times the decays of the written run, which is
        what is withdrawn later; ``fixed``, of δ times ``FIXED_DECAY`` per token; ``raw``, of δ as it was;
        ``late_write``, of the write carried by the decays of the run without it and injected late, as the engine does
        it; ``withdrawn``, what is left after the withdrawal; ``cut``, share of the heads that it had to clip;
        ``norm_written`` and ``norm_withdrawn``, mean norm of a head before and after it, over that without the write.
    """
    model, length = checkpoint.model, checkpoint.config.deliberation.plan_length
    lengths = {(len(line.prompt), len(line.answer)) for line in lines}
    if len(lengths) != 1:
        raise ValueError(f"lines have lengths {sorted(lengths)}; allowed: the same of all, prompt and answer")
    if not late or min(late) < 1:
        raise ValueError(f"late = {tuple(late)}; allowed: numbers from 1 on, at least one")
    prompt_BT = torch.tensor([line.prompt for line in lines])
    round_BT = torch.tensor([line.answer + line.prompt for line in lines])
    text_BT = torch.cat([round_BT] * (1 + max(late) // round_BT.shape[1]), dim=1)
    _, _, before = model.prefill(prompt_BT)
    planned = round_BT[:, 1 : 1 + length]
    write = model.writer(planned, torch.full((len(lines),), planned.shape[1]))
    heads = checkpoint.config.model.backbone.n_heads
    writes = [outer_write(write.u_BLRE[:, i], write.b_BLRN[:, i], heads) for i in range(len(before.layers))]
    alpha_B = torch.full((len(lines),), rate)
    ssm_L = [layer.ssm_BHPN for layer in before.layers]
    written_L = [inject(ssm, write_BHPN, alpha_B) for ssm, write_BHPN in zip(ssm_L, writes, strict=True)]
    deltas = [written - ssm for written, ssm in zip(written_L, ssm_L, strict=True)]
    plain, steered = _Walk(before, _ones(before)), _Walk(before.with_ssm(tuple(written_L)), _ones(before))
    rows = []
    for step in range(1, max(late) + 1):
        token_B = text_BT[:, step - 1]
        plain, steered = _consume(model, plain, token_B), _consume(model, steered, token_B)
        if step in late:
            for layer, (delta_BHPN, write_BHPN) in enumerate(zip(deltas, writes, strict=True)):
                errors = _errors(plain, steered, layer, step, delta_BHPN, write_BHPN, alpha_B)
                rows.append({"late": step, "layer": layer} | errors)
    return rows


def _errors(
    plain: _Walk, steered: _Walk, layer: int, step: int, delta_BHPN: Tensor, write_BHPN: Tensor, alpha_B: Tensor
) -> dict[str, float]:
    h_BHPN, written_BHPN = plain.state.layers[layer].ssm_BHPN, steered.state.layers[layer].ssm_BHPN
    effect_BHPN = written_BHPN - h_BHPN
    size = effect_BHPN.norm()

    def error(guess_BHPN: Tensor) -> float:
        return float((guess_BHPN - effect_BHPN).norm() / size)

    carried_BHPN = carry(delta_BHPN, steered.decay_LBH[layer])
    left_BHPN = withdraw(written_BHPN, carried_BHPN)
    norm_BH, written_BH = head_norms(h_BHPN), head_norms(written_BHPN)
    return {
        "carried": error(carried_BHPN),
        "fixed": error(delta_BHPN * FIXED_DECAY**step),
        "raw": error(delta_BHPN),
        "late_write": error(inject(h_BHPN, carry(write_BHPN, plain.decay_LBH[layer]), alpha_B) - h_BHPN),
        "withdrawn": float((left_BHPN - h_BHPN).norm() / size),
        "cut": float((head_norms(written_BHPN - carried_BHPN) > written_BH).float().mean()),
        "norm_written": float((written_BH / norm_BH).mean()),
        "norm_withdrawn": float((head_norms(left_BHPN) / norm_BH).mean()),
    }


def _ones(state: ModelState) -> tuple[Tensor, ...]:
    return tuple(layer.ssm_BHPN.new_ones(layer.ssm_BHPN.shape[:2]) for layer in state.layers)


def _consume(model: CRSM, walk: _Walk, token_B: Tensor) -> _Walk:
    out = model.backbone.step(token_B, walk.state)
    return _Walk(out.state, tuple(past * now for past, now in zip(walk.decay_LBH, out.decay_LBH, strict=True)))
