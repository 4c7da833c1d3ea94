"""The steering of a running batch: which write is in force where, and the state with it applied.

A value like the model's state: :func:`steer`, :func:`advance` and :meth:`Steering.rows` return a new one. Rows follow
the rows of the batch. With nothing in force the states pass through untouched, bit for bit.

Letters: B batch, L layers, H heads, P head dimension, N d_state, W positions remembered for late plans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crsm.devices import index_on, to_device
from crsm.injection import carry, inject, outer_write, withdraw
from crsm.types import Injection, ModelState
from crsm.wire import from_wire

NEVER = 2**62


@dataclass(frozen=True, slots=True)
class Steering:
    delta_LBHPN: tuple[Tensor, ...]
    """Per layer, the difference that the write in force made, carried to now; zeros: none. (B, H, P, N) each"""
    expires_B: tuple[int, ...]
    """Position before whose consumption the write in force is spent; ``NEVER``: none in force."""
    decays_WLBH: tuple[tuple[Tensor, ...], ...]
    """Decays of the last W consumed tokens, the newest last; per token one tensor (B, H) per layer."""

    def rows(self, index: Tensor) -> Steering:
        return Steering(
            tuple(delta[index] for delta in self.delta_LBHPN),
            tuple(self.expires_B[row] for row in index.tolist()),
            tuple(tuple(decay[index] for decay in layers) for layers in self.decays_WLBH),
        )


def no_steering(state: ModelState) -> Steering:
    """Nothing in force, nothing remembered."""
    return Steering(tuple(torch.zeros_like(layer.ssm_BHPN) for layer in state.layers), (NEVER,) * state.batch_size, ())


def concat_steering(parts: list[Steering]) -> Steering:
    """One batch out of several; rows that remember less are filled up with decays of 1, which carry nothing away.

    A row that joined later never has plans for positions before it joined, so the filling is never used.
    """
    if len(parts) == 1:
        return parts[0]
    depth = max(len(part.decays_WLBH) for part in parts)
    filled = []
    for part in parts:
        ones = tuple(delta.new_ones(delta.shape[:2]) for delta in part.delta_LBHPN)
        filled.append((ones,) * (depth - len(part.decays_WLBH)) + part.decays_WLBH)
    return Steering(
        tuple(torch.cat(layer) for layer in zip(*(part.delta_LBHPN for part in parts), strict=True)),
        tuple(expires for part in parts for expires in part.expires_B),
        tuple(
            tuple(torch.cat(layer) for layer in zip(*(memory[back] for memory in filled), strict=True))
            for back in range(depth)
        ),
    )


def advance(steering: Steering, decay_LBH: tuple[Tensor, ...], remember: int) -> Steering:
    """After a token was consumed: carries what is in force, remembers the decays of the last ``remember`` tokens."""
    delta = steering.delta_LBHPN
    if any(expires != NEVER for expires in steering.expires_B):
        delta = tuple(carry(layer, decay) for layer, decay in zip(delta, decay_LBH, strict=True))
    memory = (*steering.decays_WLBH, decay_LBH)[-remember:] if remember else ()
    return replace(steering, delta_LBHPN=delta, decays_WLBH=memory)


def steer(
    state: ModelState,
    steering: Steering,
    injections: dict[int, Injection],
    position_B: list[int],
    tracked_B: list[bool],
) -> tuple[ModelState, Steering]:
    """Withdraws what is spent or superseded and writes what is due, before the next token is consumed.

    Args:
        state: the batch.
        steering: what is in force.
        injections: plans to write, by row; rows whose gates are all 0 are left alone.
        position_B: position about to be consumed, per row.
        tracked_B: rows whose writes are to be withdrawn one day; in the others they are left to fade.
    """
    writing = {row: injection for row, injection in injections.items() if any(injection.alpha_L)}
    spent = [row for row, expires in enumerate(steering.expires_B) if expires <= position_B[row]]
    touched = sorted({*writing, *spent})
    if not touched:
        return state, steering
    expires = list(steering.expires_B)
    for row in spent:
        expires[row] = NEVER
    for row, injection in writing.items():
        if tracked_B[row]:
            expires[row] = injection.plan.target + max(1, len(injection.plan.line))
    device = state.layers[0].ssm_BHPN.device
    index = index_on(touched, device)
    kept = to_device(torch.tensor([expires[row] != NEVER for row in touched]), device)[:, None, None, None]
    factors = {row: _factors(injection, device) for row, injection in writing.items()}
    closed = (0.0,) * len(state.layers)
    alphas = [writing[row].alpha_L if row in writing else closed for row in touched]
    alpha_BL = to_device(torch.tensor(alphas, dtype=state.layers[0].ssm_BHPN.dtype), device)
    ssm, deltas = [], []
    for layer, (layer_state, delta_BHPN) in enumerate(zip(state.layers, steering.delta_LBHPN, strict=True)):
        rows_BHPN = withdraw(layer_state.ssm_BHPN[index], delta_BHPN[index])
        written_BHPN = _writes(rows_BHPN, writing, factors, touched, layer, steering)
        new_BHPN = inject(rows_BHPN, written_BHPN, alpha_BL[:, layer])
        ssm.append(layer_state.ssm_BHPN.index_copy(0, index, new_BHPN))
        deltas.append(delta_BHPN.index_copy(0, index, (new_BHPN - rows_BHPN) * kept))
    return state.with_ssm(tuple(ssm)), replace(steering, delta_LBHPN=tuple(deltas), expires_B=tuple(expires))


def _factors(injection: Injection, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both factors of a plan's write where the states are, in float32: copies, since messages are read-only."""
    plan = injection.plan
    u_LRE, b_LRN = torch.tensor(from_wire(plan.write_u_LRE)), torch.tensor(from_wire(plan.write_b_LRN))
    return to_device(u_LRE, device), to_device(b_LRN, device)


def _writes(
    rows_BHPN: Tensor,
    writing: dict[int, Injection],
    factors: dict[int, tuple[Tensor, Tensor]],
    touched: list[int],
    layer: int,
    steering: Steering,
) -> Tensor:
    """The writes of one layer for the touched rows, late ones carried to now."""
    written_BHPN = torch.zeros_like(rows_BHPN)
    for place, row in enumerate(touched):
        if row not in writing or writing[row].alpha_L[layer] == 0:
            continue
        injection = writing[row]
        u_LRE, b_LRN = factors[row]
        write_HPN = outer_write(u_LRE[layer, None], b_LRN[layer, None], rows_BHPN.shape[1])[0].to(rows_BHPN)
        for back in range(injection.position - injection.plan.target):
            write_HPN = write_HPN * steering.decays_WLBH[-1 - back][layer][row][:, None, None]
        written_BHPN[place] = write_HPN
    return written_BHPN
