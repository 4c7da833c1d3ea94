"""Settings of ``jobs.tune_training``: a section ``tuning`` beside the settings of a training run.

    tuning: {stage: stage_1, space: {optimizer.lr: {low: 0.0005, high: 0.01, log: true}, batch: [32, 64]}}
    stage_1: {steps: 400, checkpoint_every: 50}

Pure. A key of the space is a setting of the stage; the points are grids or draws of :mod:`jobs.ablation.space`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from crsm.config import Config, Positive, Settings, apply_override, parse_config, parse_settings, read_tree
from jobs.ablation.space import Point, Space, parse_values

SECTION = "tuning"
LEFT_ALONE = ("steps", "checkpoint_every", "evaluate_every", "evaluate_problems", "log_every")
"""Settings of a stage that decide how long a trial is and when it is looked at: the same for all."""


class TuningConfig(Settings):
    """A search for good settings of one training stage."""

    name: str = "tuning"
    """Of the output folder under ``runs/tuning``, if no other is given."""
    stage: Literal["stage_1", "stage_2", "stage_4"] = "stage_1"
    """Stage 3 collects data of its own between its rounds and is not tuned."""
    checkpoint: str | None = None
    """What the stage starts from; needed after stage 1."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Per setting of the stage a list of values, or ``{low:, high:, log:}``."""
    method: Literal["grid", "random"] = "random"
    points: Positive = 8
    """Points that ``random`` draws."""
    metric: str = "loss"
    """A figure of the training curve (``loss``, ``valid/loss/path_star``)."""
    mode: Literal["min", "max"] = "min"
    grace: Positive = 1
    """Looks (one every ``checkpoint_every`` steps) that every trial gets before ASHA may end it."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """ASHA lets the best 1/reduction of the trials pass a rung."""
    concurrent: Positive | None = None
    """Trials at a time; None: as many as there is room for."""

    @model_validator(mode="after")
    def _is_possible(self) -> TuningConfig:
        if not self.name or self.name != Path(self.name).name or self.name in (".", ".."):
            raise ValueError(f"name = {self.name!r}; allowed: the name of one folder")
        if self.stage != "stage_1" and self.checkpoint is None:
            raise ValueError(f"checkpoint = None; allowed: the checkpoint that {self.stage} starts from")
        return self


@dataclass(frozen=True, slots=True)
class TuningFile:
    """A search as it was asked for."""

    tuning: TuningConfig
    settings: Config
    space: Space


def load_tuning(path: str | Path | None, overrides: Iterable[str] = (), seed: int | None = None) -> TuningFile:
    """The search that a file and ``--set`` describe.

    Raises:
        ValueError: naming the file or override, the key, the value and what is allowed.
    """
    source = "defaults" if path is None else str(path)
    tree = {} if path is None else read_tree(path)
    section = tree.pop(SECTION, {})
    if not isinstance(section, dict):
        raise ValueError(f"{source}: {SECTION} = {section!r}; allowed: a mapping")
    settings = parse_config(tree, source)
    tuning = _parse(section, source)
    plain, own = settings.model_dump(mode="json"), {SECTION: tuning.model_dump(mode="json")}
    changes = [*overrides, *([] if seed is None else [f"seed={seed}"])]
    for change in changes:
        apply_override(own if change.startswith(f"{SECTION}.") else plain, change)
    if changes:
        source = f"--set {' '.join(changes)}"
        tuning, settings = _parse(own[SECTION], source), parse_config(plain, source)
    return TuningFile(tuning, settings, _parse_space(tuning, settings))


def _parse(section: dict[str, Any], source: str) -> TuningConfig:
    return parse_settings(_File, {SECTION: section}, source).tuning


class _File(Settings):
    tuning: TuningConfig = TuningConfig()


def tunable(stage: BaseModel, prefix: str = "") -> list[str]:
    """Settings of a stage that can be tuned, by dotted name."""
    names: list[str] = []
    for name in type(stage).model_fields:
        value = getattr(stage, name)
        if isinstance(value, BaseModel):
            names += tunable(value, f"{prefix}{name}.")
        elif prefix or name not in LEFT_ALONE:
            names.append(prefix + name)
    return names


def _parse_space(tuning: TuningConfig, settings: Config) -> Space:
    allowed = tunable(getattr(settings, tuning.stage))
    if not tuning.space:
        raise ValueError(f"{SECTION}.space is empty; allowed: at least one of {', '.join(allowed)}")
    space: Space = {}
    for key, given in tuning.space.items():
        if key not in allowed:
            raise ValueError(f"{SECTION}.space: unknown key {key!r}; allowed: {', '.join(allowed)}")
        check = partial(_checked, key, settings=settings, stage=tuning.stage)
        space[key] = parse_values(given, f"{SECTION}.space.{key}", check, ranges=tuning.method == "random")
    return space


def _checked(key: str, value: Any, *, settings: Config, stage: str) -> Any:
    """The value as the stage has it."""
    node = apply_tuned({key: value}, settings, stage, f"{SECTION}.space.{key}").model_dump(mode="json")[stage]
    for part in key.split("."):
        node = node[part]
    return node


def apply_tuned(point: Point, settings: Config, stage: str, source: str = "point") -> Config:
    """The settings with a point's values in the stage.

    Raises:
        ValueError: a value that its setting does not allow, in that setting's own words.
    """
    tree = settings.model_dump(mode="json")
    for key, value in point.items():
        node = tree[stage]
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return parse_config(tree, source)


def as_options(point: Point, stage: str) -> str:
    """A point as it is given to a training job."""
    return " ".join(f"--set {stage}.{key}={value}" for key, value in point.items())
