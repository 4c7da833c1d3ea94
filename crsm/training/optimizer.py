"""AdamW with the groups, schedules and clipping that all stages share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from crsm.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the parameters that require a gradient.

    Weight decay applies to matrices only: vectors, and parameters marked ``_no_weight_decay`` where they are made
    (``A_log``, ``D``, ``dt_bias``), go without.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    # Fused: one pass over weights and moments instead of six, and no temporaries.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=True
    )


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0) out of ``steps``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    low = config.final_lr
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "linear":
        share = 1.0 - (1.0 - low) * done
    elif config.schedule == "cosine":
        share = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done))
    else:  # wsd: warmup, stable, decay (arXiv 2404.06395)
        decayed = max(0.0, done - 1 + config.wsd_decay) / config.wsd_decay
        share = 1.0 - (1.0 - low) * decayed
    return config.lr * share


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients to a global norm of at most ``limit``; returns the norm before, finite or not."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit, error_if_nonfinite=False)


class AverageWeights:
    """Exponential moving average of the trained parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in self.averages:
                average, now = self.averages[name], parameter.detach()
                # A weight of -inf (a layer that is fused out) stays what it is; between two of them lies NaN.
                average.copy_(torch.where(average == now, now, average.lerp(now, 1 - self.decay)))

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in self.averages:
                parameter.copy_(self.averages[name])
