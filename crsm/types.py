"""The values that cross a boundary: model state, and the messages between generator and planners.

Letters of the shape suffixes, used everywhere in this project: ``B`` batch, ``T`` time, ``L`` layers, ``D`` d_model,
``C`` convolution channels, ``K`` convolution width, ``H`` heads, ``P`` head dimension, ``N`` d_state, ``V`` vocabulary,
``G`` world-model width, ``A`` actions expanded per node, ``R`` rank of a write.

Positions count tokens. A prompt of ``n`` tokens occupies positions ``0 … n-1``; ``state[t]`` is the state after the
token at position ``t`` was consumed, and consuming it gives the logits of position ``t+1``. A plan *for target τ* is
written immediately before the token at position τ is consumed, so it first shapes the logits of position ``τ+1``.

A planner is asked right after the token at ``t+1`` was sampled, with the snapshot ``state[t]`` and a lag::

    request:  position t+1 (token known)   target τ = t+1+lag
    planner:  consumes token t+1, then assumes tokens t+2 … τ, then searches; line[0] is its token for τ+1
    engine:   writes the plan before consuming τ, if the tokens t+2 … τ came out as assumed

Arrays inside messages are contiguous CPU numpy, so that an object store can share them without a copy. A receiver must
treat them as read-only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class LayerState(NamedTuple):
    """What one Mamba-2 layer remembers. A value: functions take one and return a new one."""

    conv_BCK: Tensor
    """The last ``K-1`` inputs of the causal convolution, oldest first. (B, C = H·P + 2·N, K-1)"""
    ssm_BHPN: Tensor
    """The SSM state ``h``. (B, H, P, N), fp32"""


@dataclass(frozen=True, slots=True)
class ModelState:
    """Everything System 1 remembers of its past, for a batch of sequences; fixed size whatever the context."""

    layers: tuple[LayerState, ...]

    @property
    def batch_size(self) -> int:
        return int(self.layers[0].ssm_BHPN.shape[0])

    def rows(self, index: Tensor | slice) -> ModelState:
        """The states of some sequences of the batch, in the order of ``index``."""
        return ModelState(tuple(LayerState(layer.conv_BCK[index], layer.ssm_BHPN[index]) for layer in self.layers))

    def with_ssm(self, ssm: tuple[Tensor, ...]) -> ModelState:
        """The same state with other SSM states (one tensor (B, H, P, N) per layer)."""
        return ModelState(tuple(LayerState(layer.conv_BCK, new) for layer, new in zip(self.layers, ssm, strict=True)))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer)


class StepOutput(NamedTuple):
    """What consuming one token per sequence gives."""

    hidden_BLD: Tensor
    """Residual stream after every layer."""
    state: ModelState
    decay_LBH: tuple[Tensor, ...]
    """Per layer, this token's state decay per head (B, H): what carries a write to the next position."""


def concat_states(states: list[ModelState]) -> ModelState:
    """One batch out of several, in order."""
    import torch

    if len(states) == 1:
        return states[0]
    return ModelState(
        tuple(
            LayerState(torch.cat([layer.conv_BCK for layer in layers]), torch.cat([layer.ssm_BHPN for layer in layers]))
            for layers in zip(*(state.layers for state in states), strict=True)
        )
    )


class Channel(str, enum.Enum):
    """How a plan reaches System 1."""

    STATE = "state"
    """The plan is written into the SSM state (the default)."""
    POLICY = "policy"
    """The search's visit distribution is mixed into the logits with weight ``confidence``."""
    BOTH = "both"
    OFF = "off"
    """Plans are made and counted, and change nothing."""


