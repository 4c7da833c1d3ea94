"""A source's tensors in a model of this project, with all parts of System 2 as they were born.

The fused policy reads the last layer alone, so that the logits are the source's. Critics, world model and writer are
new, the gates are shut and the trust horizon was never measured: until the training stages have run, System 2 changes
nothing that is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from crsm.config import ArithmeticConfig, Config, ModelConfig, TokenizerConfig, WorldModelConfig
from crsm.data.tokenizer import Tokenizer
from crsm.importing.layout import Layout, read_layout
from crsm.importing.weights import read_weights
from crsm.model import CRSM, Checkpoint, build_model

READ_LAYERS = 4
"""Layers whose memory a new world model reads, evenly spaced: reading all of a deep model makes requests large."""
_HEAD = "lm_head.weight"
_EMBEDDING = "backbone.embedding.weight"


def import_checkpoint(
    folder: Path, tokenizer_file: Path, *, name: str, source: str | None = None, seed: int = 0
) -> Checkpoint:
    """The checkpoint that a source makes.

    Args:
        folder: of ``config.json`` and weights.
        tokenizer_file: the ``tokenizer.json`` that the source was trained with.
        name: of the new model.
        source: what its report calls where it comes from; None: the folder's name.
        seed: of the new parts' weights.

    Raises:
        ValueError: naming the first field, tensor or file that does not fit, what it is and what is allowed.
    """
    layout = read_layout(folder / "config.json")
    tokenizer = _fitting_tokenizer(tokenizer_file, layout.backbone.vocab_size)
    tensors = read_weights(folder)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = build_model(_settings(layout, tokenizer, name, seed), tokenizer)
    _copy_tensors(model, layout, tensors, str(folder))
    model.fusion.use_last_layer()
    report = {"import": {"source": source or folder.name, "layout": layout.name, "tensors": len(tensors)}}
    return Checkpoint(model.eval(), tokenizer, trust_horizon=None, model_version=0, report=report)


def _fitting_tokenizer(file: Path, rows: int) -> Tokenizer:
    """The source's tokenizer with padding and verdicts after its last id, where the embedding has rows for them."""
    plain, tokenizer = Tokenizer.load(file), Tokenizer.adopt(file)
    if plain.vocab_size > rows:
        raise ValueError(
            f"{file}: {plain.vocab_size} tokens; allowed: at most {rows}, the rows of the source's embedding"
        )
    if not plain.is_foreign and plain.vocab_size < rows:
        raise ValueError(f"{file}: {plain.vocab_size} tokens; allowed: {rows}, the rows of the source's embedding")
    return tokenizer if tokenizer.vocab_size <= rows else plain


def _settings(layout: Layout, tokenizer: Tokenizer, name: str, seed: int) -> Config:
    layers = layout.backbone.n_layer
    read = None if layers <= READ_LAYERS else tuple(layers * (i + 1) // READ_LAYERS - 1 for i in range(READ_LAYERS))
    return Config(
        name=name,
        seed=seed,
        model=ModelConfig(backbone=layout.backbone, world_model=WorldModelConfig(read_layers=read)),
        tokenizer=TokenizerConfig(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size),
        tasks=(ArithmeticConfig(style="marks"),),
    )


@torch.no_grad()
def _copy_tensors(model: CRSM, layout: Layout, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fills backbone and head; every tensor of the source is used exactly once."""
    left = dict(tensors)
    tied = layout.backbone.tie_embeddings
    for name, own in model.named_parameters():
        if not name.startswith(("backbone.", "lm_head.")):
            continue
        names = layout.embedding if name == _EMBEDDING else (name,)
        found = next((known for known in names if known in left), None)
        if found is None:
            raise ValueError(f"{source}: tensor {names[0]!r} is missing; allowed: of shape {tuple(own.shape)}")
        own.copy_(_checked(left.pop(found), found, own, source))
    if tied and _HEAD in left:
        # The same matrix a second time, as mamba-ssm saves it: it has to be the same.
        shared = model.backbone.embedding.weight
        if not torch.equal(_checked(left.pop(_HEAD), _HEAD, shared, source).to(shared.dtype), shared):
            raise ValueError(
                f"{source}: tensor {_HEAD!r} differs from the embedding; allowed: the same numbers, as the "
                "configuration ties them"
            )
    if left:
        raise ValueError(
            f"{source}: tensor {min(left)!r} of shape {tuple(left[min(left)].shape)} is left over; allowed: those of a "
            f"Mamba-2 of {layout.backbone.n_layer} layers"
        )


def _checked(tensor: Tensor, name: str, own: Tensor, source: str) -> Tensor:
    if tensor.shape != own.shape:
        raise ValueError(
            f"{source}: tensor {name!r} has shape {tuple(tensor.shape)}; allowed: {tuple(own.shape)}, by config.json"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{source}: tensor {name!r} is of {tensor.dtype}; allowed: floating-point numbers")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{source}: tensor {name!r} holds NaN or infinity; allowed: finite numbers")
    return tensor
