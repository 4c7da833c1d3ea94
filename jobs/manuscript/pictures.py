"""The figures of the paper, from results: vector graphics at the size in which they are printed, 8 point type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from crsm.evaluation.figures import GOAL, GREY, INK, LIGHT, OTHERS, SYSTEM_1, SYSTEM_2
from jobs.manuscript.numbers import Results, task_name
from jobs.manuscript.seven import NAMES
from jobs.manuscript.sources import PAIRED, TASKS

WIDTH = 6.5
"""Inches of a line of text."""
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure."""

    sources: tuple[str, ...]
    draw: Callable[[Results], Figure]


def styled(picture: Picture, results: Results) -> Figure:
    """The figure, in the style of the paper."""
    with matplotlib.rc_context(STYLE):
        return picture.draw(results)


# ----------------------------------------------------------------------------------------------------------- lag, rate


def lag_rate(results: Results) -> Figure:
    """Accuracy over lag and injection rate; and, at the checkpoint's rate, against the lag with the controls."""
    points = results["ablate_lag_rate"]["results"]["points"]
    reference = results["ablate_lag_rate"]["results"]["reference"]["injection_rate"]
    figure = _figure(2.5)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    lags = sorted({cell["lag"] for cell in points})
    rates = sorted({cell["injection_rate"] for cell in points})
    accuracy = np.full((len(rates), len(lags)), np.nan)
    for cell in points:
        accuracy[rates.index(cell["injection_rate"]), lags.index(cell["lag"])] = cell["accuracy"]
    left.imshow(accuracy, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
    for y, x in np.ndindex(accuracy.shape):
        value = accuracy[y, x]
        if np.isfinite(value):
            color = "white" if value < 0.6 else "black"
            left.text(x, y, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=color)
    left.set_xticks(range(len(lags)), [str(lag) for lag in lags])
    left.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    left.tick_params(length=0)
    left.set(xlabel="lag (tokens)", ylabel="injection rate", title="right answers, by lag and injection rate")
    _lag_curves(right, [cell for cell in points if cell["injection_rate"] == reference])
    right.set_title(f"injection rate {reference:g}, with controls")
    return figure


def _lag_curves(axes: Axes, points: list[Any]) -> None:
    points = sorted(points, key=lambda cell: cell["lag"])
    lags = [cell["lag"] for cell in points]
    curves = (
        ("accuracy", "System 2", SYSTEM_2, "o"),
        ("control_oracle", "solution as plan", GOAL, "^"),
        ("system1_accuracy", "System 1", SYSTEM_1, "s"),
        ("control_random_write", "random write", OTHERS[1], "x"),
        ("control_other_problem", "another problem's plan", OTHERS[0], "d"),
    )
    for key, name, color, marker in curves:
        axes.plot(lags, [cell[key] for cell in points], color=color, marker=marker, label=name)
    axes.fill_between(
        lags,
        [cell["accuracy_low"] for cell in points],
        [cell["accuracy_high"] for cell in points],
        color=SYSTEM_2,
        alpha=0.15,
        linewidth=0,
    )
    axes.set(xlabel="lag (tokens)", ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.97))
    _bare(axes)


# ------------------------------------------------------------------------------------------------------------- compute


_METHODS = (
    ("system_2", "System 2 (simulations)", SYSTEM_2, "o"),
    ("best_of", "best of $N$", OTHERS[1], "s"),
    ("self_consistency", "self-consistency", OTHERS[0], "d"),
    ("beam_search", "beam search (width)", GREY, "^"),
)


