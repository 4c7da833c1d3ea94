"""``crsm export --layout mamba2``: System 1 as transformers' own ``Mamba2ForCausalLM``.

For programs that know Mamba-2 and nothing else, such as llama.cpp's converter to GGUF. Such a model has no mixture of
layers: the export is exact where all of the fusion's weight lies on the last layer, and refused elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict

from crsm.model import Checkpoint, cast_matrices
from crsm.release.export import (
    DTYPES,
    MAX_SHARD,
    Dtype,
    generation_config,
    split_weights,
    state_of,
    tokenizer_config,
    write_json,
)
from crsm.release.folder import new_folder

ROUNDING = 1e-6
"""Share of the fusion's weight that may lie elsewhere: what fp32 does not see in a sum."""


def export_mamba2(
    checkpoint: Checkpoint, path: str | Path, *, dtype: Dtype = "fp32", max_shard_size: int | str = MAX_SHARD
) -> dict[str, int]:
    """Writes the folder; returns the bytes of each file.

    Raises:
        ValueError: there is something of that name, or the logits read other layers than the last.
        OSError: the folder cannot be written; nothing is left of it.
    """
    check_fusion(checkpoint)
    with new_folder(Path(path)) as folder:
        weights, _ = split_weights(cast_matrices(state_of(checkpoint), DTYPES[dtype]))
        named = {transformers_name(name): tensor for name, tensor in weights.items() if name != "fusion.logits_L"}
        save_torch_state_dict(named, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        checkpoint.tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "config.json", mamba2_config(checkpoint, dtype))
        write_json(folder / "tokenizer_config.json", tokenizer_config(checkpoint))
        write_json(folder / "generation_config.json", generation_config(checkpoint))
        return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def check_fusion(checkpoint: Checkpoint) -> None:
    """
    Raises:
        ValueError: the fusion's weight does not lie on the last layer.
    """
    elsewhere = float(checkpoint.model.fusion.weights_L[:-1].detach().sum())
    if elsewhere > ROUNDING:
        raise ValueError(
            f"fusion has {elsewhere:.3g} of its weight on layers before the last one; allowed: {ROUNDING:g} at most "
            "for the plain Mamba-2 layout, which has no mixture of layers"
        )


def transformers_name(name: str) -> str:
    """``backbone.embedding.weight`` is ``backbone.embeddings.weight`` there; all other names are the same."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def mamba2_config(checkpoint: Checkpoint, dtype: Dtype) -> dict[str, Any]:
    """The settings of a ``Mamba2Config``."""
    sizes, tokenizer = checkpoint.config.model.backbone, checkpoint.tokenizer
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.d_model,
        "num_hidden_layers": sizes.n_layer,
        "state_size": sizes.d_state,
        "head_dim": sizes.headdim,
        "num_heads": sizes.n_heads,
        "n_groups": 1,
        "expand": sizes.expand,
        "intermediate_size": sizes.d_inner,
        "conv_kernel": sizes.d_conv,
        "chunk_size": sizes.chunk_size,
        "layer_norm_epsilon": sizes.norm_eps,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "rms_norm": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": sizes.tie_embeddings,
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }
