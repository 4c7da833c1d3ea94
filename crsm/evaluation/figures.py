"""Pictures: pure functions from figures and plain data to a matplotlib ``Figure``. Nothing here measures anything."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

# Told apart by people who do not see red and green (Okabe and Ito).
SYSTEM_1 = "#D55E00"
SYSTEM_2 = "#0072B2"
GOAL = "#009E73"
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8A8A8A"
LIGHT = "#D9D9D9"
INK = "#222222"

FORMATS = ("pdf", "png", "svg")


@dataclass(frozen=True, slots=True)
class GraphExample:
    """One problem with the paths that the two systems said."""

    title: str
    edges: Sequence[tuple[int, int]]
    """From the start outwards."""
    start: int
    goal: int
    path_1: Sequence[int]
    """What System 1 said, as nodes; cut where it stopped being a path."""
    path_2: Sequence[int]
    right_1: bool
    right_2: bool


@dataclass(frozen=True, slots=True)
class Accuracies:
    """One task's bars."""

    task: str
    chance: float | None
    """Of guessing one of the possible ends; None: they cannot be counted."""
    system_1: tuple[float, float, float]
    """Accuracy and its interval."""
    system_2: tuple[float, float, float]
    p: float
    """McNemar's."""


@dataclass(frozen=True, slots=True)
class SaidToken:
    """A token of the timeline."""

    seconds: float
    text: str
    steered: bool
    """A plan was written right before it was computed."""


@dataclass(frozen=True, slots=True)
class Thought:
    """One deliberation of the timeline."""

    asked: float
    """Seconds."""
    ready: float
    line: str
    """What it planned."""
    outcome: str
    written: float | None
    """When it was written into the state; None: it was not."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """One generation by the wall clock."""

    tokens: Sequence[SaidToken]
    thoughts: Sequence[Thought]
    pace: float
    lag: int
    note: str
    """How regular the tokens were."""


# ------------------------------------------------------------------------------------------------------- the demo


def percent(share: float) -> str:
    """Whole percents, and tenths where a whole one would say that all or none were right and it is not so."""
    text = f"{share:.0%}"
    return f"{share:.1%}" if text in ("0%", "100%") and share not in (0.0, 1.0) else text


def demo_figure(examples: Sequence[GraphExample], bars: Sequence[Accuracies], timeline: Timeline | None) -> Figure:
    """What the demo found, at a glance: example problems, accuracy, one generation in time."""
    figure = new_figure(14, 10 if timeline is not None else 6)
    rows = figure.add_gridspec(
        2 if timeline is not None else 1,
        1,
        height_ratios=(1.25, 1) if timeline is not None else (1,),
        left=0.07,
        right=0.975,
        top=0.83 if timeline is not None else 0.72,
        bottom=0.07,
        hspace=0.30,
    )
    share = min(2.0, max(1.05, 0.35 * len(bars)))
    top = rows[0].subgridspec(1, len(examples) + 1, wspace=0.14, width_ratios=(*(1.0,) * len(examples), share))
    for column, example in enumerate(examples):
        draw_example(figure.add_subplot(top[0, column]), example)
    draw_accuracies(figure.add_subplot(top[0, len(examples)]), bars)
    if timeline is not None:
        draw_timeline(figure.add_subplot(rows[1]), timeline)
    gains = ",  ".join(
        f"{bar.task.replace('_', ' ')} {percent(bar.system_1[0])} → {percent(bar.system_2[0])}" for bar in bars
    )
    if len(bars) > 3:
        one, two = (
            sum(system) / len(bars) for system in zip(*[(b.system_1[0], b.system_2[0]) for b in bars], strict=True)
        )
        gains = f"{len(bars)} kinds of problems, {percent(one)} → {percent(two)} on average"
    figure.text(0.07, 0.955, "It thinks while it speaks", fontsize=21, fontweight="bold", color=INK)
    figure.text(
        0.07,
        0.917,
        f"The same model without and with planners that write into its state:  {gains}",
        fontsize=13.5,
        color=INK,
    )
    return figure


def draw_example(axes: Axes, example: GraphExample) -> None:
    """A graph as a tree from the start downwards, with both systems' paths."""
    places = tree_layout(example.edges, example.start)
    for u, v in example.edges:
        axes.plot(*zip(places[u], places[v], strict=True), color=LIGHT, linewidth=2, zorder=1)
    steps_1, steps_2 = ([*pairwise(path)] for path in (example.path_1, example.path_2))
    # Side by side where both went the same way.
    apart = 0.045 * (1 + max(x for x, _ in places.values()))
    for steps, color, side in ((steps_1, SYSTEM_1, -1), (steps_2, SYSTEM_2, 1)):
        for u, v in steps:
            (x0, y0), (x1, y1) = places[u], places[v]
            shift = side * apart / 2 if (u, v) in steps_1 and (u, v) in steps_2 else 0.0
            axes.plot(
                (x0 + shift, x1 + shift),
                (y0, y1),
                color=color,
                linewidth=5,
                zorder=2,
                solid_capstyle="round",
                linestyle="-" if color == SYSTEM_2 else (0, (1.6, 1.1)),
            )
    small = len(places) > 12
    for node, (x, y) in places.items():
        face, edge = "white", GREY
        if node == example.start:
            edge = INK
        if node == example.goal:
            face, edge = GOAL, GOAL
        axes.scatter(x, y, s=330 if small else 480, color=face, edgecolor=edge, linewidth=2, zorder=3)
        axes.text(
            x,
            y,
            str(node),
            ha="center",
            va="center",
            fontsize=9 if small else 11,
            color="white" if face == GOAL else INK,
            fontweight="bold" if node in (example.start, example.goal) else "normal",
            zorder=4,
        )
    x, y = places[example.start]
    axes.annotate("start", (x, y), (16, 6), textcoords="offset points", fontsize=11, color=INK)
    x, y = places[example.goal]
    axes.annotate(
        "goal", (x, y), (0, -23), textcoords="offset points", ha="center", fontsize=11, color=GOAL, fontweight="bold"
    )
    axes.set_title(example.title, fontsize=12.5, loc="left", color=INK, pad=26)
    narrow = axes.get_window_extent().width / axes.figure.dpi < 3.6  # inches
    for place, (name, right, color) in enumerate(
        (("System 1", example.right_1, SYSTEM_1), ("System 2", example.right_2, SYSTEM_2))
    ):
        axes.text(
            (0.61 if narrow else 0.53) * place,
            1.03,
            f"{name} {'arrives' if right else 'goes astray'}",
            transform=axes.transAxes,
            fontsize=9.5 if narrow else 11.5,
            color=color,
            fontweight="bold",
        )
    axes.margins(0.10, 0.16)
    axes.axis("off")


