"""What one preparation of data is: settings, inputs, and where its files lie; and whether two of them are the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crsm.data.parts import part_key
from crsm.data.sources import Input, list_inputs
from crsm.data.tokenizer import Tokenizer
from crsm.data_config import DataConfig, SourceConfig

WORK = "work"


@dataclass(frozen=True, slots=True)
class Plan:
    """One preparation: everything that a worker has to know, as plain data."""

    config: DataConfig
    folder: str
    """Of the output."""
    inputs: tuple[Input, ...]

    @property
    def output(self) -> Path:
        return Path(self.folder)

    @property
    def work(self) -> Path:
        return self.output / WORK

    def source(self, name: str) -> SourceConfig:
        return next(source for source in self.config.sources if source.name == name)

    def clean_path(self, key: str) -> Path:
        return self.work / "clean" / f"{key}.parquet"

    def tokens_path(self, key: str) -> Path:
        return self.work / "tokens" / f"{key}.npz"

    def part_keys(self, given: Input) -> list[str]:
        """The parts of an input that are clean, from the first on without a gap; the last one is marked as such."""
        keys: list[str] = []
        while self.clean_path(key := part_key(given.source, given.number, len(keys))).is_file():
            keys.append(key)
        return keys

    def all_keys(self) -> list[str]:
        return [key for given in self.inputs for key in self.part_keys(given)]


def make_plan(config: DataConfig, output: str | Path) -> Plan:
    """
    Raises:
        ValueError: an input is missing.
    """
    inputs = [given for source in config.sources for given in list_inputs(source)]
    return Plan(config, str(Path(output).expanduser().resolve()), tuple(inputs))


def identity_of(plan: Plan) -> dict[str, Any]:
    """What decides the shards: settings and inputs."""
    settings = plan.config.model_dump(mode="json", exclude={"output"})
    tokenizer = plan.config.tokenizer.path
    return {
        "settings": settings,
        "inputs": [asdict(given) for given in plan.inputs],
        "tokenizer": None if tokenizer is None else Tokenizer.adopt(tokenizer).fingerprint,
    }


def check_same(found: Any, asked: Any, where: str) -> None:
    """
    Raises:
        ValueError: the two differ; the first difference is named.
    """
    difference = _difference(found, json.loads(json.dumps(asked)), "")
    if difference is not None:
        raise ValueError(
            f"{where} was begun with {difference[0]} = {difference[1]!r:.80}; now it is {difference[2]!r:.80}; "
            "allowed: the same settings and inputs, another output, or --fresh"
        )


def _difference(found: Any, asked: Any, place: str) -> tuple[str, Any, Any] | None:
    if isinstance(found, dict) and isinstance(asked, dict):
        pairs = [(str(key), found.get(key), asked.get(key)) for key in dict.fromkeys([*asked, *found])]
    elif isinstance(found, list) and isinstance(asked, list) and len(found) == len(asked):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(found, asked, strict=True))]
    else:
        return None if found == asked else (place, found, asked)
    for name, left, right in pairs:
        if left != right:
            return _difference(left, right, f"{place}.{name}" if place else name)
    return None
