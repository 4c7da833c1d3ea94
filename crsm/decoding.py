"""Who consumes tokens when text is generated: the native core where it can, else PyTorch.

The plain backbone of a guarantee ("with no planner the tokens are the plain backbone's, bit for bit") is the decoder
that the settings choose, with nothing written into its states.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from crsm import native
from crsm.config import EngineConfig
from crsm.model import CRSM
from crsm.native.decoder import NativeDecoder
from crsm.types import ModelState, StepOutput


class Decoder(Protocol):
    """One token at a time, for a batch of sequences."""

    def step(self, token_B: Tensor, state: ModelState, donate: bool = False) -> StepOutput:
        """``Backbone.step``. ``donate``: the caller gives ``state`` up; its memory may become the new state's."""
        ...

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """``CRSM.logits``."""
        ...


class TorchDecoder:
    """The model's own step and head."""

    def __init__(self, model: CRSM) -> None:
        self._model = model

    def step(self, token_B: Tensor, state: ModelState, donate: bool = False) -> StepOutput:
        return self._model.backbone.step(token_B, state)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        return self._model.logits(hidden_BLD)


def select_decoder(model: CRSM, config: EngineConfig = EngineConfig()) -> Decoder:
    """The decoder that the settings name.

    Raises:
        ValueError: the native decoder or rounded weights are asked for, and the native core is missing or the model is
            not fp32 on the CPU.
    """
    obstacle = _obstacle(model)
    if config.decoder == "torch" or (config.decoder == "auto" and config.weights == "fp32" and obstacle):
        return TorchDecoder(model)
    if obstacle:
        setting: Literal["decoder", "weights"] = "decoder" if config.decoder == "native" else "weights"
        raise ValueError(f"engine.{setting} = {getattr(config, setting)!r}, but {obstacle}")
    return NativeDecoder(model, config.weights)


def _obstacle(model: CRSM) -> str:
    """Why the native decoder cannot be used; empty: it can."""
    if not native.available():
        return f"the native core is {native.describe()}"
    for name, parameter in model.backbone.named_parameters():
        if parameter.dtype != torch.float32 or not parameter.is_cpu:
            return f"backbone.{name} is {parameter.dtype} on {parameter.device}; allowed: torch.float32 on cpu"
    return ""
