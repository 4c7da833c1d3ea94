"""The demo: System 1 and System 2 side by side on fresh problems, then one answer at a time by the wall clock.

Accuracy is measured by the virtual clock, so that it does not depend on the machine; the wall clock shows what it is
for: tokens come at their pace, planners or not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crsm.config import DeliberationConfig, EngineConfig, PathStarConfig, TaskConfig, TreePathConfig
from crsm.data.sequences import encode_prompt
from crsm.engine import Engine
from crsm.evaluation.figures import (
    Accuracies,
    GraphExample,
    SaidToken,
    Thought,
    Timeline,
    check_figure_path,
    demo_figure,
    save_figure,
)
from crsm.evaluation.lent_planners import LentPlanners
from crsm.evaluation.solving import Answer, Run, solve
from crsm.evaluation.statistics import mcnemar, wilson_interval
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.planners import Arrivals, Planners
from crsm.tasks import build_task
from crsm.tasks.base import Problem, Task, problems
from crsm.types import Plan, PlanRequest, Reason, Token

if TYPE_CHECKING:
    from rich.console import RenderableType

CHUNK = 20
"""Problems between two looks at the progress."""
BY_WALL_CLOCK = 3
"""Problems of each task that are also answered by the wall clock."""
MOST_SHOWN = 12
"""Tokens of the answer whose plans are drawn."""
DELAY_ALLOWED = 0.25
"""Share of the time between two tokens by which planners may delay the median token: noise, not waiting."""


@dataclass(slots=True)
class Score:
    """One task so far."""

    settings: TaskConfig
    task: Task
    wanted: int = 0
    answers: list[tuple[Answer, Answer]] = field(default_factory=list)
    """System 1's and System 2's, per problem."""
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    hits: int = 0
    settled: int = 0
    written: int = 0

    @property
    def right_2M(self) -> np.ndarray:
        return np.array([[answer.correct for answer in pair] for pair in self.answers], dtype=bool).reshape(-1, 2).T

    @property
    def hit_rate(self) -> float:
        return self.hits / self.settled if self.settled else 0.0

    def add(self, one: Run, two: Run) -> None:
        self.answers += zip(one.answers, two.answers, strict=True)
        for system, run in enumerate((one, two)):
            self.seconds[system] += run.seconds
            self.tokens[system] += run.metrics.tokens
        outcomes = two.metrics.outcomes
        self.hits += sum(count for reason, count in outcomes.items() if reason.is_hit)
        self.settled += sum(outcomes.values()) - outcomes[Reason.ENDED]
        self.written += two.metrics.injections

    def accuracies(self) -> Accuracies:
        one_M, two_M = self.right_2M
        count = len(self.answers)

        def with_interval(right_M: np.ndarray) -> tuple[float, float, float]:
            return (float(right_M.mean()), *wilson_interval(int(right_M.sum()), count))

        routes = [len(pair[0].problem.data.get("routes", ())) for pair in self.answers]
        chance = float(np.mean([1 / count for count in routes])) if all(routes) else None
        return Accuracies(self.task.name, chance, with_interval(one_M), with_interval(two_M), mcnemar(one_M, two_M))


@dataclass(frozen=True, slots=True)
class PacedAnswer:
    """One answer by the wall clock."""

    problem: Problem
    tokens: tuple[Token, ...]
    seconds: tuple[float, ...]
    """When each token was there, from the first one on."""
    plans: tuple[Plan, ...]
    asked: dict[int, float]
    """Per request, seconds from the first token on."""

    @property
    def intervals(self) -> list[float]:
        return [b - a for a, b in zip(self.seconds, self.seconds[1:], strict=False)]


def run_demo(
    checkpoint: Checkpoint, planners: Planners, count: int, pace: float, figure: Path
) -> tuple[dict[str, Any], int]:
    """Runs everything, prints the table, writes the picture.

    Args:
        checkpoint: with tasks whose answers are verified; the first graphs of each kind are drawn.
        planners: System 2; not closed here.
        count: problems of each task.
        pace: tokens per second of the part by the wall clock.
        figure: where the picture goes.

    Returns:
        The results, and the exit status: 0 if planners wrote plans and did not delay a token.
    """
    check_figure_path(figure)
    scores = [Score(settings, build_task(settings)) for settings in checkpoint.config.tasks]
    _by_virtual_clock(checkpoint, scores, count, planners)
    paced_1, paced_2 = _by_wall_clock(checkpoint, [score.task for score in scores], pace, planners)
    bars = [score.accuracies() for score in scores]
    (alone, worst_1), (planned, worst_2) = _median_and_longest(paced_1), _median_and_longest(paced_2)
    # Of those that the picture has room for, the one with the most plans.
    shown = [answer for answer in paced_2 if len(answer.tokens) <= MOST_SHOWN] or paced_2
    example = max(shown, key=lambda answer: sum(token.injection is not None for token in answer.tokens))
    note = f"Time between tokens: {1000 * alone:.0f} ms alone, {1000 * planned:.0f} ms with planners."
    timeline = timeline_of(checkpoint, example, pace, note)
    save_figure(demo_figure(graph_examples(scores), bars, timeline), figure)
    _print_results(scores, bars)
    _say(
        f"at {pace:g} tokens/s by the wall clock the time between tokens is {1000 * alone:.1f} ms alone and "
        f"{1000 * planned:.1f} ms with planners (median; longest {1000 * worst_1:.1f} and {1000 * worst_2:.1f} ms)"
    )
    _say(f"picture: {figure}")
    written = sum(score.written for score in scores)
    delayed = planned - alone > DELAY_ALLOWED / pace
    if not written:
        _say("no plan was written: this checkpoint's gates are shut, or its planners answered nothing")
    if delayed:
        _say("the planners delayed the tokens: is the machine busy with something else?")
    results = {
        "tasks": {
            bar.task: {
                "problems": len(score.answers),
                "chance": bar.chance,
                "system1": {"accuracy": bar.system_1[0], "interval": bar.system_1[1:]},
                "system2": {"accuracy": bar.system_2[0], "interval": bar.system_2[1:]},
                "mcnemar_p": bar.p,
                "plan_hit_rate": score.hit_rate,
                "plans_written": score.written,
                "tokens_per_second": {
                    "system1": score.tokens[0] / score.seconds[0],
                    "system2": score.tokens[1] / score.seconds[1],
                },
            }
            for score, bar in zip(scores, bars, strict=True)
        },
        "wall_clock": {
            "pace": pace,
            "answers": len(paced_2),
            "interval": {"system1": alone, "system2": planned},
            "longest_interval": {"system1": worst_1, "system2": worst_2},
            "plans_written": sum(token.injection is not None for answer in paced_2 for token in answer.tokens),
        },
        "figure": figure,
    }
    return results, int(not written or delayed)


# --------------------------------------------------------------------------------------------------- virtual clock


def _by_virtual_clock(checkpoint: Checkpoint, scores: Sequence[Score], count: int, planners: Planners) -> None:
    engine = EngineConfig(clock="virtual", max_batch=checkpoint.config.engine.max_batch)
    sampling = checkpoint.config.sampling.model_copy(update={"temperature": 0.0})
    with _Board(scores) as board:
        for score in scores:
            fresh = problems(score.task, checkpoint.config.seed, "test", count)
            score.wanted = len(fresh)
            for start in range(0, len(fresh), CHUNK):
                chunk = fresh[start : start + CHUNK]
                one = solve(checkpoint, score.task, chunk, sampling=sampling, engine=engine)
                lent = LentPlanners(planners)
                two = solve(checkpoint, score.task, chunk, planners=lent, sampling=sampling, engine=engine)
                lent.close()
                score.add(one, two)
                board.show()


class _Board:
    """Who is ahead: a live table on a terminal, a line now and then elsewhere."""

    def __init__(self, scores: Sequence[Score]) -> None:
        self._scores = scores
        self._live: Any = None
        self._shown = time.monotonic()

    def __enter__(self) -> _Board:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self._render(), console=Console(file=sys.stderr), refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def show(self) -> None:
        if self._live is not None:
            self._live.update(self._render())
            return
        last = all(len(score.answers) == score.wanted for score in self._scores)
        if last or time.monotonic() - self._shown > 3:
            self._shown = time.monotonic()
            parts = []
            for score in self._scores:
                if score.answers:
                    one, two = score.right_2M.sum(axis=1)
                    parts.append(
                        f"{score.task.name} {len(score.answers)}/{score.wanted}: System 1 {one} right, System 2 {two}"
                    )
            _say("; ".join(parts))

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(title="right answers so far", title_justify="left")
        for column in ("task", "System 1", "System 2", "problems", ""):
            table.add_column(column)
        lines: list[Text] = []
        for score in self._scores:
            done = len(score.answers)
            one, two = score.right_2M.sum(axis=1) if done else (0, 0)
            table.add_row(
                score.task.name,
                Text(f"{one / done:.0%}" if done else "", "dark_orange3"),
                Text(f"{two / done:.0%}" if done else "", "bold dodger_blue2"),
                f"{done}/{score.wanted}",
                ProgressBar(total=score.wanted, completed=done, width=24),
            )
            if done:
                problem = score.answers[-1][0].problem
                asked = problem.prompt.rpartition("/ ")[2].removesuffix(" =")[-72:]
                lines.append(Text(f"{problem.task}: {asked}", "bold"))
                for name, answer in zip(("System 1", "System 2"), score.answers[-1], strict=True):
                    style = "green" if answer.correct else "red"
                    lines.append(Text(f"  {name}: {answer.text} {'✓' if answer.correct else '✗'}", style))
        return Group(table, *lines)


# ------------------------------------------------------------------------------------------------------ wall clock


class _Watched:
    """Planners whose requests and plans are kept, with the time."""

    def __init__(self, inner: Planners) -> None:
        self._inner = inner
        self.asked: dict[int, float] = {}
        self.plans: list[Plan] = []

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        for request in requests:
            self.asked[request.request_id] = time.monotonic()
        self._inner.submit(requests)

    def room(self) -> int | None:
        return self._inner.room()

    def soonest(self) -> float:
        return self._inner.soonest()

    def poll(self) -> Arrivals:
        arrivals = self._inner.poll()
        self.plans += arrivals.plans
        return arrivals

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        return self._inner.wait(request_ids)

    def close(self) -> None:
        self._inner.close()


def _by_wall_clock(
    checkpoint: Checkpoint, tasks: Sequence[Task], pace: float, planners: Planners
) -> tuple[list[PacedAnswer], list[PacedAnswer]]:
    """The same problems by System 1 and by System 2, one after the other, at a pace."""
    _say(f"by the wall clock, {pace:g} tokens a second:")
    deliberation = checkpoint.config.deliberation
    alone: list[PacedAnswer] = []
    planned: list[PacedAnswer] = []
    for task in tasks:
        for problem in problems(task, checkpoint.config.seed + 1, "test", BY_WALL_CLOCK):
            alone.append(paced_answer(checkpoint, problem, deliberation, pace, None))
            lent = LentPlanners(planners)
            answer = paced_answer(checkpoint, problem, deliberation, pace, lent)
            lent.close()
            planned.append(answer)
            said = " ".join(
                f"{checkpoint.tokenizer.token(token.token)}{'*' if token.injection else ''}" for token in answer.tokens
            )
            right = task.verify(problem, checkpoint.tokenizer.decode([token.token for token in answer.tokens]))
            _say(f"  {said}   {'right' if right else 'wrong'} (* after a written plan)")
    return alone, planned


def paced_answer(
    checkpoint: Checkpoint,
    problem: Problem,
    deliberation: DeliberationConfig,
    pace: float,
    planners: Planners | None,
) -> PacedAnswer:
    """One answer by the wall clock, with everything that its planners did."""
    watched = None if planners is None else _Watched(planners)
    engine = Engine(checkpoint, watched, EngineConfig(clock="wall", pace=pace))
    request = GenerationRequest(
        tuple(encode_prompt(problem, checkpoint.tokenizer)),
        checkpoint.config.sampling.model_copy(update={"temperature": 0.0}),
        deliberation,
        checkpoint.config.search.simulations,
    )
    tokens, at = [], []
    for token in engine.generate([request]):
        tokens.append(token)
        at.append(time.monotonic())
    asked = {} if watched is None else {number: seconds - at[0] for number, seconds in watched.asked.items()}
    plans = () if watched is None else tuple(watched.plans)
    return PacedAnswer(problem, tuple(tokens), tuple(seconds - at[0] for seconds in at), plans, asked)


def _median_and_longest(answers: Sequence[PacedAnswer]) -> tuple[float, float]:
    """Of the seconds between two tokens; 0 where every answer is a single token."""
    intervals = [interval for answer in answers for interval in answer.intervals] or [0.0]
    return float(np.median(intervals)), max(intervals)


def timeline_of(checkpoint: Checkpoint, answer: PacedAnswer, pace: float, note: str) -> Timeline:
    """One answer in time, as it is drawn."""
    say, ends = checkpoint.tokenizer.token, set(checkpoint.tokenizer.terminal_ids)
    written = {
        token.injection.plan.request_id: seconds
        for token, seconds in zip(answer.tokens, answer.seconds, strict=True)
        if token.injection is not None
    }
    thoughts = []
    free = 0.0
    for plan in sorted(answer.plans, key=lambda plan: answer.asked[plan.request_id]):
        asked = answer.asked[plan.request_id]
        # One planner thinks about one request after the other.
        free = max(asked, free) + plan.seconds
        used = written.get(plan.request_id)
        outcome = "not used" if plan.confidence_L.any() else "gates shut"
        # Past the end of the answer there is nothing to say.
        line = () if ends & set(plan.assumed) else plan.line
        thoughts.append(
            Thought(
                asked,
                free if used is None else min(free, used),
                " ".join(say(token) for token in line),
                outcome if line else "the answer ends before",
                # Just before the token was computed.
                None if used is None else used,
            )
        )
    tokens = [
        SaidToken(seconds, say(token.token), token.injection is not None)
        for token, seconds in zip(answer.tokens, answer.seconds, strict=True)
    ]
    return Timeline(tokens, thoughts, pace, checkpoint.config.deliberation.lag, note)


# ---------------------------------------------------------------------------------------------------------- results


def graph_examples(scores: Sequence[Score]) -> list[GraphExample]:
    """One of each kind of tree."""
    kinds: dict[type, Score] = {}
    for score in scores:
        if isinstance(score.settings, PathStarConfig | TreePathConfig):
            kinds.setdefault(type(score.settings), score)
    return [_graph_example(score) for score in kinds.values()]


def _graph_example(score: Score) -> GraphExample:
    """A problem that only System 2 solved, if there is one."""
    pair = next((pair for pair in score.answers if not pair[0].correct and pair[1].correct), score.answers[0])
    data = pair[0].problem.data
    return GraphExample(
        f"A problem of {score.task.name.replace('_', ' ')}",
        [(u, v) for u, v in data["edges"]],
        data["start"],
        data["goal"],
        _walk(pair[0], data),
        _walk(pair[1], data),
        pair[0].correct,
        pair[1].correct,
    )


def _walk(answer: Answer, data: dict[str, Any]) -> list[int]:
    """The nodes that an answer names, as long as they follow the edges."""
    edges = {tuple(edge) for edge in data["edges"]}
    path: list[int] = []
    for word in answer.text.split():
        if not word.isdecimal():
            if path:
                break
            continue
        node = int(word)
        if (path and (path[-1], node) not in edges) or (not path and node != data["start"]):
            break
        path.append(node)
    return path


def _print_results(scores: Sequence[Score], bars: Sequence[Accuracies]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fresh problems, virtual clock", title_justify="left")
    table.add_column("task")
    for column in ("System 1", "System 2", "difference", "McNemar p", "plan hit rate", "tokens/s 1", "tokens/s 2"):
        table.add_column(column, justify="right")
    for score, bar in zip(scores, bars, strict=True):
        table.add_row(
            bar.task,
            f"{bar.system_1[0]:.3f}",
            f"{bar.system_2[0]:.3f}",
            f"{bar.system_2[0] - bar.system_1[0]:+.3f}",
            f"{bar.p:.2g}",
            f"{score.hit_rate:.3f}",
            *(f"{tokens / seconds:,.0f}" for tokens, seconds in zip(score.tokens, score.seconds, strict=True)),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
