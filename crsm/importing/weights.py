"""The tensors of a source, by name, whatever files they lie in."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crsm.importing.layout import read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where weights are looked for; the first that is there is read."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, on the CPU; mapped from the files, not copied, where that is possible.

    Raises:
        ValueError: there are no weights, a file is cut short or holds something else than tensors, or an index and its
            files disagree; the first place that is wrong is named.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _read_shards(folder / name) if name.endswith(".index.json") else _read_file(folder / name)
    raise ValueError(f"{folder}: no weights; allowed: {', '.join(WEIGHTS)}")


def shard_files(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        ValueError: it is none, or names a file outside its folder.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map = {str(places)[:40]}; allowed: the file of each tensor")
    for name, file in places.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index}: weight_map.{name} = {file!r}; allowed: a file of weights beside the index")
    return places


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = shard_files(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        for name, tensor in _read_file(index.parent / file).items():
            if places.get(name) != file:
                raise ValueError(f"{index.parent / file}: tensor {name!r} is not one that {index.name} places there")
            tensors[name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise ValueError(f"{index.parent / file}: tensor {name!r} is missing; {index.name} names it")
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: missing; the index names it")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error
    try:
        # Tensors and plain containers only: nothing else is ever made of a pickle, and no code in it is run.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: cut short, or a pickle of more than tensors: {reason[:200]}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: not a whole file of torch: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}; allowed: tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: entry {name!r} is a {type(value).__name__}; allowed: tensors by name")
    return dict(loaded)
