"""The memory of running generations' states in C++: stepped and steered in place, a slot each.

:mod:`crsm.slots` says what every call means; here steering is arrays and numbers. A named slot's token has the bits
that :class:`~crsm.native.decoder.NativeDecoder` would give it; a write differs from PyTorch's by rounding only, and
where nothing is written nothing changes.

Letters: B named slots, L layers, D d_model, V vocabulary, H heads, P head dimension, N d_state, C convolution channels,
K convolution width, W positions remembered, E = H·P, R rank of a write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crsm.native.decoder import NativeDecoder, as_array
from crsm.types import LayerState, ModelState
from crsm.wire import Wire

Write = tuple[int, np.ndarray, np.ndarray, Sequence[float], int, int]
"""Index into the named slots, write_u_LRE, write_b_LRN, alpha_L, tokens since the target, where it is spent."""


class SlotMemory:
    """Preallocated states of one decoder's model. For one thread at a time."""

    def __init__(self, decoder: NativeDecoder, capacity: int) -> None:
        """
        Raises:
            ValueError: ``capacity`` is below 1, or the decoder was made of a backbone alone.
        """
        self._decoder = decoder  # whose embedding is read in place
        self._core = decoder.make_slots(capacity)
        self._renew, self._vocab, self._threads = decoder.renew, decoder.vocab_size, decoder.threads

    @property
    def capacity(self) -> int:
        return int(self._core.capacity)

    def grow(self, capacity: int) -> None:
        self._core.grow(capacity)

    def put(self, slots: Sequence[int], state: ModelState, hidden_BLD: Tensor) -> None:
        self._core.put(slots, *_arrays(state), as_array(hidden_BLD))

    def put_back(
        self,
        slot: int,
        state: ModelState,
        hidden_1LD: Tensor,
        delta_L1HPN: Sequence[Tensor],
        expires: int,
        decays_WL1H: Sequence[Sequence[Tensor]],
    ) -> None:
        """A whole slot with what is in force."""
        decays = [torch.cat(tuple(layers)) for layers in decays_WL1H]
        decays_WLH = torch.stack(decays) if decays else torch.empty(0, len(delta_L1HPN), delta_L1HPN[0].shape[1])
        deltas = [as_array(delta) for delta in delta_L1HPN]
        self._core.restore(slot, *_arrays(state), as_array(hidden_1LD), deltas, expires, as_array(decays_WLH))

    def take_out(self, slot: int) -> tuple[ModelState, Tensor, Tensor, int, Tensor]:
        """Copies: state, residual streams (1, L, D), differences (L, 1, H, P, N), end, decays (W, L, 1, H)."""
        conv, ssm, hidden, delta, expires, decays = self._core.save(slot)
        layers = zip(torch.from_numpy(conv).unbind(), torch.from_numpy(ssm).unbind(), strict=True)
        state = ModelState(tuple(LayerState(*layer) for layer in layers))
        return state, torch.from_numpy(hidden), torch.from_numpy(delta), expires, torch.from_numpy(decays)

    def read(
        self, slots: Sequence[int], layers: Sequence[int], conv: bool, wire: Wire = "fp32"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden, ssm, windows = self._core.read(slots, layers, conv)
        return torch.from_numpy(hidden), torch.from_numpy(ssm), torch.from_numpy(windows) if conv else None

    def write(
        self,
        slots: Sequence[int],
        positions: Sequence[int],
        tracked: Sequence[bool],
        writes: list[Write],
        largest: float,
    ) -> None:
        """Withdraws what is spent or superseded and writes what is due; entries of writes are cut to ± ``largest``."""
        self._core.steer(slots, positions, tracked, writes, largest)

    def step(self, token_B: Tensor | Sequence[int], slots: Sequence[int], remember: int) -> Tensor:
        self._renew()
        logits = np.empty((len(slots), self._vocab), np.float32)
        self._core.step(_plain(token_B), slots, remember, logits, self._threads)
        return torch.from_numpy(logits)

    def step_log_probs(
        self, token_B: Tensor | Sequence[int], slots: Sequence[int], remember: int
    ) -> tuple[Tensor, list[int]]:
        self._renew()
        log_probs = np.empty((len(slots), self._vocab), np.float32)
        likeliest = self._core.step_log_probs(_plain(token_B), slots, remember, log_probs, self._threads)
        return torch.from_numpy(log_probs), likeliest

    def free(self, slot: int) -> None:
        self._core.free(slot)


def _plain(token_B: Tensor | Sequence[int]) -> Any:
    return token_B.numpy() if isinstance(token_B, Tensor) else token_B


def _arrays(state: ModelState) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [as_array(layer.conv_BCK) for layer in state.layers], [as_array(layer.ssm_BHPN) for layer in state.layers]
