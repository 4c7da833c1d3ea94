"""Settings of the tasks and of the tokenizer that their words make."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crsm.settings import Positive, Settings


class PathStarConfig(Settings):
    """Star graph: arms from one centre, the goal at the end of one arm (arXiv 2403.06963)."""

    name: Literal["path_star"] = "path_star"
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training mix."""
    arms: Annotated[int, Field(ge=2)] = 3
    length: Annotated[int, Field(ge=2)] = 4
    """Nodes of an arm, the centre included."""
    labels: Positive = 30
    preamble: Annotated[int, Field(ge=0)] = 2
    """Tokens said before the path: time to think."""

    @model_validator(mode="after")
    def _labels_suffice(self) -> PathStarConfig:
        need = 1 + self.arms * (self.length - 1)
        if self.labels < need:
            raise ValueError(f"labels = {self.labels}; allowed: at least {need} for this graph")
        return self


class TreePathConfig(Settings):
    """Complete binary tree; the answer is the path from the root to a goal leaf: several decisions in a row."""

    name: Literal["tree_path"] = "tree_path"
    weight: Annotated[float, Field(gt=0)] = 1.0
    depth: Annotated[int, Field(ge=1)] = 3
    labels: Positive = 30
    preamble: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _labels_suffice(self) -> TreePathConfig:
        need = 2 ** (self.depth + 1) - 1
        if self.labels < need:
            raise ValueError(f"labels = {self.labels}; allowed: at least {need} for this tree")
        return self


class Gsm8kConfig(Settings):
    """Grade-school word problems with worked steps (arXiv 2110.14168)."""

    name: Literal["gsm8k"] = "gsm8k"
    weight: Annotated[float, Field(gt=0)] = 1.0
    path: str | None = None
    """A local jsonl; ``sample``: the 200 shipped problems; None: ``openai/gsm8k`` from the hub (extra ``hub``)."""
    attempts_path: str | None = None
    """A jsonl of model-made attempts with verdicts (fields ``question``, ``attempt``, ``correct``)."""
    max_tokens: Positive = 256
    """Problems whose text is longer are left out, and counted."""


TaskConfig = Annotated[PathStarConfig | TreePathConfig | Gsm8kConfig, Field(discriminator="name")]


class TokenizerConfig(Settings):
    kind: Literal["closed", "bpe", "file"] = "closed"
    """``closed``: the words of the tasks, nothing else; ``bpe``: byte-level BPE trained on the tasks' text; ``file``:
    the byte-level BPE of a ``tokenizer.json``, as the preparation of data leaves one beside its shards."""
    path: str | None = None
    """Of the ``file``."""
    vocab_size: Positive = 4096
    """Entries of a BPE; a closed vocabulary has as many as the tasks need, a file as many as it has."""

    @model_validator(mode="after")
    def _path_fits(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(f"path = {self.path!r} with kind = {self.kind!r}; allowed: a path for 'file', none else")
        return self
