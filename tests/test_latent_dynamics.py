"""World models: the exact one is the backbone, the latent one reads its memory and owns no embedding."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pytest
import torch

from crsm.config import ModelConfig
from crsm.latent_dynamics import ExactDynamics, LatentDynamics, Snapshot, take_snapshot
from crsm.model import CRSM
from tests.fixtures import PROMPT, tiny_checkpoint, tiny_config

TEXTS = torch.tensor([PROMPT, (10, 21, 4, 8, 23, 7), (20, 20, 20, 9, 9, 9)])


def model_reading(layers: tuple[int, ...] | None) -> CRSM:
    config = tiny_config(n_layer=3)
    world = config.model.world_model.model_copy(update={"read_layers": layers})
    model = ModelConfig(**(config.model.model_dump() | {"world_model": world}))
    return tiny_checkpoint(config.model_copy(update={"model": model})).model


def snapshot_of(model: CRSM) -> Snapshot:
    hidden_BTLD, state = model.backbone(TEXTS)
    return take_snapshot(hidden_BTLD[:, -1], state, model.planning_model())


def test_the_exact_world_model_is_the_backbones_own_step() -> None:
    model = tiny_checkpoint(tiny_config(kind="exact")).model
    world = model.planning_model()
    assert isinstance(world, ExactDynamics) and world.needs_conv and world.read_layers == (0, 1)
    _, state = model.backbone(TEXTS)
    snapshot = snapshot_of(model)
    latent = world.begin(snapshot)
    for token in (torch.tensor([3, 9, 27]), torch.tensor([8, 8, 11])):
        latent, hidden = world.advance(latent, snapshot, token)
        out = model.backbone.step(token, state)
        state = out.state
        assert torch.equal(hidden, out.hidden_BLD)
        for index, layer in enumerate(state.layers):
            assert torch.equal(latent[0][:, index], layer.conv_BCK)
            assert torch.equal(latent[1][:, index], layer.ssm_BHPN)


def test_the_exact_world_model_refuses_a_snapshot_without_the_convolution() -> None:
    model = tiny_checkpoint(tiny_config(kind="exact")).model
    with pytest.raises(ValueError, match="conv_BLCK = None"):
        model.planning_model().begin(snapshot_of(model)._replace(conv_BLCK=None))


@pytest.mark.parametrize("layers", [None, (0,), (2, 0)])
def test_a_snapshot_carries_what_is_read_and_no_more(layers: tuple[int, ...] | None) -> None:
    model = model_reading(layers)
    snapshot = snapshot_of(model)
    read = layers or (0, 1, 2)
    assert model.world_model.read_layers == read and snapshot.conv_BLCK is None
    assert snapshot.hidden_BLD.shape == (3, 3, 16) and snapshot.memory_BMHPN.shape == (3, len(read), 4, 8, 8)
    _, state = model.backbone(TEXTS)
    for place, layer in enumerate(read):
        assert torch.equal(snapshot.memory_BMHPN[:, place], state.layers[layer].ssm_BHPN)


@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_rows_are_imagined_independently(kind: Literal["latent", "exact"]) -> None:
    model = tiny_checkpoint(tiny_config(kind=kind)).model
    world, snapshot = model.planning_model(), snapshot_of(model)
    token = torch.tensor([3, 9, 27])
    latent, hidden = world.advance(world.begin(snapshot), snapshot, token)
    assert hidden.shape == (3, 2, 16)
    index = torch.tensor([2, 0, 2])
    picked = snapshot.rows(index)
    latent_rows, hidden_rows = world.advance(world.begin(picked), picked, token[index])
    np.testing.assert_allclose(hidden_rows, hidden[index], atol=1e-5)
    for mine, theirs in zip(latent_rows, latent, strict=True):
        np.testing.assert_allclose(mine, theirs[index], atol=1e-5)


def test_token_memory_and_snapshot_all_matter_to_what_is_imagined() -> None:
    model = tiny_checkpoint().model
    world, snapshot = model.world_model, snapshot_of(model)
    token = torch.tensor([3, 9, 27])

    def imagined(changed: Snapshot, tokens: torch.Tensor = token) -> torch.Tensor:
        return world.advance(world.begin(changed), changed, tokens)[1]

    want = imagined(snapshot)
    # The direction of the memory is read, not its length.
    assert (imagined(snapshot._replace(memory_BMHPN=snapshot.memory_BMHPN.flip(0))) - want).abs().max() > 1e-3
    assert (imagined(snapshot._replace(hidden_BLD=snapshot.hidden_BLD.flip(0))) - want).abs().max() > 1e-3
    assert (imagined(snapshot, token.flip(0)) - want).abs().max() > 1e-3


def test_the_memory_of_every_read_layer_matters() -> None:
    model = model_reading(None)
    world, snapshot = model.world_model, snapshot_of(model)
    token = torch.tensor([3, 9, 27])
    _, want = world.advance(world.begin(snapshot), snapshot, token)
    for place in range(3):
        memory = snapshot.memory_BMHPN.clone()
        memory[:, place] = memory[:, place].flip(0)
        _, got = world.advance(world.begin(snapshot), snapshot._replace(memory_BMHPN=memory), token)
        assert (got - want).abs().max() > 1e-4


def test_the_embedding_is_the_backbones_and_counted_once() -> None:
    model = tiny_checkpoint().model
    g, layers, d, n, e, wide = 24, 2, 16, 8, 32, 32
    want = {
        "encoder": layers * d * g + g,
        "query": (g + d) * layers * n + layers * n,
        "read": layers * e * g + g,
        "cell": 3 * g * (d + g + g) + 6 * g,
        "decoder_linear": g * layers * d + layers * d,
        "decoder_in": g * wide + wide,
        "decoder_out": wide * layers * d + layers * d,
    }
    assert sum(parameter.numel() for parameter in model.world_model.parameters()) == sum(want.values())
    assert not [name for name in model.state_dict() if "embedding" in name and not name.startswith("backbone.")]


def test_a_copied_model_imagines_with_its_own_embedding() -> None:
    model = tiny_checkpoint().model
    twin = copy.deepcopy(model)
    snapshot, token = snapshot_of(model), torch.tensor([3, 9, 27])
    _, want = model.world_model.advance(model.world_model.begin(snapshot), snapshot, token)
    with torch.no_grad():
        model.backbone.embedding.weight.zero_()
    _, kept = twin.world_model.advance(twin.world_model.begin(snapshot), snapshot, token)
    _, changed = model.world_model.advance(model.world_model.begin(snapshot), snapshot, token)
    assert torch.equal(kept, want) and not torch.equal(changed, want)


def test_gradients_reach_the_world_model_through_two_steps() -> None:
    model = tiny_checkpoint().model
    world = model.world_model.requires_grad_(True)
    assert isinstance(world, LatentDynamics)
    snapshot, token = snapshot_of(model), torch.tensor([3, 9, 27])
    latent, _ = world.advance(world.begin(snapshot), snapshot, token)
    _, hidden = world.advance(latent, snapshot, token)
    hidden.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in world.parameters())
    assert model.backbone.embedding.weight.grad is None
