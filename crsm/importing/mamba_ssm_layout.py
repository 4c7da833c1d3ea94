"""The layout of ``mamba-ssm``: ``state-spaces/mamba2-{130m,370m,780m,1.3b,2.7b}`` on the hub.

Fields are those of ``mamba_ssm.models.config_mamba.MambaConfig`` and, in ``ssm_cfg``, the arguments of
``mamba_ssm.modules.mamba2.Mamba2``, with their defaults. As there, an unknown one is an error. A type of one value is a
feature that the backbone has in this form only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from crsm.importing.layout import Layout, make_backbone, parse
from crsm.settings import Positive, Settings

NORM_EPS = 1e-5
"""Of all norms; written into mamba-ssm, not into its configurations."""


class Mixer(Settings):
    """``ssm_cfg``."""

    layer: Literal["Mamba2"] = "Mamba1"  # type: ignore[assignment] # mamba-ssm's default, which is refused
    d_state: Positive = 128
    d_conv: Annotated[int, Field(ge=2)] = 4
    expand: Positive = 2
    headdim: Positive = 64
    d_ssm: None = None
    ngroups: Literal[1] = 1
    D_has_hdim: Literal[False] = False
    rmsnorm: Literal[True] = True
    norm_before_gate: Literal[False] = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bias: Literal[False] = False
    conv_bias: Literal[True] = True
    chunk_size: Positive = 256
    # How training began, and which kernels compute: without effect on trained weights.
    conv_init: Any = None
    A_init_range: Any = None
    dt_min: Any = None
    dt_max: Any = None
    dt_init_floor: Any = None
    use_mem_eff_path: Any = None


class Model(Settings):
    """``config.json``."""

    d_model: Positive
    n_layer: Positive
    vocab_size: Positive
    d_intermediate: Literal[0] = 0
    ssm_cfg: Mixer
    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: Any = None
    """Of attention layers, of which there are none."""
    rms_norm: Literal[True] = True
    residual_in_fp32: bool = True
    """Here all of it is fp32."""
    fused_add_norm: bool = True
    """The same numbers by another kernel."""
    pad_vocab_size_multiple: Positive = 8
    tie_embeddings: bool = True


def read(tree: Mapping[str, Any], source: str) -> Layout:
    """
    Raises:
        ValueError: naming the first field that does not fit, its value and what is allowed.
    """
    model = parse(Model, {"ssm_cfg": {}, **tree}, source)
    mixer = model.ssm_cfg
    if model.attn_layer_idx:
        raise ValueError(f"{source}: attn_layer_idx = {list(model.attn_layer_idx)}; allowed: [], no attention")
    # The backbone has no clamp of dt; the usual limits are none.
    if mixer.dt_limit != (0.0, math.inf):
        raise ValueError(f"{source}: ssm_cfg.dt_limit = {list(mixer.dt_limit)}; allowed: [0.0, Infinity]")
    multiple = model.pad_vocab_size_multiple
    backbone = make_backbone(
        source,
        vocab_size=-(-model.vocab_size // multiple) * multiple,
        d_model=model.d_model,
        n_layer=model.n_layer,
        d_state=mixer.d_state,
        headdim=mixer.headdim,
        expand=mixer.expand,
        d_conv=mixer.d_conv,
        chunk_size=mixer.chunk_size,
        norm_eps=NORM_EPS,
        tie_embeddings=model.tie_embeddings,
    )
    return Layout("mamba-ssm", backbone, embedding=("backbone.embedding.weight",))
