"""The calibrated gate: how much of a plan each layer takes.

    advantage_i = v_i(plan) − v_i(root)
    confidence_i = σ(slope_i · (advantage_i − λ · std(v(plan))) + bias_i)

The slopes and biases are fitted on held-out problems so that ``confidence_i`` is the probability that the plan is
right. All gates are exactly 0 while the consensus advantage is under the threshold (a plan that cannot help is not
written), for a planner that was never calibrated, and after a failed branch-accuracy check.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Calibration of the gates; buffers, not parameters: no gradient ever moves them."""

    slope_L: Tensor
    bias_L: Tensor
    threshold: Tensor
    calibrated: Tensor

    def __init__(self, n_layer: int) -> None:
        super().__init__()
        self.register_buffer("slope_L", torch.zeros(n_layer))
        self.register_buffer("bias_L", torch.zeros(n_layer))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def calibrate(self, slope_L: Tensor, bias_L: Tensor, threshold: float) -> None:
        """Opens the gate with a fitted calibration.

        Raises:
            ValueError: a value is not finite, or a slope is negative (more advantage must not mean less confidence).
        """
        finite = slope_L.isfinite().all() and bias_L.isfinite().all() and math.isfinite(threshold)
        if not (finite and (slope_L >= 0).all()):
            raise ValueError(
                f"slope = {slope_L.tolist()}, bias = {bias_L.tolist()}, threshold = {threshold}; "
                "allowed: finite, slopes ≥ 0"
            )
        self.slope_L.copy_(slope_L)
        self.bias_L.copy_(bias_L)
        self.threshold.fill_(threshold)
        self.calibrated.fill_(True)

    @torch.no_grad()
    def shut(self) -> None:
        """No plan is written any more."""
        self.calibrated.fill_(False)

    def forward(self, advantage_BL: Tensor, uncertainty_B: Tensor, gain_B: Tensor, penalty: float) -> Tensor:
        """Confidence per layer (B, L) in [0, 1].

        Args:
            advantage_BL: ``v_i(plan) − v_i(root)``.
            uncertainty_B: standard deviation of the plan's values over layers.
            gain_B: consensus of the plan minus consensus of the root.
            penalty: λ.
        """
        if not bool(self.calibrated):
            return torch.zeros_like(advantage_BL)
        score_BL = advantage_BL - penalty * uncertainty_B[:, None]
        confidence_BL = torch.sigmoid(self.slope_L * score_BL + self.bias_L)
        return torch.where((gain_B >= self.threshold)[:, None], confidence_BL, torch.zeros_like(confidence_BL))
