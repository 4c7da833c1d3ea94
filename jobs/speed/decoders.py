"""Our greedy decoding as a user writes it: token → step → argmax, by the native decoder where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from crsm import native

if TYPE_CHECKING:
    from crsm.model import CRSM


class NotOfferedError(Exception):
    """This number format cannot be decoded here."""


class OurDecoder(Protocol):
    """Our side of a comparison."""

    name: str

    def prefill(self, tokens_BT: Tensor) -> tuple[Any, Any]:
        """The next token of every prompt, and the state."""

    def decode(self, token_B: Any, state: Any, steps: int) -> list[Any]:
        """``steps`` tokens more, from a state that is left as it was."""


class TorchDecoder:
    """The model itself, step by step, on whatever kernels it has."""

    def __init__(self, model: CRSM, dtype: str) -> None:
        if dtype == "int8":
            raise NotOfferedError("int8 needs the native core")
        self._model = model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        self._device = model.backbone.embedding.weight.device
        self.name = "torch"

    def prefill(self, tokens_BT: Tensor) -> tuple[Tensor, Any]:
        with torch.inference_mode():
            logits_BV, _, state = self._model.prefill(tokens_BT.to(self._device))
            return logits_BV.argmax(dim=-1), state

    def decode(self, token_B: Tensor, state: Any, steps: int) -> list[Tensor]:
        found = []
        with torch.inference_mode():
            for _ in range(steps):
                out = self._model.backbone.step(token_B, state)
                state = out.state
                token_B = self._model.logits(out.hidden_BLD).argmax(dim=-1)
                found.append(token_B)
        return found


class NativeStream:
    """The native decoder; prompts by the model's own forward pass."""

    def __init__(self, model: CRSM, dtype: str) -> None:
        from crsm.native.decoder import NativeDecoder

        self._model, self._decoder = model, NativeDecoder(model, dtype)  # type: ignore[arg-type]
        self.name = "native"

    def prefill(self, tokens_BT: Tensor) -> tuple[Tensor, Any]:
        with torch.inference_mode():
            logits_BV, _, state = self._model.prefill(tokens_BT)
            return logits_BV.argmax(dim=-1), state

    def decode(self, token_B: Tensor, state: Any, steps: int) -> list[Tensor]:
        said_BT, _ = self._decoder.greedy(token_B, state, steps)
        return list(said_BT.unbind(dim=1))


def make_decoder(model: CRSM, dtype: str) -> OurDecoder:
    """The fastest decoder of a model in a number format: ``fp32``, ``bf16`` or ``int8``.

    Raises:
        NotOfferedError: there is none.
    """
    on_cpu = model.backbone.embedding.weight.device.type == "cpu"
    return NativeStream(model, dtype) if on_cpu and native.available() else TorchDecoder(model, dtype)
