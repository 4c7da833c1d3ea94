"""What a training stage is: its trainable parts, its data, its loss, its report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crsm.config import StageConfig
from crsm.model import CRSM, PARTS
from crsm.training.precision import Precision

Metrics = dict[str, float]


class Stage(nn.Module):
    """Base of the four stages. A module whose ``forward`` maps a batch to a loss, so that DDP can wrap it.

    ``batch`` is a pure function of the step: a run that resumes at step n sees what it would have seen.
    """

    name: str
    trains: tuple[str, ...]
    """Parts of the model (see :data:`crsm.model.PARTS`) that this stage changes; all others stay frozen."""
    precision: Precision = "fp32"
    """What ``forward`` and ``evaluate`` multiply matrices in."""
    in_step: bool = False
    """Whether all workers must run the trained parts equally often; set where these are sharded."""

    def __init__(self, model: CRSM, settings: StageConfig, seed: int) -> None:
        super().__init__()
        self.model, self.settings, self.seed = model, settings, seed
        self.world = 1
        """Number of workers; set by the loop. Losses are ``world · own sum / step total``, averaged over workers."""
        freeze_all_but(model, self.trains)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def batch(self, step: int, micro: int, rank: int, world: int) -> Any:
        """The part of micro-batch ``micro`` of optimizer step ``step`` that belongs to ``rank``."""
        raise NotImplementedError

    def forward(self, batch: Any) -> tuple[Tensor, Metrics]:
        """Loss (a scalar) and what to report."""
        raise NotImplementedError

    def evaluate(self) -> Metrics:
        """Figures on held-out problems; leaves model and random state as they were."""
        raise NotImplementedError

    def finish(self) -> dict[str, Any]:
        """Runs once after the last step (calibration, fidelity); its result goes into the checkpoint's report."""
        return {}


def freeze_all_but(model: CRSM, parts: Iterable[str]) -> None:
    """Only the named parts require a gradient.

    Raises:
        ValueError: an unknown part.
    """
    parts = set(parts)
    if unknown := parts - set(PARTS):
        raise ValueError(f"part {sorted(unknown)[0]!r}; allowed: {', '.join(PARTS)}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in parts:
        for parameter in getattr(model, part).parameters():
            parameter.requires_grad_(True)


def tensor_for(model: CRSM, array: np.ndarray) -> Tensor:
    """The array as a tensor where the model's weights are."""
    return torch.from_numpy(array).to(model.lm_head.weight.device)


def scalar(value: Tensor) -> float:
    """A detached Python number."""
    return float(value.detach())
