"""Curves of a training as pictures, from the points that :func:`crsm.training.loop.run_stage` collects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from crsm.evaluation.figures import GOAL, INK, LIGHT, OTHERS, SYSTEM_1, SYSTEM_2, bare_axes, new_figure

_COLOURS = (SYSTEM_2, SYSTEM_1, GOAL, *OTHERS)


def series(curve: Iterable[Mapping[str, float | None]], prefix: str) -> dict[str, tuple[list[float], list[float]]]:
    """Figures of a curve whose name starts with ``prefix``: steps and values by the rest of the name."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for point in curve:
        for name, value in point.items():
            step = point["step"]
            if name.startswith(prefix) and value is not None and step is not None:
                steps, values = found.setdefault(name.removeprefix(prefix), ([], []))
                steps.append(step)
                values.append(value)
    return found


def curves_figure(curve: Sequence[Mapping[str, float | None]], panels: Mapping[str, Sequence[str]]) -> Figure:
    """Panels side by side, each with the figures whose names start with one of its prefixes.

    Args:
        curve: ``StageResult.curve``, or the ``curve`` of a stage in a checkpoint's report.
        panels: title → prefixes of names.

    Raises:
        ValueError: a prefix that no figure has.
    """
    figure = new_figure(5.2 * len(panels), 3.6)
    figure.set_layout_engine("constrained")
    for axes, (title, prefixes) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        lines: dict[str, Any] = {}
        for prefix in prefixes:
            found = series(curve, prefix)
            if not found:
                names = sorted({name for point in curve for name in point})
                raise ValueError(f"prefix {prefix!r} begins no name; allowed: {', '.join(names)}")
            # What all names of a panel begin with says nothing.
            lines |= {rest if len(prefixes) == 1 else prefix + rest: line for rest, line in found.items()}
        for place, (name, (steps, values)) in enumerate(lines.items()):
            color = _COLOURS[place % len(_COLOURS)]
            marker = "o" if len(steps) < 20 else None
            axes.plot(steps, values, color=color, linewidth=2, marker=marker, markersize=4, label=name)
        axes.set_title(title, fontsize=12, loc="left", color=INK)
        axes.set_xlabel("step", fontsize=10)
        axes.grid(color=LIGHT, linewidth=0.8)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        bare_axes(axes)
    return figure
