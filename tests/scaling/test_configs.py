"""The configs of the large models: as many parameters as their names say, counted without allocating any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crsm.config import load_config
from crsm.model import CRSM

CONFIGS = Path(__file__).parents[2] / "configs"
NAMED = {"baseline_170m": 170e6, "baseline_350m": 350e6, "1b": 1e9, "3b": 3e9}


@pytest.mark.parametrize("name", NAMED)
def test_a_config_has_the_parameters_of_its_name_and_meta_tensors_only(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        model = CRSM(config)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    count = sum(model.num_parameters().values())
    assert count == pytest.approx(NAMED[name], rel=0.03)
    assert name != "1b" or count >= 1_000_000_000


@pytest.mark.parametrize("name", NAMED)
def test_its_embedding_is_padded_as_the_public_checkpoints_have_it(name):
    sizes = load_config(CONFIGS / f"{name}.yaml").model.backbone
    # GPT-NeoX's 50,277 tokens and ours for padding and verdicts, up to a multiple of 16.
    assert sizes.vocab_size == -(-(50277 + 3) // 16) * 16
    assert (sizes.d_state, sizes.headdim, sizes.d_conv) == (128, 64, 4)
