"""Settings of an ablation: a section ``ablation`` beside changes of the checkpoint's settings, in a file of its own.

    ablation: {space: {lag: [0, 1, 2], injection_rate: [0.0, 0.05]}, seeds: [1, 2, 3]}
    search: {simulations: 32}

``--set ablation.problems=100`` changes the section, any other ``--set`` the settings of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from crsm.config import Positive, Probability, Settings
from jobs.own_section import load_own_section

SECTION = "ablation"

Control = Literal[
    "gate_zero", "random_write", "other_problem", "time_shifted", "oracle", "silent_tokens", "untrained_planner"
]


class ResourcesConfig(Settings):
    """What Ray reserves for one trial."""

    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0


class AblationConfig(Settings):
    """One sweep. A trial is one point of the space with one seed."""

    name: str = "ablation"
    """Of the output folder under ``runs/ablations``, if no other is given."""
    checkpoint: str = "nano"
    """A checkpoint's folder, or the name of a shipped one."""
    task: str = "path_star"
    problems: Positive = 500
    """Fresh test problems of one trial."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (1, 2, 3)
    """Repetitions: every seed is another set of problems."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Per swept setting a list of values, or ``{low:, high:, log:}`` where points are drawn."""
    plan_tokens: Annotated[float, Field(gt=0)] = 2.0
    """Where ``planners`` are swept: tokens that are said while one of them makes a plan with the budget and the number
    of hypotheses that the settings have; it grows in proportion to both."""
    method: Literal["grid", "random", "optuna"] = "grid"
    """Where the points come from. ``optuna`` needs the extra ``tune``."""
    points: Positive = 32
    """Points that ``random`` and ``optuna`` draw."""
    scheduler: Literal["all", "asha"] = "all"
    """``asha`` ends a trial whose accuracy is among the worst before it has seen all problems."""
    rungs: Positive = 4
    """Parts of a trial's problems, after each of which ASHA decides."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """ASHA lets the best 1/reduction of the trials pass a rung."""
    controls: tuple[Control, ...] = ("random_write", "other_problem", "oracle")
    """Measured in a grid, at every lag, where all other settings are the checkpoint's own (or the nearest)."""
    targets: tuple[Probability, ...] = (0.9, 0.95)
    """Accuracies for which the cheapest setting is named."""
    resources: ResourcesConfig = ResourcesConfig()
    concurrent: Positive | None = None
    """Trials at a time; None: as many as the resources allow."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that a trial is tried again, on another node if its own was lost."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Whom Ray Tune tells of every trial; they need the extras of these names."""
    smoke: bool = False
    """A 2 × 2 corner of the grid, one seed, few problems: does it run?"""

    @model_validator(mode="after")
    def _is_possible(self) -> AblationConfig:
        if not self.name or self.name != Path(self.name).name or self.name in (".", ".."):
            raise ValueError(f"name = {self.name!r}; allowed: the name of one folder")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}; allowed: at least one, each once")
        if self.scheduler == "asha" and self.problems < self.rungs:
            raise ValueError(f"rungs = {self.rungs} of problems = {self.problems}; allowed: at least one problem each")
        if self.scheduler == "asha" and self.method == "optuna" and len(self.seeds) > 1:
            raise ValueError(
                "scheduler = 'asha' with method = 'optuna' and several seeds; allowed: one seed, or scheduler = 'all' "
                "(Optuna is told the mean over the seeds, which trials that were cut short would bend)"
            )
        return self


SMOKE_PROBLEMS = 40


def shrink(settings: AblationConfig) -> AblationConfig:
    """The settings of a smoke test; the space is cut to its corner by :func:`jobs.ablation.space.corner`."""
    return settings.model_copy(
        update={
            "seeds": settings.seeds[:1],
            "problems": min(settings.problems, SMOKE_PROBLEMS),
            "points": min(settings.points, 4),
        }
    )


@dataclass(frozen=True, slots=True)
class AblationFile:
    """A sweep's settings as they were asked for."""

    ablation: AblationConfig
    stated: dict[str, Any] = field(default_factory=dict)
    """Settings that replace the checkpoint's."""
    overrides: tuple[str, ...] = ()
    """``section.key=value`` on top of both."""


def load_ablation(path: str | Path | None = None, overrides: Iterable[str] = ()) -> AblationFile:
    """The sweep that a file and ``--set`` describe.

    Raises:
        ValueError: naming the file or override, the key, the value and what is allowed.
    """
    return AblationFile(*load_own_section(AblationConfig, SECTION, path, overrides))
