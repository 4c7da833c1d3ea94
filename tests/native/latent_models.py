"""Random models of awkward sizes, and snapshots for them."""

from __future__ import annotations

from typing import Any

import torch

from crsm.config import BackboneConfig, Config, ModelConfig, WorldModelConfig
from crsm.latent_dynamics import LatentDynamics, Snapshot
from crsm.model import CRSM

SHAPES: dict[str, dict[str, Any]] = {
    "even": {},
    "odd widths": {"d_model": 10, "headdim": 5, "d_state": 7, "width": 33, "decoder_width": 19, "vocab_size": 53},
    "one layer": {"n_layer": 1, "vocab_size": 3},
    "two of three layers are read": {"n_layer": 3, "read_layers": (2, 0)},
    "an untied head": {"tie_embeddings": False},
    "a vocabulary of three slices": {"vocab_size": 4500},
    "a vocabulary too large for a table": {"vocab_size": 40_000, "width": 120, "d_state": 64},
}


def random_model(
    *, width: int = 32, decoder_width: int = 48, read_layers: tuple[int, ...] | None = None, **backbone: Any
) -> CRSM:
    """Small, with opinions: outputs are spread, values and gates are far from the middle."""
    sizes = {"vocab_size": 31, "d_model": 16, "n_layer": 2, "d_state": 8, "headdim": 8} | backbone
    world = WorldModelConfig(width=width, decoder_width=decoder_width, read_layers=read_layers)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = CRSM(Config(model=ModelConfig(backbone=BackboneConfig(**sizes), world_model=world)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("backbone.embedding", "lm_head", "critic", "fusion", "backbone.norm_f")):
                    parameter.copy_(torch.randn_like(parameter))
                elif name.startswith("world_model"):
                    parameter *= 2.0
    return model.eval().requires_grad_(False)


def random_snapshot(model: CRSM, count: int, seed: int = 0) -> Snapshot:
    sizes, layers = model.config.model.backbone, len(model.world_model.read_layers)
    generator = torch.Generator().manual_seed(seed)
    state = (count, layers, sizes.n_heads, sizes.headdim, sizes.d_state)
    hidden_BLD = torch.randn((count, sizes.n_layer, sizes.d_model), generator=generator)
    return Snapshot(hidden_BLD, torch.randn(state, generator=generator))


def random_tokens(model: CRSM, count: int, seed: int = 1) -> torch.Tensor:
    vocabulary = model.config.model.backbone.vocab_size
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def another_world_model(model: CRSM, seed: int = 9) -> LatentDynamics:
    """On the same embedding, with other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LatentDynamics(model.config.model, model.backbone.embedding).requires_grad_(False)
