"""Sizes of an exported CRSM, for transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class CRSMConfig(PretrainedConfig):
    """System 1's sizes under the names of ``mamba-ssm``; System 2's settings lie in ``crsm.json``."""

    model_type = "crsm"
    attribute_map: ClassVar = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}

    def __init__(
        self,
        vocab_size: int = 53,
        d_model: int = 96,
        n_layer: int = 4,
        d_state: int = 32,
        headdim: int = 32,
        expand: int = 2,
        d_conv: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layer = n_layer
        self.d_state = d_state
        self.headdim = headdim
        self.expand = expand
        self.d_conv = d_conv
        self.chunk_size = chunk_size
        self.norm_eps = norm_eps
        self.use_cache = True
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
