"""Where the files of an import lie: a folder, or a model of the Hugging Face hub (extra ``hub``)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crsm.importing.weights import WEIGHTS, shard_files

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PUBLIC_TOKENIZER = "EleutherAI/gpt-neox-20b"
"""Whose tokenizer ``state-spaces/mamba2-*`` were trained with; their own repositories hold none."""
_PUBLIC = re.compile(r"state-spaces/mamba2-[\w.]+")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def locate_source(source: str, revision: str | None = None) -> Path:
    """The folder of a source; of one on the hub, the folder of its copy.

    Raises:
        ValueError: there is no such folder, or the hub cannot be reached or does not know the name.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision = {revision!r} of the folder {source!r}; allowed: with a name of the hub")
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder}: no {CONFIG}; allowed: a folder with {CONFIG} and weights")
        return folder
    if not _HUB_NAME.fullmatch(source):
        raise ValueError(
            f"source = {source!r}: no such folder; allowed: a folder with {CONFIG} and weights, or a model of the hub "
            "such as state-spaces/mamba2-130m"
        )
    hub = _Hub(source, revision)
    config = hub.fetch(CONFIG)
    weights = next((name for name in WEIGHTS if name in hub.files), None)
    if weights is None:
        raise ValueError(f"{source} on the hub has no weights; allowed: {', '.join(WEIGHTS)}")
    file = hub.fetch(weights)
    if weights.endswith(".index.json"):
        for shard in sorted(set(shard_files(file).values())):
            hub.fetch(shard)
    if TOKENIZER in hub.files:
        hub.fetch(TOKENIZER)
    return config.parent


def locate_tokenizer(tokenizer: str | None, source: str, folder: Path) -> Path:
    """The ``tokenizer.json`` of an import.

    Args:
        tokenizer: a file, a folder that has one, or a model of the hub; None: the source's own.
        source: as the user named it.
        folder: what :func:`locate_source` made of it.

    Raises:
        ValueError: there is none.
    """
    if tokenizer is None:
        if (folder / TOKENIZER).is_file():
            return folder / TOKENIZER
        if not _PUBLIC.fullmatch(source) or Path(source).is_dir():
            raise ValueError(
                f"{folder}: no {TOKENIZER}; allowed: --tokenizer with a file, a folder that has one, or a model of the "
                f"hub ({PUBLIC_TOKENIZER} for the public Mamba-2 weights)"
            )
        tokenizer = PUBLIC_TOKENIZER
    path = Path(tokenizer)
    if path.is_dir():
        path = path / TOKENIZER
    if path.is_file():
        return path
    if path.suffix == ".json" or not _HUB_NAME.fullmatch(tokenizer):
        raise ValueError(f"tokenizer = {tokenizer!r}: no such file; allowed: a {TOKENIZER}, or a folder that has one")
    return _Hub(tokenizer, None).fetch(TOKENIZER)


class _Hub:
    """One model of the hub, at one commit."""

    def __init__(self, name: str, revision: str | None) -> None:
        try:
            client: Any = importlib.import_module("huggingface_hub")
        except ImportError as error:
            raise ValueError(
                f"{name!r} is no folder here, and to fetch it from the hub needs the extra `hub` "
                "(pip install 'crsm[hub]'); allowed: a folder"
            ) from error
        self._name, self._api = name, client.HfApi()
        info = self._ask(lambda: self._api.model_info(name, revision=revision))
        self._commit = info.sha
        self.files = {entry.rfilename for entry in info.siblings}

    def fetch(self, file: str) -> Path:
        """A file's copy; all files of a commit lie in one folder."""
        if file not in self.files:
            raise ValueError(f"{self._name} on the hub has no {file}; allowed: a model that has one")
        return Path(self._ask(lambda: self._api.hf_hub_download(self._name, file, revision=self._commit)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # Each of the client's own dependencies raises its own errors.
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self._name!r} is no folder here, and cannot be fetched from the hub: {reason}; allowed: a folder, "
                "or a public model's name"
            ) from error
