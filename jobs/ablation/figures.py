"""The pictures of a sweep, from its pooled points: a heat map, accuracy against the lag, against compute, per setting.

A picture of one or two settings shows, of a grid, the points where all others are the reference's; where points were
drawn there are no such, and what it shows is pooled over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from crsm.evaluation.figures import GOAL, GREY, INK, LIGHT, OTHERS, SYSTEM_1, SYSTEM_2, percent, save_figure
from crsm.evaluation.statistics import wilson_interval
from jobs.ablation.report import show
from jobs.ablation.space import Point
from jobs.ablation.table import Pooled
from jobs.ablation.trial import Tally

MAX_CELLS = 24
"""Rows and columns of a heat map that can be read; a setting with more values is not drawn as one."""
_CONTROL_COLORS = (*OTHERS, GOAL, GREY, "#F0E442", "#7F5AA2")


def draw_all(
    points: Sequence[Pooled],
    reference: Point | None,
    controls: Sequence[str],
    cheapest: Mapping[str, Any],
    task: str,
    folder: Path,
) -> list[str]:
    """Draws what the swept settings allow, and gives the files' names."""
    keys = list(points[0].point)
    pictures: dict[str, Figure] = {}
    pair = heat_map_keys(points)
    if pair is not None:
        pictures["heat_map.png"] = heat_map(points, *pair, reference, task)
    if "lag" in keys:
        pictures["lag.png"] = lag_figure(points, reference, controls, task)
    pictures["compute.png"] = compute_figure(points, cheapest, task)
    if set(keys) - {"lag", "injection_rate"}:
        pictures["settings.png"] = settings_figure(points, reference, task)
    for name, figure in pictures.items():
        save_figure(figure, folder / name)
    return list(pictures)


def heat_map_keys(points: Sequence[Pooled]) -> tuple[str, str] | None:
    """Rows and columns of the heat map: the injection rate over the lag, or else the first two settings that fit."""
    fitting = [key for key in points[0].point if 2 <= len(_values(points, key)) <= MAX_CELLS]
    if "lag" in fitting and "injection_rate" in fitting:
        return "injection_rate", "lag"
    return (fitting[1], fitting[0]) if len(fitting) >= 2 else None


def _values(points: Sequence[Pooled], key: str) -> list[Any]:
    found = list(dict.fromkeys(point.point[key] for point in points))
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def merge(points: Sequence[Pooled], reference: Point | None, *keys: str) -> dict[tuple[Any, ...], Tally]:
    """Tallies by the values of some settings, in the order of the points."""
    found: dict[tuple[Any, ...], Tally] = {}
    for point in points:
        if reference is None or all(point.point[key] == reference[key] for key in reference if key not in keys):
            cell = tuple(point.point[key] for key in keys)
            found[cell] = found[cell] + point.tally if cell in found else point.tally
    return found


