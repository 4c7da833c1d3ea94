"""Settings of an evaluation: which benchmarks, how each is asked, what is set beside System 1 and System 2."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from crsm.config import Config, Positive, Settings, TaskConfig, parse_settings

Control = Literal[
    "gate_zero", "random_write", "other_problem", "time_shifted", "oracle", "silent_tokens", "untrained_planner"
]
TEXT = "text"
"""A benchmark that is no task, but a file: how well is its text predicted?"""


def known_tasks() -> tuple[str, ...]:
    """The kinds of task that there are."""
    kinds = get_args(get_args(TaskConfig)[0])
    return tuple(name for kind in kinds for name in get_args(kind.model_fields["name"].annotation))


class BenchmarkConfig(Settings):
    """One benchmark."""

    name: str
    """A task's, or any with a ``path``, as a rule ``text``."""
    task: TaskConfig | None = None
    """Settings of the task; None: those of the checkpoint's task of that name, or else the task's defaults."""
    path: str | None = None
    """Text to predict: a ``.txt`` (one document), or a ``.jsonl`` whose field ``text`` holds a document a line; either
    as ``.gz`` too."""
    split: Literal["train", "valid", "test", "all"] = "test"
    """``all``: every problem of a data set that is a test set as a whole."""
    problems: Positive | None = None
    """How many, at most; None: all there are, and 500 of a task that generates them."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Solved problems before every problem."""
    examples: TaskConfig | None = None
    """Where those come from: the training split of this task; None: of the benchmark's own."""
    samples: Positive = 1
    """Answers to every problem."""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    """Of several samples; a single answer is sampled as the checkpoint's settings say: greedily, as a rule."""
    pass_at: tuple[Positive, ...] = (1,)
    """The ``k`` of pass@k, where there are several samples."""
    max_tokens: Positive | None = None
    """Tokens of an answer; None: the settings' ``sampling.max_tokens``."""
    window: Annotated[int, Field(ge=2)] = 1024
    """Of a text: tokens that are predicted in one go, given the one before them; only the last window of a document is
    given more, so that it is as long as the others (as in lm-eval). A window is a problem."""

    @model_validator(mode="after")
    def _fits_together(self) -> BenchmarkConfig:
        if max(self.pass_at, default=0) > self.samples or not self.pass_at:
            raise ValueError(f"pass_at = {list(self.pass_at)}; allowed: 1 to samples = {self.samples}, at least one")
        if self.name == TEXT and self.path is None:
            raise ValueError("path = None; allowed: a txt or jsonl file for the benchmark 'text'")
        if self.path is not None and (self.task is not None or self.name in known_tasks()):
            raise ValueError(f"path = {self.path!r}; allowed: None, and task: {{name: …, path: …}} for a task's data")
        if self.task is not None and self.name != self.task.label:
            raise ValueError(f"task.name = {self.task.label!r}; allowed: {self.name!r}, the benchmark's")
        return self


class EvaluationConfig(Settings):
    """One run of ``jobs.evaluate``."""

    checkpoint: str = "nano"
    """A checkpoint's folder, or the name of a shipped one."""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """Those whose settings are not the defaults; all of them are run if no others are asked for."""
    controls: tuple[Control, ...] = ("gate_zero", "random_write", "other_problem")
    """What runs beside both systems."""
    compute: bool = False
    """Also accuracy against compute, beside best-of-N, self-consistency and beam search."""
    part: Positive = 64
    """Problems that are answered together: the unit of what is resumed and of what an actor is given."""
    resamples: Positive = 10_000
    """Of every bootstrap interval."""

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationConfig:
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"benchmarks = {names}; allowed: each name once")
        return self


def pick_benchmark(settings: EvaluationConfig, config: Config, name: str) -> BenchmarkConfig:
    """The settings of a benchmark, its task's included.

    Raises:
        ValueError: there is no such benchmark; those there are, are listed.
    """
    tasks = {task.label: task for task in config.tasks}
    found = next((benchmark for benchmark in settings.benchmarks if benchmark.name == name), None)
    if name != TEXT and name not in {*known_tasks(), *tasks} and (found is None or not (found.task or found.path)):
        allowed = sorted({*known_tasks(), *tasks, *(benchmark.name for benchmark in settings.benchmarks), TEXT})
        raise ValueError(f"benchmark = {name!r}; allowed: {', '.join(allowed)}")
    if found is None:
        found = parse_settings(BenchmarkConfig, {"name": name}, f"benchmark {name!r}")
    if found.path is not None or found.task is not None:
        return found
    task = tasks.get(name) or parse_settings(_AnyTask, {"task": {"name": name}}, f"benchmark {name!r}").task
    return found.model_copy(update={"task": task})


class _AnyTask(Settings):
    task: TaskConfig