def tree_layout(edges: Sequence[tuple[int, int]], root: int) -> dict[int, tuple[float, float]]:
    """Places of the nodes of a tree: leaves side by side, a parent over the middle of its children."""
    children: dict[int, list[int]] = {}
    for u, v in edges:
        children.setdefault(u, []).append(v)
    places: dict[int, tuple[float, float]] = {}
    leaves = 0

    def place(node: int, depth: int) -> float:
        nonlocal leaves
        below = [place(child, depth + 1) for child in children.get(node, ())]
        if below:
            x = (below[0] + below[-1]) / 2
        else:
            x, leaves = float(leaves), leaves + 1
        places[node] = (x, -float(depth))
        return x

    place(root, 0)
    return places


def draw_accuracies(axes: Axes, bars: Sequence[Accuracies]) -> None:
    """Bars with 95 % intervals, and the level of guessing."""
    width = 0.36
    roomy = len(bars) <= 3
    size = 13 if roomy else 9
    guessed = next((bar for bar in bars if bar.chance is not None), None)
    for place, bar in enumerate(bars):
        for shift, (value, low, high), color, name in (
            (-width / 2 - 0.01, bar.system_1, SYSTEM_1, "System 1 alone"),
            (width / 2 + 0.01, bar.system_2, SYSTEM_2, "with System 2"),
        ):
            x = place + shift
            axes.bar(x, value, width, color=color, label=name if place == 0 else None, zorder=2)
            axes.errorbar(
                x, value, [[value - low], [high - value]], color=INK, capsize=4, linewidth=1.3, zorder=3, fmt="none"
            )
            axes.text(x, high + 0.025, percent(value), ha="center", fontsize=size, fontweight="bold", color=color)
        if bar.chance is None:
            continue
        axes.plot(
            (place - 0.45, place + 0.45),
            (bar.chance,) * 2,
            color=INK,
            linestyle=":",
            linewidth=1.8,
            zorder=4,
            label="guessing" if bar is guessed else None,
        )
    names = [f"{bar.task.replace('_', ' ')}\n{_p_value(bar.p)}" for bar in bars]
    axes.set_xticks(range(len(bars)), names, fontsize=12 if roomy else 9)
    axes.set_ylim(0, 1.16)
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color=LIGHT, linewidth=0.8, zorder=0)
    axes.set_title("Right answers on fresh problems", fontsize=12.5, loc="left", color=INK, pad=26)
    axes.legend(
        frameon=False,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(-0.05, 0.985),
        fontsize=10,
        columnspacing=0.9,
        handlelength=1.5,
    )
    bare_axes(axes)


def _p_value(p: float) -> str:
    return f"p = {p:.1g}" if p >= 1e-99 else "p < 1e-99"


