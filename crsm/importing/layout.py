"""What the two layouts share: reading a ``config.json``, and what of it the backbone can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crsm.config import BackboneConfig, parse_settings
from crsm.settings import AnySettings


@dataclass(frozen=True, slots=True)
class Layout:
    """A source's ``config.json``, understood."""

    name: str
    backbone: BackboneConfig
    """With ``vocab_size``, the rows of the embedding."""
    embedding: tuple[str, ...]
    """What the embedding's tensor may be called; every other name is this project's own."""


def read_layout(file: Path) -> Layout:
    """
    Args:
        file: a ``config.json``.

    Raises:
        ValueError: it is no whole file, of another kind of model, or of one that the backbone cannot be; the field, its
            value and what is allowed are named.
    """
    from crsm.importing import hugging_face_layout, mamba_ssm_layout

    tree = read_json(file)
    if "model_type" in tree:
        return hugging_face_layout.read(tree, str(file))
    if "d_model" in tree:
        return mamba_ssm_layout.read(tree, str(file))
    known = "this project's own checkpoint" if {"format", "crsm_version"} <= set(tree) else f"{len(tree)} other keys"
    raise ValueError(
        f"{file}: neither model_type nor d_model, but {known}; allowed: the config.json of mamba-ssm or of Hugging "
        "Face's Mamba2ForCausalLM"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a whole JSON file: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds a {type(tree).__name__}; allowed: an object")
    return tree


def parse(kind: type[AnySettings], tree: Mapping[str, Any], source: str) -> AnySettings:
    """A ``config.json`` as typed settings; a ``ValueError`` names field, value and what is allowed."""
    try:
        return parse_settings(kind, dict(tree), source)
    except ValueError as error:
        raise ValueError(str(error).replace(": Input should be ", "; allowed: ")) from None


def make_backbone(source: str, **sizes: Any) -> BackboneConfig:
    """The sizes as the backbone's settings.

    Raises:
        ValueError: a size is out of range, or heads do not divide the width.
    """
    return parse(BackboneConfig, sizes, source)
