"""The layout of Hugging Face's ``Mamba2ForCausalLM``.

Fields are those of ``transformers.Mamba2Config`` that change what the model computes, with their defaults. The file
holds many others, about generation and training, which are passed over. A type of one value is a feature that the
backbone has in this form only. transformers norms after the gate whatever ``norm_before_gate`` of older files says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from crsm.importing.layout import Layout, make_backbone, parse
from crsm.settings import Positive, Settings


class Model(Settings):
    """``config.json``."""

    model_config = ConfigDict(extra="ignore")

    model_type: Literal["mamba2"]
    num_heads: Positive = 128
    head_dim: Positive = 64
    vocab_size: Positive = 32768
    hidden_size: Positive = 4096
    state_size: Positive = 128
    num_hidden_layers: Positive = 64
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    expand: Positive = 2
    conv_kernel: Annotated[int, Field(ge=2)] = 4
    n_groups: Literal[1] = 8  # type: ignore[assignment] # transformers' default, which is refused
    use_bias: Literal[False] = False
    use_conv_bias: Literal[True] = True
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm: Literal[True] = True
    time_step_limit: tuple[Any, Any] = (0.0, math.inf)
    chunk_size: Positive = 256
    tie_word_embeddings: bool = False
    quantization_config: None = None


def read(tree: Mapping[str, Any], source: str) -> Layout:
    """
    Raises:
        ValueError: naming the first field that does not fit, its value and what is allowed.
    """
    model = parse(Model, tree, source)
    if tuple(map(_number, model.time_step_limit)) != (0.0, math.inf):
        raise ValueError(f"{source}: time_step_limit = {list(model.time_step_limit)}; allowed: [0.0, Infinity]")
    if model.num_heads * model.head_dim != model.expand * model.hidden_size:
        raise ValueError(
            f"{source}: num_heads = {model.num_heads} with head_dim = {model.head_dim}; allowed: heads that make up "
            f"expand · hidden_size = {model.expand * model.hidden_size}"
        )
    backbone = make_backbone(
        source,
        vocab_size=model.vocab_size,
        d_model=model.hidden_size,
        n_layer=model.num_hidden_layers,
        d_state=model.state_size,
        headdim=model.head_dim,
        expand=model.expand,
        d_conv=model.conv_kernel,
        chunk_size=model.chunk_size,
        norm_eps=model.layer_norm_epsilon,
        tie_embeddings=model.tie_word_embeddings,
    )
    # transformers reads the other name too.
    return Layout("Hugging Face", backbone, embedding=("backbone.embeddings.weight", "backbone.embedding.weight"))


def _number(value: Any) -> Any:
    """JSON has no infinity; transformers writes ``{"__float__": "Infinity"}``, older versions a bare ``Infinity``."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        try:
            return float(value["__float__"])
        except (TypeError, ValueError):
            return value
    return value