def draw_timeline(axes: Axes, timeline: Timeline) -> None:
    """Tokens on top at the time they were said; below them a bar per deliberation, and arrows where it was written."""
    step = 1 / timeline.pace
    last = max((token.seconds for token in timeline.tokens), default=step)
    y_token = 1.0
    for token in timeline.tokens:
        color = SYSTEM_2 if token.steered else INK
        axes.text(
            token.seconds,
            y_token,
            token.text,
            ha="center",
            va="center",
            fontsize=13,
            fontweight="bold" if token.steered else "normal",
            color=color,
            bbox={
                "boxstyle": "round,pad=0.35",
                "facecolor": "#DCEBF7" if token.steered else "#F2F2F2",
                "edgecolor": color if token.steered else LIGHT,
            },
            zorder=5,
        )
    shown = list(timeline.thoughts)
    row_height = 1.0
    for row, thought in enumerate(shown):
        y = y_token - 1.15 - row * row_height
        used = thought.written is not None
        color = SYSTEM_2 if used else GREY
        axes.plot(
            (thought.asked, thought.asked), (y, y_token - 0.45), color=LIGHT, linewidth=1.2, linestyle=":", zorder=1
        )
        width = max(thought.ready - thought.asked, 0.02 * step)
        axes.barh(y, width, 0.5, left=thought.asked, color=color, zorder=2)
        if thought.written is not None:
            axes.plot((thought.ready, thought.written), (y, y), color=color, linewidth=1.5, zorder=2)
            axes.annotate(
                "",
                (thought.written, y_token - 0.42),
                (thought.written, y),
                arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0},
                zorder=4,
            )
        label = f"plan “{thought.line}” written" if used else f"plan “{thought.line}”: {thought.outcome}"
        if not thought.line:
            label = thought.outcome
        axes.text(last + 0.55 * step, y, label, va="center", fontsize=11, color=color)
    axes.set_xlim(-0.6 * step, last + 2.8 * step)
    axes.set_ylim(y_token - 1.15 - max(1, len(shown)) * row_height + 0.4, y_token + 0.8)
    axes.set_yticks(
        (y_token, y_token - 1.15 - (max(1, len(shown)) - 1) * row_height / 2),
        ("said", "planners\nat work"),
        fontsize=12,
    )
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds since the first token", fontsize=11)
    axes.set_title(
        f"One answer by the wall clock, {timeline.pace:g} tokens a second, plans asked for {timeline.lag} tokens "
        f"ahead. {timeline.note}",
        fontsize=12.5,
        loc="left",
        color=INK,
    )
    bare_axes(axes)
    axes.spines["left"].set_visible(False)


# ----------------------------------------------------------------------------------------------- accuracy by compute

_METHODS = {
    "system_2": ("System 2, one plan", SYSTEM_2, "o", "simulations"),
    "best_of": ("best of N by the critics", SYSTEM_1, "s", "samples"),
    "self_consistency": ("majority of N", OTHERS[0], "^", "samples"),
    "beam_search": ("beam search", OTHERS[1], "D", "wide"),
}


def compute_figure(curves: Mapping[str, Any]) -> Figure:
    """Accuracy over multiply-adds of :func:`crsm.evaluation.equal_compute.accuracy_against_compute`."""
    figure = new_figure(9, 5.6)
    axes = figure.add_axes((0.085, 0.115, 0.88, 0.81))
    for method, points in curves["methods"].items():
        name, color, marker, unit = _METHODS[method]
        x = [point["multiply_adds"] for point in points]
        y = [point["accuracy"] for point in points]
        low, high = zip(*(point["interval"] for point in points), strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(x, y, color=color, marker=marker, linewidth=2, markersize=6, label=name)
        for point in (points[0], points[-1]):
            axes.annotate(
                f"{point['budget']} {unit}" if point is points[-1] else str(point["budget"]),
                (point["multiply_adds"], point["accuracy"]),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=color,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("multiply-adds per answer, after the prompt", fontsize=11)
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.legend(frameon=False, loc="lower right", fontsize=10.5)
    axes.set_title(
        f"{curves['task'].replace('_', ' ')}: right answers at equal compute ({curves['problems']} problems, "
        f"lag {curves['lag']}, 95 % intervals)",
        fontsize=12.5,
        loc="left",
        color=INK,
    )
    bare_axes(axes)
    return figure


# ------------------------------------------------------------------------------------------------------------- common


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def bare_axes(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)


def check_figure_path(path: str | Path) -> None:
    """Says now, and not after the work, that a picture cannot be written in this format.

    Raises:
        ValueError: naming the ending and what is allowed.
    """
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise ValueError(f"figure {str(path)!r} has the ending {ending!r}; allowed: {', '.join(FORMATS)}")


def save_figure(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Writes a picture, whole or not at all, in the format of its ending.

    Raises:
        ValueError: the ending is no format.
        OSError: the place cannot be written.
    """
    check_figure_path(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    try:
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
