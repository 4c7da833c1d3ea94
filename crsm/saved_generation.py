"""A generation that is put aside: a value from which the same tokens follow, on any engine with the same weights.

Its size does not grow with what was read: the recurrent state, the write in force, the last tokens, the generator of
random numbers, and the plans that wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crsm.config import DeliberationConfig, SamplingConfig
from crsm.injection import withdraw
from crsm.model import Checkpoint
from crsm.steering import NEVER, Steering
from crsm.types import LayerState, ModelState, Plan


@dataclass(frozen=True, slots=True)
class SavedGeneration:
    """A generation at rest between two tokens; arrays are numpy, so that an object store shares them."""

    generation_id: str
    model_version: int
    weights_hash: str
    position: int
    """Of the last token, which is said and not consumed."""
    tokens: tuple[int, ...]
    """The last tokens, that one included."""
    generated: int
    """Tokens said since the last prompt."""
    finished: bool
    """Its turn is over: it goes on from a further prompt only."""
    sampling: SamplingConfig
    deliberation: DeliberationConfig
    simulations: int
    pace: float | None
    plans_asked: int
    random_state: dict[str, Any]
    """Of ``numpy.random.PCG64``."""
    hidden_LD: np.ndarray
    """Residual stream after the last consumed token. (L, D) float32"""
    conv_LCK: np.ndarray
    """(L, C, K-1)"""
    ssm_LHPN: np.ndarray
    """(L, H, P, N) float32"""
    delta_LHPN: np.ndarray | None
    """The write in force, carried to now (:mod:`crsm.steering`); None: nothing is in force."""
    expires: int
    """Position at which it is spent."""
    decays_WLH: np.ndarray
    """Decays of the last tokens. (W, L, H)"""
    plans: tuple[Plan, ...] = field(default=(), repr=False)
    """Plans that have arrived and wait for their targets."""

    @property
    def num_bytes(self) -> int:
        arrays = (self.hidden_LD, self.conv_LCK, self.ssm_LHPN, self.decays_WLH)
        delta = 0 if self.delta_LHPN is None else self.delta_LHPN.nbytes
        return sum(array.nbytes for array in arrays) + delta + sum(plan.num_bytes for plan in self.plans)


def pack(state: ModelState, hidden_1LD: Tensor, steering: Steering | None) -> dict[str, Any]:
    """The arrays of a :class:`SavedGeneration`, from batches of one; ``steering`` None: nothing in force."""
    layers, heads = len(state.layers), state.layers[0].ssm_BHPN.shape[1]
    expires = NEVER if steering is None else steering.expires_B[0]
    in_force = () if steering is None or expires == NEVER else steering.delta_LBHPN
    decays = () if steering is None else steering.decays_WLBH
    return {
        "hidden_LD": hidden_1LD[0].float().cpu().numpy().copy(),
        "conv_LCK": torch.stack([layer.conv_BCK[0] for layer in state.layers]).float().cpu().numpy(),
        "ssm_LHPN": torch.stack([layer.ssm_BHPN[0] for layer in state.layers]).cpu().numpy(),
        "delta_LHPN": torch.stack([delta[0] for delta in in_force]).cpu().numpy() if in_force else None,
        "expires": expires,
        "decays_WLH": np.array(
            [torch.stack([layer_B[0] for layer_B in layers_B]).cpu().numpy() for layers_B in decays], np.float32
        ).reshape(len(decays), layers, heads),
    }


def check_saved(saved: SavedGeneration, checkpoint: Checkpoint) -> None:
    """Whether a generation can go on with these weights.

    Raises:
        ValueError: it was saved with others, or its arrays have other shapes or hold NaN or infinity.
    """
    mine = (checkpoint.model_version, checkpoint.weights_hash)
    if (saved.model_version, saved.weights_hash) != mine:
        raise ValueError(
            f"start was saved with model version {saved.model_version}, weights {saved.weights_hash or '(unnamed)'}; "
            f"allowed: {mine[0]}, {mine[1] or '(unnamed)'}"
        )
    sizes = checkpoint.model.config.model.backbone
    ssm = (sizes.n_layer, sizes.n_heads, sizes.headdim, sizes.d_state)
    want: dict[str, tuple[int, ...]] = {
        "hidden_LD": (sizes.n_layer, sizes.d_model),
        "conv_LCK": (sizes.n_layer, sizes.conv_channels, sizes.d_conv - 1),
        "ssm_LHPN": ssm,
        "decays_WLH": (len(saved.decays_WLH), sizes.n_layer, sizes.n_heads),
    }
    if saved.delta_LHPN is not None:
        want["delta_LHPN"] = ssm
    for name, shape in want.items():
        array = getattr(saved, name)
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"start.{name} is {array.dtype}{list(array.shape)}; allowed: float32{list(shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"start.{name} holds NaN or infinity; allowed: finite numbers")


def unpack(saved: SavedGeneration) -> tuple[ModelState, Tensor, Steering]:
    """State, residual streams and steering as batches of one; copies, since messages are read-only."""
    conv_LCK, ssm_LHPN = torch.tensor(saved.conv_LCK), torch.tensor(saved.ssm_LHPN)
    state = ModelState(tuple(LayerState(conv[None], ssm[None]) for conv, ssm in zip(conv_LCK, ssm_LHPN, strict=True)))
    delta_LHPN = torch.zeros_like(ssm_LHPN) if saved.delta_LHPN is None else torch.tensor(saved.delta_LHPN)
    steering = Steering(
        tuple(delta[None] for delta in delta_LHPN),
        (saved.expires,),
        tuple(tuple(layer[None] for layer in torch.tensor(decay_LH)) for decay_LH in saved.decays_WLH),
    )
    return state, torch.tensor(saved.hidden_LD)[None], steering


def state_without_write(saved: SavedGeneration) -> ModelState:
    """The state with what is in force taken out: a turn that is over has no use for its last plan."""
    state, _, steering = unpack(saved)
    if saved.delta_LHPN is None:
        return state
    pairs = zip(state.layers, steering.delta_LBHPN, strict=True)
    return state.with_ssm(tuple(withdraw(layer.ssm_BHPN, delta) for layer, delta in pairs))


def restore_random(state: dict[str, Any]) -> np.random.Generator:
    """The generator of random numbers that a saved generation had."""
    bits = np.random.PCG64()
    bits.state = state  # type: ignore[assignment]
    return np.random.Generator(bits)
