"""States of running generations, a slot each: consumed, steered and replaced in place.

The functions of :mod:`crsm.steering` on values that are kept where they are: a generation joins by copying its own
state in, leaves by giving its slot back, and nobody else's state moves. A slot that nothing is written into holds the
bits of the plain decoder.

Letters: B named slots, L layers, D d_model, V vocabulary, H heads, P head dimension, N d_state, C convolution channels,
K convolution width, W positions remembered for late plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from crsm.config import BackboneConfig
from crsm.decoding import Decoder
from crsm.devices import device_of, index_on, state_on, to_device, to_host
from crsm.injection import LARGEST_WRITE, carry
from crsm.model import CRSM
from crsm.native.decoder import NativeDecoder
from crsm.native.slots import SlotMemory, Write
from crsm.steering import NEVER, Steering, steer
from crsm.types import Injection, LayerState, ModelState
from crsm.wire import Wire, from_wire, is_wire


class Slots(Protocol):
    """Running generations' states, a slot each. Slots are numbers below ``capacity``; who has which is the caller's
    business, and what a slot holds before :meth:`put` or :meth:`restore` is undefined."""

    @property
    def capacity(self) -> int: ...

    @staticmethod
    def bytes_per_slot(config: BackboneConfig, max_lag: int) -> int:
        """State, what is in force, residual streams and remembered decays, at 4 bytes a number."""
        ssm = config.d_inner * config.d_state
        conv = config.conv_channels * (config.d_conv - 1)
        return 4 * config.n_layer * (2 * ssm + conv + config.d_model + max_lag * config.n_heads)

    def grow(self, capacity: int) -> None:
        """Makes room for more; what the slots hold stays.

        Raises:
            ValueError: ``capacity`` is below what there is.
        """
        ...

    def put(self, slots: Sequence[int], state: ModelState, hidden_BLD: Tensor) -> None:
        """Copies a batch into slots, row by row: nothing is in force, no decays are remembered."""
        ...

    def restore(self, slot: int, state: ModelState, hidden_1LD: Tensor, steering: Steering) -> None:
        """Puts back what :meth:`save` gave."""
        ...

    def save(self, slot: int) -> tuple[ModelState, Tensor, Steering]:
        """Copies of all that a slot holds, as a batch of one."""
        ...

    def read(
        self, slots: Sequence[int], layers: Sequence[int], conv: bool, wire: Wire = "fp32"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Copies for planners on the CPU, contiguous and float32, a row per slot, in order.

        Where ``wire`` is bf16 and states come from a GPU, they are rounded there, before they cross.

        Returns:
            Residual streams (B, L, D), SSM states (B, L', H, P, N) of ``layers``, in order, and, if ``conv``,
            convolution states (B, L, C, K-1).
        """
        ...

    def steer(
        self,
        slots: Sequence[int],
        injections: dict[int, Injection],
        positions: Sequence[int],
        tracked: Sequence[bool],
    ) -> None:
        """:func:`crsm.steering.steer` in place; slots with nothing to do keep their bits.

        Args:
            slots: whom to look at, each once.
            injections: plans to write, by index into ``slots``.
            positions: position about to be consumed, per named slot.
            tracked: whether a write is to be withdrawn one day, per named slot.
        """
        ...

    def step(self, token_B: Tensor | Sequence[int], slots: Sequence[int], remember: int) -> Tensor:
        """Consumes one token per named slot, each named once; what is in force is carried along.

        Args:
            token_B: token ids.
            slots: whose tokens they are.
            remember: the decays of so many last tokens are kept for late plans; a slot that has consumed fewer since it
                was put counts a decay of 1 for each that is missing.

        Returns:
            Logits (B, V) of the named slots, in order.
        """
        ...

    def step_log_probs(
        self, token_B: Tensor | Sequence[int], slots: Sequence[int], remember: int
    ) -> tuple[Tensor, list[int]]:
        """:meth:`step` to log-probabilities (B, V), and the likeliest token of every row (of equals the lowest)."""
        ...

    def free(self, slot: int) -> None:
        """Forgets what is in force in a slot that is given back."""
        ...