class Reason(str, enum.Enum):
    """What became of a request."""

    ON_TIME = "on_time"
    LATE = "late"
    """Arrived 1 … max_lag tokens after its target and was carried forward."""
    SHUT = "shut"
    """On time, matched, and every gate was 0: nothing to write. Not a failure of the pool."""
    SUPERSEDED = "superseded"
    """Usable, but a newer plan was there as well."""
    STALE = "stale"
    """Arrived more than ``max_lag`` tokens after its target."""
    MISMATCH = "mismatch"
    """The assumed tokens differ from those generated."""
    ENDED = "ended"
    """Its generation has finished or was cancelled."""
    MALFORMED = "malformed"
    """Wrong shape, NaN or infinity, token outside the vocabulary."""
    OLD_VERSION = "old_version"
    """Made with other weights than the generator's."""
    LOST = "lost"
    """Never came back: its planner died, failed or is gone, or the message was lost."""
    SHED = "shed"
    """The planners dropped it: all were busy, or its plan would have come too late."""
    DECLINED = "declined"
    """Never asked: the planners had no room, or the plan would have come too late; no snapshot was taken."""

    @property
    def is_hit(self) -> bool:
        """The planner delivered something usable in time."""
        return self in (Reason.ON_TIME, Reason.LATE, Reason.SHUT, Reason.SUPERSEDED)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a planner needs to deliberate for one target position of one generation."""

    request_id: int
    """Unique within the generator that asks."""
    generation_id: str
    """Unique over generators and time; never reused."""
    position: int
    """Position of ``token``; the snapshot was taken after ``position - 1``."""
    target: int
    """Position before whose consumption the plan is to be written; ``target - position`` is the lag."""
    token: int
    """The token at ``position``: sampled, not yet consumed."""
    hidden_LD: np.ndarray
    """Residual stream after every layer at ``position - 1``. (L, D) float32, or bf16 as uint16 (:mod:`crsm.wire`)"""
    ssm_LHPN: np.ndarray
    """SSM states after ``position - 1`` of the layers that the planner reads, in order. (L', H, P, N), likewise"""
    conv_LCK: np.ndarray | None = None
    """Convolution states, only for the exact world model. (L, C, K-1), likewise"""
    simulations: int = 64
    """Budget of the search."""
    hypotheses: int = 1
    """Futures to project and search."""
    deadline: float | None = None
    """``time.monotonic()`` seconds on the generator's clock when the target's token is consumed: the search answers by
    then with the best it has; None: no deadline."""
    expires: float | None = None
    """Seconds on the same clock after which the plan is worthless (``max_lag`` tokens later); None: never."""
    value: float = 0.0
    """What a plan is expected to be worth beside those of other requests (:mod:`crsm.computation_value`)."""
    seed: int = 0
    model_version: int = 0
    """Version of the weights the snapshot was made with."""
    sketch: bool = False
    """Have the search tree drawn into the plan."""

    @property
    def num_bytes(self) -> int:
        conv = 0 if self.conv_LCK is None else self.conv_LCK.nbytes
        return self.hidden_LD.nbytes + self.ssm_LHPN.nbytes + conv


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes back: one searched future. Small: ``L·R·(H·P+N)`` numbers for the write."""

    request_id: int
    generation_id: str
    position: int
    target: int
    assumed: tuple[int, ...]
    """Tokens assumed at ``position+1 … target``."""
    line: tuple[int, ...]
    """Principal variation: tokens for ``target+1``, ``target+2``, …"""
    value_root_L: np.ndarray
    """Value of the position before the plan, per layer: probability of a verified-correct end. (L,) float32"""
    value_plan_L: np.ndarray
    """Value at the end of the line, per layer. (L,) float32"""
    uncertainty: float
    """Standard deviation over layers of ``value_plan_L``."""
    confidence_L: np.ndarray
    """Gate per layer in [0, 1]; exactly 0 leaves the layer untouched. (L,) float32"""
    write_u_LRE: np.ndarray
    """Left factor of the write, E = H·P. (L, R, H·P) float32, or bf16 as uint16 (:mod:`crsm.wire`)"""
    write_b_LRN: np.ndarray
    """Right factor of the write. (L, R, N), likewise"""
    policy_tokens_A: np.ndarray
    """Root actions of the search. (A,) int64"""
    policy_probs_A: np.ndarray
    """Root visit distribution over them. (A,) float32, sums to 1"""
    simulations: int = 0
    """Simulations really spent."""
    seconds: float = 0.0
    """Time the planner worked on it."""
    planner_id: str = ""
    model_version: int = 0
    tree: dict[str, object] | None = field(default=None, repr=False)
    """The whole search tree as plain data, if the deliberator keeps it (drawing, debugging)."""
    sketch_S6: np.ndarray | None = field(default=None, repr=False)
    """The most visited nodes of the tree, if the request asked for them (:mod:`crsm.search.sketch`). (S, 6) float32"""

    @property
    def num_bytes(self) -> int:
        """Of all arrays; a plan that was not checked may hold anything in their place, which counts as none."""
        values = (self.value_root_L, self.value_plan_L, self.confidence_L)
        policy = (self.policy_tokens_A, self.policy_probs_A)
        return sum(getattr(array, "nbytes", 0) for array in (*values, *policy, self.write_u_LRE, self.write_b_LRN))


@dataclass(frozen=True, slots=True)
class Injection:
    """A plan as it was applied."""

    plan: Plan
    position: int
    """Position before whose consumption it was applied; ``position - plan.target`` tokens late."""
    alpha_L: tuple[float, ...]
    """Gate per layer as applied: ``injection_rate · confidence · late_decay^late``; all 0 if only the policy moved."""
    policy_weight: float = 0.0
    """Weight of the visit distribution in the next logits (channels ``policy`` and ``both``)."""


class Token(NamedTuple):
    """One generated token, as it is streamed."""

    generation_id: str
    position: int
    token: int
    logprob: float
    """Log-probability under the distribution it was sampled from (after steering, before temperature)."""
    finished: bool = False
    finish_reason: str | None = None
    """``stop`` (a stop token), ``length``, ``cancelled``, or ``read`` (a prompt that was only to be read; both name no
    token)."""
    injection: Injection | None = None
    """The plan that was applied right before this token's logits were computed, if any."""