def compute(results: Results) -> Figure:
    """Accuracy against multiply-adds in units of one sampled answer, both tasks."""
    figure = _figure(2.4)
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, task in zip(panels, TASKS, strict=True):
        _against_compute(axes, results[f"compute_{task}"])
        axes.set(xlabel="compute after the prompt, in sampled answers", title=task_name(task))
    panels[0].set_ylabel("right answers")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def compute_seven(results: Results) -> Figure:
    """The same with the exact world model, and on one kind with the latent one."""
    figure = _figure(2.5)
    panels = figure.subplots(1, len(PAIRED), sharey=True)
    for axes, kind in zip(panels, PAIRED, strict=True):
        _against_compute(axes, results[f"paired_{kind}"])
        axes.set(title=NAMES[kind])
    latent = results["latent_paired_star_5"]["results"]["compute"]["methods"]["system_2"]
    x, y = [cell["samples"] for cell in latent], [cell["accuracy"] for cell in latent]
    panels[0].plot(x, y, color=SYSTEM_2, marker="o", linestyle=":", markerfacecolor="white", label="System 2, latent")
    panels[0].set_ylabel("right answers")
    figure.supxlabel("compute after the prompt, in sampled answers", fontsize=8)
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=5, frameon=False, columnspacing=1.0, handlelength=1.6)
    return figure


def _against_compute(axes: Axes, record: Any) -> None:
    for method, name, color, marker in _METHODS:
        points = record["results"]["compute"]["methods"][method]
        x = [cell["samples"] for cell in points]
        low, high = zip(*(cell["interval"] for cell in points), strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(x, [cell["accuracy"] for cell in points], color=color, marker=marker, label=name)
        for cell in points if method == "system_2" else ():
            axes.annotate(
                str(cell["budget"]),
                (cell["samples"], cell["accuracy"]),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=color,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.14)
    _bare(axes)


# ------------------------------------------------------------------------------------------------------------ planners


def planners(results: Results) -> Figure:
    """Plan hit rate against planners, in simulated time."""
    rows = results["planners"]["results"]["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = _figure(1.85)
    panels = figure.subplots(1, len(shapes), sharey=True)
    for axes, shape in zip(panels, shapes, strict=True):
        for many, color, marker in zip((100, 1000, 10_000), (SYSTEM_2, OTHERS[1], GOAL), "osd", strict=True):
            found = [row for row in rows if (row["shape"], row["generations"]) == (shape, many)]
            x, y = [row["planners"] for row in found], [row["hit_rate"] for row in found]
            axes.plot(x, y, color=color, marker=marker, label=f"{many:,}")
        axes.set(title=shape, xlabel="planners", xscale="log", ylim=(0, 1.05))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _bare(axes)
    panels[0].set_ylabel("plan hit rate")
    panels[0].legend(title="generations", frameon=False, loc="lower right", title_fontsize=7.5)
    return figure


# ------------------------------------------------------------------------------------------------------------ fidelity


def fidelity(results: Results) -> Figure:
    """Errors of the imagination and branch accuracy, by imagined steps."""
    stages = results["training"]["results"]["stages"]
    table = stages["stage_2"]["fidelity"]
    figure = _figure(1.85)
    panels = figure.subplots(1, 3)
    keys = (
        ("policy_kl", "policy KL (nats)"),
        ("value_error", "value error"),
        ("branch_accuracy", "pairs ranked right"),
    )
    for axes, (key, title) in zip(panels, keys, strict=True):
        for (task, rows), color, marker in zip(table.items(), (SYSTEM_2, SYSTEM_1), "os", strict=False):
            # No error at all: at the last steps nothing but verdicts is left, which are not judged.
            known = [row for row in rows if row[key]]
            x, y = [row["step"] for row in known], [row[key] for row in known]
            axes.plot(x, y, color=color, marker=marker, label=task_name(task))
        axes.set(title=title, xlabel="imagined steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _bare(axes)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(0, 1.05)
    panels[2].axhline(0.5, color=GREY, linewidth=0.7, linestyle=":")
    panels[2].text(1, 0.52, "chance", fontsize=7, color=GREY)
    panels[0].legend(frameon=False, loc="upper left")
    return figure


PICTURES = {
    "lag_rate": Picture(("ablate_lag_rate",), lag_rate),
    "compute": Picture(tuple(f"compute_{task}" for task in TASKS), compute),
    "compute_seven": Picture((*(f"paired_{kind}" for kind in PAIRED), "latent_paired_star_5"), compute_seven),
    "planners": Picture(("planners",), planners),
    "fidelity": Picture(("training",), fidelity),
}


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=LIGHT, linewidth=0.5)
    axes.set_axisbelow(True)