def make_slots(model: CRSM, decoder: Decoder, capacity: int, graphs: bool = True) -> Slots:
    """Slots for the states that a decoder of this model consumes.

    Args:
        graphs: on a GPU, replay steps instead of launching them (:mod:`crsm.step_graphs`).

    Raises:
        ValueError: ``capacity`` is below 1.
    """
    if isinstance(decoder, NativeDecoder):
        return NativeSlots(decoder, capacity)
    device = device_of(model)
    if device.type == "cuda" and graphs:
        from crsm.step_graphs import CudaRecorder, GraphedSlots

        return GraphedSlots(model, decoder, capacity, CudaRecorder(device))
    return TorchSlots(model, decoder, capacity)


class TorchSlots(Slots):
    """Gathers the named slots, lets the decoder and :mod:`crsm.steering` work on them, and puts them back."""

    @torch.inference_mode()
    def __init__(self, model: CRSM, decoder: Decoder, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}; allowed: at least 1")
        self._decoder, self._capacity = decoder, capacity
        self._state = _apart(model.backbone.initial_state(capacity))
        self._deltas = tuple(torch.zeros_like(layer.ssm_BHPN) for layer in self._state.layers)
        sizes, wide = model.config.model.backbone, self._deltas[0]
        self._hidden_BLD = model.backbone.embedding.weight.new_zeros(capacity, sizes.n_layer, sizes.d_model)
        # The newest last; 1 where a slot remembers nothing.
        self._decay_WLBH = wide.new_ones(0, sizes.n_layer, capacity, sizes.n_heads)
        self._depth = [0] * capacity
        self._expires = [NEVER] * capacity

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def device(self) -> torch.device:
        """Where the states lie."""
        return self._hidden_BLD.device

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        if capacity < self.capacity:
            raise ValueError(f"capacity = {capacity}; allowed: at least {self.capacity}, what there is")
        more = capacity - self.capacity

        def longer(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])

        self._state = ModelState(
            tuple(LayerState(longer(layer.conv_BCK), longer(layer.ssm_BHPN)) for layer in self._state.layers)
        )
        self._deltas = tuple(longer(delta) for delta in self._deltas)
        self._hidden_BLD = longer(self._hidden_BLD)
        depth, layers, _, heads = self._decay_WLBH.shape
        self._decay_WLBH = torch.cat([self._decay_WLBH, self._decay_WLBH.new_ones(depth, layers, more, heads)], dim=2)
        self._depth += [0] * more
        self._expires += [NEVER] * more
        self._capacity = capacity

    @torch.inference_mode()
    def put(self, slots: Sequence[int], state: ModelState, hidden_BLD: Tensor) -> None:
        index = self._index(slots)
        self._write(index, state_on(state, self.device))
        self._hidden_BLD[index] = to_device(hidden_BLD, self.device)
        for delta in self._deltas:
            delta[index] = 0
        self._decay_WLBH[:, :, index] = 1
        for slot in slots:
            self._depth[slot], self._expires[slot] = 0, NEVER

    @torch.inference_mode()
    def restore(self, slot: int, state: ModelState, hidden_1LD: Tensor, steering: Steering) -> None:
        self.put([slot], state, hidden_1LD)
        for mine, delta_1HPN in zip(self._deltas, steering.delta_LBHPN, strict=True):
            mine[slot] = delta_1HPN[0]
        depth = len(steering.decays_WLBH)
        self._remember(depth)
        for back, layers in enumerate(reversed(steering.decays_WLBH)):
            self._decay_WLBH[-1 - back, :, slot] = torch.cat(layers)
        self._depth[slot], self._expires[slot] = depth, steering.expires_B[0]

    @torch.inference_mode()
    def save(self, slot: int) -> tuple[ModelState, Tensor, Steering]:
        index = self._index([slot])
        return self._state.rows(index), self._hidden_BLD[index], self._steering([slot], index, self._depth[slot])

    @torch.inference_mode()
    def read(
        self, slots: Sequence[int], layers: Sequence[int], conv: bool, wire: Wire = "fp32"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        index, states = self._index(slots), self._state.layers

        rounded = wire == "bf16" and self.device.type != "cpu"

        def gathered(tensors: list[Tensor]) -> Tensor:
            together = torch.stack([tensor[index] for tensor in tensors], dim=1)
            return together.bfloat16() if rounded else together.float()

        hidden_BLD, ssm_BLHPN, *convs = to_host(
            self._hidden_BLD[index].float(),
            gathered([states[layer].ssm_BHPN for layer in layers])
            if layers
            else self._hidden_BLD.new_empty(len(slots), 0, *states[0].ssm_BHPN.shape[1:]),
            *([gathered([layer.conv_BCK for layer in states])] if conv else []),
        )
        return hidden_BLD, ssm_BLHPN, convs[0] if conv else None

    @torch.inference_mode()
    def steer(
        self,
        slots: Sequence[int],
        injections: dict[int, Injection],
        positions: Sequence[int],
        tracked: Sequence[bool],
    ) -> None:
        writing = {place: injection for place, injection in injections.items() if any(injection.alpha_L)}
        touched = [
            place for place, slot in enumerate(slots) if place in writing or self._expires[slot] <= positions[place]
        ]
        if not touched:
            return
        named = [slots[place] for place in touched]
        index = self._index(named)
        late = max((injection.position - injection.plan.target for injection in writing.values()), default=0)
        self._remember(late)
        state, steering = steer(
            self._state.rows(index),
            self._steering(named, index, late),
            {row: _widened(writing[place]) for row, place in enumerate(touched) if place in writing},
            [positions[place] for place in touched],
            [tracked[place] for place in touched],
        )
        self._write(index, state)
        for mine, delta_BHPN in zip(self._deltas, steering.delta_LBHPN, strict=True):
            mine[index] = delta_BHPN
        for slot, expires in zip(named, steering.expires_B, strict=True):
            self._expires[slot] = expires

    @torch.inference_mode()
    def step(self, token_B: Tensor | Sequence[int], slots: Sequence[int], remember: int) -> Tensor:
        index, token_B = self._index(slots), to_device(torch.as_tensor(token_B), self.device)
        logits_BV, decay_LBH = self._advance(token_B, index, any(self._expires[slot] != NEVER for slot in slots))
        self._keep_decays(slots, index, decay_LBH, remember)
        return logits_BV

    @torch.inference_mode()
    def step_log_probs(
        self, token_B: Tensor | Sequence[int], slots: Sequence[int], remember: int
    ) -> tuple[Tensor, list[int]]:
        logits_BV = self.step(token_B, slots, remember)
        likeliest: list[int] = logits_BV.argmax(dim=-1).tolist()
        return logits_BV.log_softmax(dim=-1), likeliest

    def free(self, slot: int) -> None:
        self._expires[slot] = NEVER

    def _advance(self, token_B: Tensor, index: Tensor, carried: bool) -> tuple[Tensor, Tensor]:
        """What a step does on the device, in memory that stays where it is: logits (B, V) and decays (L, B, H).

        Args:
            token_B: tokens.
            index: whose they are.
            carried: whether something is in force in one of the slots.
        """
        out = self._decoder.step(token_B, self._state.rows(index), donate=True)
        self._write(index, out.state)
        self._hidden_BLD[index] = out.hidden_BLD
        if carried:
            for mine, decay_BH in zip(self._deltas, out.decay_LBH, strict=True):
                mine[index] = carry(mine[index], decay_BH)
        return self._decoder.logits(out.hidden_BLD), torch.stack(out.decay_LBH)

    def _keep_decays(self, slots: Sequence[int], index: Tensor, decay_LBH: Tensor, remember: int) -> None:
        """Remembers the decays of a step for late plans."""
        self._remember(remember)
        decays_WLBH = torch.cat([self._decay_WLBH[:, :, index], decay_LBH[None]])[1:]
        decays_WLBH[: len(decays_WLBH) - remember] = 1
        self._decay_WLBH[:, :, index] = decays_WLBH
        for slot in slots:
            self._depth[slot] = min(self._depth[slot] + 1, remember)

    def _index(self, slots: Sequence[int]) -> Tensor:
        return index_on(slots, self.device)

    def _write(self, index: Tensor, state: ModelState) -> None:
        for mine, theirs in zip(self._state.layers, state.layers, strict=True):
            mine.conv_BCK[index] = theirs.conv_BCK
            mine.ssm_BHPN[index] = theirs.ssm_BHPN

    def _remember(self, depth: int) -> None:
        """Makes room for so many decays."""
        more = depth - len(self._decay_WLBH)
        if more > 0:
            self._decay_WLBH = torch.cat(
                [self._decay_WLBH.new_ones(more, *self._decay_WLBH.shape[1:]), self._decay_WLBH]
            )

    def _steering(self, slots: Sequence[int], index: Tensor, depth: int) -> Steering:
        """What is in force in some slots, and the last ``depth`` of their decays."""
        decays_WLBH = self._decay_WLBH[len(self._decay_WLBH) - depth :, :, index]
        return Steering(
            tuple(delta[index] for delta in self._deltas),
            tuple(self._expires[slot] for slot in slots),
            tuple(layers.unbind() for layers in decays_WLBH),
        )


class NativeSlots(SlotMemory, Slots):
    """The native core's, for its own decoder."""

    def restore(self, slot: int, state: ModelState, hidden_1LD: Tensor, steering: Steering) -> None:
        self.put_back(slot, state, hidden_1LD, steering.delta_LBHPN, steering.expires_B[0], steering.decays_WLBH)

    def save(self, slot: int) -> tuple[ModelState, Tensor, Steering]:
        state, hidden_1LD, delta_L1HPN, expires, decays_WL1H = self.take_out(slot)
        decays = tuple(layers.unbind() for layers in decays_WL1H)
        return state, hidden_1LD, Steering(delta_L1HPN.unbind(), (expires,), decays)

    def steer(
        self,
        slots: Sequence[int],
        injections: dict[int, Injection],
        positions: Sequence[int],
        tracked: Sequence[bool],
    ) -> None:
        writes: list[Write] = []
        for index, injection in injections.items():
            plan = injection.plan
            late, expires = injection.position - plan.target, plan.target + max(1, len(plan.line))
            u_LRE, b_LRN = _plain(plan.write_u_LRE), _plain(plan.write_b_LRN)
            writes.append((index, u_LRE, b_LRN, injection.alpha_L, late, expires))
        self.write(slots, positions, tracked, writes, LARGEST_WRITE)


def _apart(state: ModelState) -> ModelState:
    """The same with memory of its own for every layer."""
    return ModelState(tuple(LayerState(layer.conv_BCK.clone(), layer.ssm_BHPN.clone()) for layer in state.layers))


def _widened(injection: Injection) -> Injection:
    """The injection with its write in float32."""
    plan = injection.plan
    if plan.write_u_LRE.dtype == plan.write_b_LRN.dtype == np.float32:
        return injection
    u_LRE, b_LRN = from_wire(plan.write_u_LRE), from_wire(plan.write_b_LRN)
    return replace(injection, plan=replace(plan, write_u_LRE=u_LRE, write_b_LRN=b_LRN))


def _plain(array: np.ndarray) -> np.ndarray:
    """As the native core reads it: float32 or the bits of bf16, without gaps."""
    if is_wire(array) and array.flags.c_contiguous:
        return array
    return np.ascontiguousarray(array, array.dtype if is_wire(array) else np.float32)
