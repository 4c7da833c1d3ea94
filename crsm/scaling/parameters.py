"""Parameters of every part of a model, from its sizes alone. What is built on the meta device has the same."""

from __future__ import annotations

from dataclasses import dataclass

from crsm.config import BackboneConfig, ModelConfig

STAGE_1_PARTS = ("backbone", "lm_head", "fusion", "critic")
"""What stage 1 trains; the other parts are carried along."""


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """By part, in the order of :data:`crsm.model.PARTS`; a tied matrix counts once, with the backbone.

    Raises:
        ValueError: the size of the vocabulary is still open.
    """
    sizes, world, writer = model.backbone, model.world_model, model.writer
    if sizes.vocab_size < 1:
        raise ValueError(f"backbone.vocab_size = {sizes.vocab_size}; allowed: at least 1")
    layers, width = sizes.n_layer, sizes.d_model
    streams = layers * width
    read = layers if world.read_layers is None else len(world.read_layers)
    latent = world.width
    return {
        "backbone": sizes.vocab_size * width + layers * layer_parameters(sizes) + width,
        "lm_head": 0 if sizes.tie_embeddings else sizes.vocab_size * width,
        "fusion": layers,
        "critic": streams + 2 * layers,
        "world_model": (
            _dense(streams, latent)
            + _dense(latent + width, read * sizes.d_state)
            + _dense(read * sizes.d_inner, latent)
            + _gru(width + latent, latent)
            + _dense(latent, streams)
            + _dense(latent, world.decoder_width)
            + _dense(world.decoder_width, streams)
        ),
        "writer": (
            _gru(width, writer.width)
            + _dense(writer.width, layers * writer.rank * sizes.d_inner)
            + _dense(writer.width, layers * writer.rank * sizes.d_state)
        ),
        "gate": 0,
    }


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's matrices and the rest, in parameters."""

    in_proj: int
    out_proj: int
    small: int
    """Convolution, norms, ``A_log``, ``dt_bias``, ``D``."""

    @property
    def total(self) -> int:
        return self.in_proj + self.out_proj + self.small


def layer_shape(sizes: BackboneConfig) -> LayerShape:
    """The parameters of one layer."""
    channels = sizes.conv_channels
    return LayerShape(
        in_proj=sizes.d_model * projected(sizes),
        out_proj=sizes.d_inner * sizes.d_model,
        small=channels * (sizes.d_conv + 1) + 3 * sizes.n_heads + sizes.d_inner + sizes.d_model,
    )


def layer_parameters(sizes: BackboneConfig) -> int:
    """All of one layer."""
    return layer_shape(sizes).total


def projected(sizes: BackboneConfig) -> int:
    """I: what the input projection gives, z, x, B, C and dt."""
    return sizes.d_inner + sizes.conv_channels + sizes.n_heads


def trained_parameters(model: ModelConfig) -> int:
    """Of stage 1."""
    counts = count_parameters(model)
    return sum(counts[part] for part in STAGE_1_PARTS)


def _dense(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _gru(inputs: int, width: int) -> int:
    return 3 * width * (inputs + width + 2)
