"""Averages of weights: by hand, and for weights that are not numbers one can average."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from crsm.fusion import Fusion
from crsm.training.optimizer import AverageWeights


def test_an_average_follows_its_weights_by_the_decay() -> None:
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
    average = AverageWeights(module, decay=0.75)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 2.0]]))
    average.update(module)
    average.update(module)
    # 1 → 0.75 · 1 + 0.25 · 3 = 1.5 → 0.75 · 1.5 + 0.25 · 3
    average.copy_to(module)
    np.testing.assert_allclose(module.weight.detach(), [[1.875, 2.0]])


def test_layers_that_are_fused_out_stay_out_of_an_average() -> None:
    """An imported checkpoint starts with weights of minus infinity."""
    fusion = Fusion(3)
    fusion.use_last_layer()
    average = AverageWeights(fusion, decay=0.9)
    average.update(fusion)
    average.copy_to(fusion)
    assert fusion.weights_L.tolist() == [0.0, 0.0, 1.0]
