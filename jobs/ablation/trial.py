"""What one trial measures: both systems on one seed's problems at one point of the space, and the controls there.

Invariants:

* everything runs by the virtual clock on one thread, so that a figure is the same bits on every machine and a trial
  that is run again gives the same row;
* a trial can be measured in parts; the parts of its problems added up are the whole;
* System 1 knows nothing of the swept settings: its answers to a part are computed once per process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crsm.config import Config
from crsm.evaluation.comparison import identical, run_system
from crsm.evaluation.compute import Costs, costs
from crsm.evaluation.solving import Run
from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint, use_settings
from crsm.planners import InlinePlanners, Planners
from crsm.reasoning import Deliberator
from crsm.tasks import Problem, Task, build_task
from crsm.tasks.base import problems as draw_problems
from crsm.types import Reason
from jobs.ablation.few_planners import FewPlanners
from jobs.ablation.space import PLANNERS, Point, apply_point


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over some problems; they add up."""

    correct: str = ""
    """System 2's verdicts, a 1 or 0 per problem."""
    system1_correct: str = ""
    identical: bool = True
    """Both systems said the same tokens with the same log-probabilities, bit for bit."""
    tokens: int = 0
    system1_tokens: int = 0
    requests: int = 0
    hits: int = 0
    """Requests whose plan was usable at its target."""
    settled: int = 0
    """Requests whose text went on to the target."""
    injections: int = 0
    simulations: int = 0
    multiply_adds: int = 0
    """After the prompt, at the most that the searches may have spent."""
    system1_multiply_adds: int = 0
    controls: dict[str, int] = field(default_factory=dict)
    """Right answers by control."""

    @property
    def problems(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return self.correct.count("1") / self.problems

    def __add__(self, other: Tally) -> Tally:
        summed: dict[str, Any] = {
            name: getattr(self, name) + getattr(other, name)
            for name in (item.name for item in dataclasses.fields(self))
            if name not in ("identical", "controls")
        }
        names = (*self.controls, *(name for name in other.controls if name not in self.controls))
        summed["controls"] = {name: self.controls.get(name, 0) + other.controls.get(name, 0) for name in names}
        return Tally(identical=self.identical and other.identical, **summed)


class Bench:
    """A checkpoint at which points are measured."""

    hear: Callable[[PlanMetrics], None] | None = None
    """Told what became of the plans of System 2."""

    def __init__(self, checkpoint: Checkpoint, task: str, problems: int, plan_tokens: float = 2.0) -> None:
        """
        Args:
            checkpoint: with the settings that hold where a point says nothing. Its settings are changed meanwhile.
            task: one of the settings' tasks.
            problems: of one seed.
            plan_tokens: tokens that are said while one of a limited number of planners makes a plan.
        """
        self.checkpoint, self.settings = checkpoint, checkpoint.config
        self._count, self._plan_tokens = problems, plan_tokens
        self._task: Task = build_task(next(found for found in self.settings.tasks if found.label == task))
        self._problems: dict[int, list[Problem]] = {}
        self._system1: dict[tuple[int, int, int], Run] = {}

    def problems(self, seed: int) -> list[Problem]:
        """A seed's fresh test problems; fewer than asked only if the task has no more."""
        if seed not in self._problems:
            self._problems[seed] = draw_problems(self._task, seed, "test", self._count)
        return self._problems[seed]

    def measure(self, point: Point, seed: int, part: slice, controls: tuple[str, ...] = ()) -> Tally:
        """Both systems, and controls, on a part of a seed's problems."""
        config, horizon = apply_point(point, self.settings, self.checkpoint.trust_horizon)
        use_settings(self.checkpoint, config)
        try:
            checkpoint = dataclasses.replace(self.checkpoint, trust_horizon=horizon)
            return self._measure(checkpoint, config, seed, part, controls, point.get(PLANNERS))
        finally:
            use_settings(self.checkpoint, self.settings)

    def _measure(
        self,
        checkpoint: Checkpoint,
        config: Config,
        seed: int,
        part: slice,
        controls: tuple[str, ...],
        planners: int | None,
    ) -> Tally:
        fresh = self.problems(seed)
        problems = fresh[part]
        sampling = config.sampling.model_copy(update={"seed": seed})

        def run(name: str, planners: Planners | None = None) -> Run:
            return run_system(
                name,
                checkpoint,
                self._task,
                problems,
                deliberation=config.deliberation,
                search=config.search,
                sampling=sampling,
                seed=seed,
                planners=planners,
            )

        key = (seed, *part.indices(len(fresh))[:2])
        if key not in self._system1:
            self._system1[key] = run("system1")
        system1 = self._system1[key]
        system2 = run("system2", None if planners is None else self._few(checkpoint, config, planners))
        price, metrics = costs(checkpoint.model), system2.metrics
        if self.hear is not None:
            self.hear(metrics)
        made = metrics.requests - metrics.outcomes[Reason.SHED]
        return Tally(
            correct=_verdicts(system2),
            system1_correct=_verdicts(system1),
            identical=identical(system1, system2),
            tokens=metrics.tokens,
            system1_tokens=system1.metrics.tokens,
            requests=metrics.requests,
            hits=sum(count for reason, count in metrics.outcomes.items() if reason.is_hit),
            settled=sum(metrics.outcomes.values()) - metrics.outcomes[Reason.ENDED],
            injections=metrics.injections,
            simulations=metrics.simulations,
            multiply_adds=_said(price, system2) + made * _plans(price, config),
            system1_multiply_adds=_said(price, system1),
            controls={name: _verdicts(run(name)).count("1") for name in controls},
        )

    def _few(self, checkpoint: Checkpoint, config: Config, count: int) -> FewPlanners:
        """So many planners for every answer, as fast as they are with this budget."""
        asked, own = config.deliberation, self.settings
        budget = config.search.simulations * asked.hypotheses
        share = budget / (own.search.simulations * own.deliberation.hypotheses)
        deliberator = Deliberator.from_checkpoint(checkpoint, search=config.search, plan_length=asked.plan_length)
        inner = InlinePlanners(deliberator, config.planners.max_batch)
        return FewPlanners(inner, count, self._plan_tokens * share)


def parts(problems: int, rungs: int) -> list[slice]:
    """Parts of about equal size, in order."""
    ends = [problems * (rung + 1) // rungs for rung in range(rungs)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _verdicts(run: Run) -> str:
    return "".join("1" if answer.correct else "0" for answer in run.answers)


def _said(price: Costs, run: Run) -> int:
    """Every token but an answer's last is consumed."""
    return (run.metrics.tokens - len(run.answers)) * price.token


def _plans(price: Costs, config: Config) -> int:
    """All plans of one request."""
    asked = config.deliberation
    return asked.hypotheses * price.plan(config.search.simulations, asked.lag, asked.plan_length)
