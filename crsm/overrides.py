"""A checkpoint's settings with changes on top. Imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crsm.config import Config, apply_override, load_config, parse_config

SHAPELESS = (("model", "world_model", "kind"), ("model", "critic", "uncertainty_penalty"))
"""The settings of ``model`` that fix no shape: which world model plans, and how far it is trusted."""


def merge_settings(
    saved: Config,
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] | None = None,
    seed: int | None = None,
) -> Config:
    """Settings of a checkpoint with changes on top.

    Args:
        saved: the checkpoint's.
        config: a YAML file, or what one holds; what it states replaces what the checkpoint says, the rest stays.
        overrides: ``section.key=value``, the later ones winning.
        seed: the last word on ``seed``.

    Raises:
        ValueError: a key or value that is not allowed, or a change of what the weights were made for.
    """
    tree = saved.model_dump(mode="json")
    source = "checkpoint"
    if config is not None:
        source = "settings" if isinstance(config, Mapping) else str(config)
        stated = parse_config(dict(config), source) if isinstance(config, Mapping) else load_config(config)
        _merge(tree, stated.model_dump(mode="json", exclude_unset=True))
    changes = [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])]
    for change in changes:
        apply_override(tree, change)
    merged = parse_config(tree, source=f"--set {' '.join(changes)}" if changes else source)
    for section in ("model", "tokenizer"):
        _check_unchanged(getattr(saved, section).model_dump(), getattr(merged, section).model_dump(), (section,))
    return merged


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _check_unchanged(saved: Any, asked: Any, path: tuple[str, ...]) -> None:
    if isinstance(saved, dict):
        for key in saved:
            _check_unchanged(saved[key], asked[key], (*path, key))
    elif saved != asked and path not in SHAPELESS and not (path[-1] == "vocab_size" and asked == 0):
        raise ValueError(f"{'.'.join(path)} = {asked!r}; allowed: {saved!r}, for which the checkpoint was made")
