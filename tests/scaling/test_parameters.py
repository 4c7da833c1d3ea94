"""Parameters counted from settings are those of the model that is built from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import BackboneConfig, Config, ModelConfig, WorldModelConfig, WriterConfig, load_config
from crsm.model import CRSM
from crsm.scaling.parameters import count_parameters, trained_parameters

CONFIGS = Path(__file__).parents[2] / "configs"


def built(model: ModelConfig) -> CRSM:
    with torch.device("meta"):
        return CRSM(Config(model=model))


@pytest.mark.parametrize("name", ["baseline_170m", "baseline_350m", "1b", "3b"])
def test_the_shipped_configs_have_as_many_as_are_counted(name):
    model = load_config(CONFIGS / f"{name}.yaml").model
    assert count_parameters(model) == built(model).num_parameters()


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 4),
    layers=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 9)] * 5),
    width=st.integers(2, 5),
    tied=st.booleans(),
    data=st.data(),
)
def test_any_model_has_as_many_as_are_counted(heads, layers, sizes, width, tied, data):
    states, latent, decoder, writer, rank = sizes
    read = data.draw(st.none() | st.lists(st.integers(0, layers - 1), min_size=1, unique=True).map(tuple))
    model = ModelConfig(
        backbone=BackboneConfig(
            vocab_size=11,
            d_model=8,
            n_layer=layers,
            d_state=states,
            headdim=16 // heads if 16 % heads == 0 else 8,
            d_conv=width,
            tie_embeddings=tied,
        ),
        world_model=WorldModelConfig(width=latent, decoder_width=decoder, read_layers=read),
        writer=WriterConfig(width=writer, rank=rank),
    )
    found = built(model)
    assert count_parameters(model) == found.num_parameters()
    stage_1 = {p for part in (found.backbone, found.lm_head, found.fusion, found.critic) for p in part.parameters()}
    assert trained_parameters(model) == sum(p.numel() for p in stage_1)


def test_an_open_vocabulary_cannot_be_counted():
    with pytest.raises(ValueError, match=r"backbone.vocab_size = 0; allowed: at least 1"):
        count_parameters(ModelConfig())
