"""The shapes that are measured, and models of them with random weights. Speed does not depend on what they learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crsm.config import BackboneConfig
    from crsm.model import CRSM


@dataclass(frozen=True, slots=True)
class Shape:
    """A Mamba-2 language model with tied embeddings."""

    name: str
    d_model: int
    n_layer: int
    d_state: int
    headdim: int
    vocab_size: int
    chunk_size: int = 64
    """Of our forward pass; changes its speed, not its result."""

    def config(self) -> BackboneConfig:
        from crsm.config import BackboneConfig

        return BackboneConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layer=self.n_layer,
            d_state=self.d_state,
            headdim=self.headdim,
            chunk_size=self.chunk_size,
            tie_embeddings=True,
        )

    @property
    def parameters(self) -> int:
        """Of embedding, layers and last norm; the tied embedding counts once, as the head that multiplies with it."""
        config = self.config()
        inner, channels, heads = config.d_inner, config.conv_channels, config.n_heads
        layer = (
            self.d_model * (inner + channels + heads)  # in_proj
            + channels * (config.d_conv + 1)  # convolution and its bias
            + 3 * heads  # dt_bias, A_log, D
            + inner  # gated norm
            + inner * self.d_model  # out_proj
            + self.d_model  # norm
        )
        return self.vocab_size * self.d_model + self.n_layer * layer + self.d_model


SMALL = Shape("0.5M", d_model=128, n_layer=4, d_state=32, headdim=32, vocab_size=512)
PUBLIC_130M = Shape("130m", d_model=768, n_layer=24, d_state=128, headdim=64, vocab_size=50288, chunk_size=256)
NANO = Shape("nano", d_model=96, n_layer=4, d_state=32, headdim=32, vocab_size=53)
TEN_MILLION = Shape("10M", d_model=320, n_layer=15, d_state=64, headdim=64, vocab_size=53)
"""With the vocabulary of nano, so that its tokenizer and tasks serve it."""
TINY = Shape("tiny", d_model=16, n_layer=2, d_state=8, headdim=8, vocab_size=24, chunk_size=8)
"""For tests of the benchmark itself."""


def build(
    shape: Shape,
    seed: int,
    *,
    width: int = 128,
    device: str = "cpu",
    planners: bool = True,
    read_layers: tuple[int, ...] | None = None,
) -> CRSM:
    """Our model of that shape, ready for decoding: without gradients, in evaluation mode.

    Args:
        width: of the world model (G).
        read_layers: whose memory planners read; None: all.
        planners: False: leave world model and writer as small as they can be, where only System 1 is measured.
    """
    import torch

    from crsm.config import Config, ModelConfig, WorldModelConfig, WriterConfig
    from crsm.model import CRSM

    world_model = (
        WorldModelConfig(width=width, decoder_width=256, read_layers=read_layers)
        if planners
        else WorldModelConfig(width=1)
    )
    config = Config(
        name=shape.name,
        model=ModelConfig(
            backbone=shape.config(), world_model=world_model, writer=WriterConfig(width=128 if planners else 1)
        ),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CRSM(config)
    return model.eval().requires_grad_(False).to(device)
