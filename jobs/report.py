"""One picture of a training run, from the reports of its stages."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reports = Mapping[str, Mapping[str, Any]]

TITLES = {"stage_1": "1 backbone", "stage_2": "2 world model", "stage_3": "3 critics", "stage_4": "4 plan writer"}


def draw_report(reports: Reports, path: Path, title: str) -> None:
    """Draws losses, value AUC, fidelity of the world model, branch accuracy, and how plans are followed.

    Args:
        reports: by stage, as a checkpoint holds them; missing stages leave their panels empty.
        path: of the PNG, replaced as a whole.
        title: above all panels.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(title, fontsize=15)
    _losses(axes[0, 0], reports)
    _value_auc(axes[0, 1], reports.get("stage_1", {}))
    _fidelity(axes[0, 2], reports.get("stage_2", {}))
    _branch_accuracy(axes[1, 0], reports)
    _following(axes[1, 1], reports.get("stage_4", {}))
    _summary(axes[1, 2], reports)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def trained(reports: Reports) -> list[tuple[str, Mapping[str, Any]]]:
    """The stages that have run, in their order; a checkpoint's report may say other things too."""
    return [(stage, reports[stage]) for stage in TITLES if stage in reports]


def series(report: Mapping[str, Any], prefix: str) -> dict[str, tuple[list[float], list[float]]]:
    """Figures of the curve whose name starts with ``prefix``: steps and values by the rest of the name."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for point in report.get("curve", []):
        for name, value in point.items():
            if name.startswith(prefix) and value is not None:
                steps, values = found.setdefault(name.removeprefix(prefix), ([], []))
                steps.append(point["step"])
                values.append(value)
    return found


def _losses(axes: Axes, reports: Reports) -> None:
    for stage, report in trained(reports):
        for name, (steps, values) in series(report, "loss").items():
            if name == "":
                axes.plot([step / steps[-1] for step in steps], values, label=TITLES[stage])
    axes.set(title="training loss", xlabel="share of the stage's steps", ylabel="loss")
    _finish(axes)


def _value_auc(axes: Axes, report: Mapping[str, Any]) -> None:
    for name, (steps, values) in series(report, "valid/value_auc/").items():
        axes.plot(steps, values, marker=".", label=name.replace("/layer_", ", layer "))
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set(title="stage 1: value AUC of each layer, held out", xlabel="step", ylabel="AUC", ylim=(0.0, 1.02))
    _finish(axes)


def _fidelity(axes: Axes, report: Mapping[str, Any]) -> None:
    for colour, (task, rows) in zip(_COLOURS, report.get("fidelity", {}).items(), strict=False):
        steps = [row["step"] for row in rows]
        axes.plot(
            steps, [row["policy_kl"] for row in rows], color=colour, marker="o", label=f"{task}: policy KL (nats)"
        )
        axes.plot(
            steps, [row["value_error"] for row in rows], color=colour, marker="x", ls="--", label=f"{task}: value error"
        )
    horizon = report.get("trust_horizon")
    if horizon is not None:
        axes.axvline(horizon, color="gray", linewidth=0.8, linestyle=":", label=f"trust horizon {horizon}")
    axes.set(title="stage 2: error of the imagination", xlabel="imagined steps")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _branch_accuracy(axes: Axes, reports: Reports) -> None:
    for colour, (task, rows) in zip(_COLOURS, reports.get("stage_2", {}).get("fidelity", {}).items(), strict=False):
        known = [row for row in rows if row["branch_accuracy"] is not None]
        axes.plot(
            [row["step"] for row in known],
            [row["branch_accuracy"] for row in known],
            color=colour,
            marker="o",
            label=f"{task}: after stage 2",
        )
        judged = reports.get("stage_3", {}).get("judgment", {}).get(task, {}).get("imagined_branch_accuracy")
        if judged is not None:
            axes.axhline(judged, color=colour, linestyle="--", label=f"{task}: after stage 3, from the answer's start")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.set(title="right before wrong attempts, imagined", xlabel="imagined steps", ylabel="pairs ranked right")
    axes.set_ylim(0.0, 1.02)
    _finish(axes)


def _following(axes: Axes, report: Mapping[str, Any]) -> None:
    for colour, (task, (steps, values)) in zip(_COLOURS, series(report, "valid/follow_rate/").items(), strict=False):
        axes.plot(steps, values, color=colour, marker="o", label=f"{task}: planned tokens followed")
    for colour, (task, (steps, values)) in zip(_COLOURS, series(report, "valid/after_kl/").items(), strict=False):
        axes.plot(steps, values, color=colour, marker="x", ls="--", label=f"{task}: KL left after the plan (nats)")
    axes.set(title="stage 4: plans written into the state, held out", xlabel="step")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _summary(axes: Axes, reports: Reports) -> None:
    axes.axis("off")
    axes.text(0, 1, "\n".join(summary_lines(reports)), va="top", family="monospace", fontsize=10)


def summary_lines(reports: Reports) -> Iterable[str]:
    """The run in figures."""
    yield f"{'stage':<14} {'steps':>6} {'seconds':>8} {'tokens/s':>9}"
    for stage, report in trained(reports):
        rate = f"{report['tokens_per_second']:,.0f}"
        yield f"{TITLES[stage]:<14} {report['steps']:>6} {report['seconds']:>8.0f} {rate:>9}"
    yield f"{'together':<14} {'':>6} {sum(report['seconds'] for _, report in trained(reports)):>8.0f}"
    judged = reports.get("stage_3", {})
    for row in judged.get("rounds", []):
        for task, systems in row["accuracy"].items():
            figures = ", ".join(f"System {system} {value:.2f}" for system, value in systems.items())
            yield f"round {row['round']}, {task}: {figures}"
    if judged.get("branch_accuracy") is not None:
        yield f"pairwise branch accuracy (worst): {judged['branch_accuracy']:.3f}"
    gates = reports.get("stage_4", {}).get("gates")
    if gates is not None and gates["open"]:
        yield f"gates open: {gates['written']:.2f} of the plans written,"
        yield f"  {gates['written_right']:.2f} of those right"
    elif gates is not None:
        yield "gates shut:"
        yield from textwrap.wrap(gates["reason"], 48, initial_indent="  ", subsequent_indent="  ")


_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="gray")