def heat_map(points: Sequence[Pooled], row: str, column: str, reference: Point | None, task: str) -> Figure:
    """Accuracy by two settings, with the figure in every cell; rows grow upwards."""
    cells = merge(points, reference, row, column)
    rows, columns = _values(points, row), _values(points, column)
    accuracy = np.full((len(rows), len(columns)), np.nan)
    for (y, x), tally in cells.items():
        accuracy[rows.index(y), columns.index(x)] = tally.accuracy
    figure = _figure(2.6 + 0.85 * max(4, len(columns)), 2.3 + 0.55 * max(3, len(rows)))
    axes = figure.subplots()
    image = axes.imshow(accuracy, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
    for y, x in np.ndindex(accuracy.shape):
        if np.isfinite(accuracy[y, x]):
            dark = accuracy[y, x] < 0.6
            text = percent(float(accuracy[y, x]))
            axes.text(x, y, text, ha="center", va="center", fontsize=11, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [show(value) for value in columns], fontsize=11)
    axes.set_yticks(range(len(rows)), [show(value) for value in rows], fontsize=11)
    axes.set_xlabel(_name(column), fontsize=12)
    axes.set_ylabel(_name(row), fontsize=12)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.outline.set_visible(False)
    whole = Tally()
    for tally in cells.values():
        whole += tally
    system1 = whole.system1_correct.count("1") / whole.problems
    each = {tally.problems for tally in cells.values()}
    count = f"{min(each)}" if len(each) == 1 else f"{min(each)} to {max(each)}"
    axes.set_title(
        f"{_name(task)}: right answers with System 2\n{count} problems a cell; System 1 alone {percent(system1)}",
        fontsize=12.5,
        loc="left",
        color=INK,
    )
    return figure


def lag_figure(points: Sequence[Pooled], reference: Point | None, controls: Sequence[str], task: str) -> Figure:
    """Accuracy against the lag with 95 % bands: both systems, and the controls where they were measured."""
    cells = {lag: tally for (lag,), tally in sorted(merge(points, reference, "lag").items())}
    figure = _figure(8.6, 5.4)
    axes = figure.subplots()

    def draw(name: str, right: Callable[[Tally], int | None], color: str, marker: str, shift: float | None) -> None:
        known = [(lag, value, tally.problems) for lag, tally in cells.items() if (value := right(tally)) is not None]
        if not known:
            return
        lags = [lag + (shift or 0.0) for lag, _, _ in known]
        share = np.array([value / count for _, value, count in known])
        ends = np.array([wilson_interval(value, count) for _, value, count in known]).T
        if shift is None:
            axes.fill_between(lags, *ends, color=color, alpha=0.2, linewidth=0)
            axes.plot(lags, share, color=color, marker=marker, linewidth=2.6, markersize=8, label=name, zorder=3)
            return
        # Side by side on top of the systems: some controls are to lie exactly on one of them.
        axes.errorbar(
            lags,
            share,
            np.abs(ends - share),
            fmt=marker,
            color=color,
            markerfacecolor="white",
            markeredgewidth=1.6,
            markersize=6,
            linewidth=1.2,
            linestyle=":",
            label=f"control: {name}",
            zorder=5,
        )

    draw("with System 2", lambda tally: tally.correct.count("1"), SYSTEM_2, "o", None)
    draw("System 1 alone", lambda tally: tally.system1_correct.count("1"), SYSTEM_1, "s", None)
    apart = 0.12 * min(1.0, 1.0 / max(1, len(controls) - 1) * 2)
    for index, (color, marker, name) in enumerate(zip(_CONTROL_COLORS, "^Dv<>pX", controls, strict=False)):
        shift = (index - (len(controls) - 1) / 2) * apart
        draw(_name(name), lambda tally, name=name: tally.controls.get(name), color, marker, shift)  # type: ignore[misc]
    axes.set_xticks(list(cells))
    axes.set_xlabel("lag: tokens between asking for a plan and its target", fontsize=11)
    _accuracy_axis(axes)
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    others = {key: value for key, value in (reference or {}).items() if key != "lag"}
    each = min(tally.problems for tally in cells.values())
    axes.set_title(
        f"{_name(task)}: right answers against the lag\n{each} problems each, 95 % bands{_settings(others)}",
        fontsize=12.5,
        loc="left",
        color=INK,
    )
    return figure


def compute_figure(points: Sequence[Pooled], cheapest: Mapping[str, Any], task: str) -> Figure:
    """Every point's accuracy against its multiply-adds, and the settings that are named for the targets."""
    figure = _figure(9, 5.6)
    axes = figure.subplots()
    first = next(iter(points[0].point))
    values = _values(points, first)
    for point in points:
        low, high = point.interval
        shade = 0.15 + 0.75 * values.index(point.point[first]) / max(1, len(values) - 1)
        axes.errorbar(
            point.multiply_adds,
            point.accuracy,
            [[max(0.0, point.accuracy - low)], [max(0.0, high - point.accuracy)]],
            fmt="o",
            markersize=6,
            color=_map(shade),
            ecolor=LIGHT,
            zorder=3,
        )
    shown = values if len(values) <= 10 else [values[0], values[len(values) // 2], values[-1]]
    for value in shown:
        shade = 0.15 + 0.75 * values.index(value) / max(1, len(values) - 1)
        axes.plot([], [], "o", color=_map(shade), label=f"{_name(first)} {show(value)}")
    whole = Tally()
    for point in points:
        whole += point.tally
    axes.plot(
        whole.system1_multiply_adds / whole.problems,
        whole.system1_correct.count("1") / whole.problems,
        marker="s",
        markersize=9,
        linestyle="",
        color=SYSTEM_1,
        label="System 1 alone",
        zorder=4,
    )
    named: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for answer in cheapest["targets"]:
        axes.axhline(answer["target"], color=GREY, linewidth=0.9, linestyle=":", zorder=1)
        if answer["cheapest"] is not None:
            setting = _point(answer["cheapest"]["setting"]).replace(", ", "\n")
            named.setdefault(setting, (answer["cheapest"], []))[1].append(percent(answer["target"]))
    for setting, (found, targets) in named.items():
        axes.plot(
            found["multiply_adds"],
            found["measured"],
            marker="o",
            markersize=15,
            markerfacecolor="none",
            markeredgewidth=2,
            linestyle="",
            color=GOAL,
            label=f"cheapest for {', '.join(targets)}:\n{setting}",
            zorder=5,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("multiply-adds per answer, after the prompt", fontsize=11)
    _accuracy_axis(axes)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=0.7)
    axes.set_title(
        f"{_name(task)}: right answers against compute (95 % intervals)", fontsize=12.5, loc="left", color=INK
    )
    return figure


def settings_figure(points: Sequence[Pooled], reference: Point | None, task: str) -> Figure:
    """A panel per swept setting: both systems against its values."""
    keys = [key for key in points[0].point if len(_values(points, key)) > 1] or list(points[0].point)
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure = _figure(4.6 * columns, 0.7 + 3.6 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, key in zip(panels.flat, keys, strict=False):
        cells = {value: tally for (value,), tally in merge(points, reference, key).items()}
        values = [value for value in _values(points, key) if value in cells]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        # Values that were drawn from a range stand where they are; the few of a list stand side by side.
        drawn = numbers and (len(values) > MAX_CELLS or (reference is None and len(values) > 5))
        places = np.array(values, float) if drawn else np.arange(len(values), dtype=float)
        for name, color, shift, right in (
            ("System 1 alone", SYSTEM_1, 0.04, [cells[value].system1_correct.count("1") for value in values]),
            ("with System 2", SYSTEM_2, -0.04, [cells[value].correct.count("1") for value in values]),
        ):
            counts = [cells[value].problems for value in values]
            share = [one / count for one, count in zip(right, counts, strict=True)]
            ends = [wilson_interval(one, count) for one, count in zip(right, counts, strict=True)]
            errors = np.abs(np.array(ends).T - np.array(share))
            axes.errorbar(
                places if drawn else places + shift,
                share,
                errors,
                fmt="o-" if numbers and not drawn else "o",
                color=color,
                linewidth=1.8,
                markersize=5,
                label=name,
            )
        if not drawn:
            axes.set_xticks(places, [show(value) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_xlabel(_name(key), fontsize=11)
        _accuracy_axis(axes)
    for axes in panels.flat[len(keys) :]:
        axes.axis("off")
    panels.flat[0].legend(frameon=False, fontsize=9)
    how = "all others the checkpoint's own or the nearest" if reference is not None else "pooled over all others"
    figure.suptitle(f"{_name(task)}: right answers per setting, {how}", fontsize=12.5, color=INK, x=0.02, ha="left")
    return figure


# ------------------------------------------------------------------------------------------------------------- common


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _accuracy_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _map(shade: float) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](shade)


def _name(key: str) -> str:
    return key.replace("_", " ")


def _point(point: Point) -> str:
    return ", ".join(f"{_name(key)} {show(value)}" for key, value in point.items())


def _settings(others: Point) -> str:
    return f", {_point(others)}" if others else ""
