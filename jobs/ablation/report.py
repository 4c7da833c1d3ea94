"""What a sweep found, in words: ``report.md`` and the lines on the terminal. Pure but for the printing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.ablation.settings import AblationConfig
from jobs.checkpoints import print_table
from jobs.command import commit

_CAPTIONS = {
    "heat_map.png": "Right answers by two settings",
    "lag.png": "Right answers against the lag, with 95 % bands and the controls",
    "compute.png": "Right answers against multiply-adds per answer",
    "settings.png": "Right answers per setting",
}


def report(results: Mapping[str, Any], ablation: AblationConfig, pictures: Sequence[str]) -> str:
    """The Markdown report."""
    return "\n".join(_lines(results, ablation, pictures)) + "\n"


def _lines(results: Mapping[str, Any], ablation: AblationConfig, pictures: Sequence[str]) -> Iterator[str]:
    checkpoint, points = results["checkpoint"], results["points"]
    problems = sum(point["problems"] for point in points)
    yield f"# Ablation {ablation.name}"
    yield ""
    yield (
        f"`{checkpoint['name']}` (weights {checkpoint['weights']}) on `{results['task']}`: "
        f"{_count(len(points), 'point')}, {_count(len(ablation.seeds), 'seed')}, {_count(results['trials'], 'trial')}, "
        f"{problems:,} problems in all. A seed is another set of fresh test problems. Virtual clock: no figure depends "
        "on the machine."
    )
    yield ""
    yield f"    {results['command']}"
    yield ""
    yield f"Code: {commit()}. Every trial is a row of `table.parquet` and `table.csv`."
    yield ""
    for name in pictures:
        yield f"![{_CAPTIONS[name]}]({name})"
        yield ""
    yield "## What must hold"
    yield ""
    for line in verdicts(results):
        yield f"* {line}"
    yield ""
    trend = results["lag_trend"]
    if trend is not None and trend["groups"] and trend["groups"][0]["settings"]:
        yield from _table(*_trend_cells(trend))
        yield ""
    yield "## The cheapest setting for a target"
    yield ""
    for line in recommendations(results):
        yield f"* {line}"
    yield ""
    yield (
        "From a logistic regression over all points (main effects, squares of numbers, pairwise interactions); a "
        "target is reached where the lower end of the fit's 95 % interval reaches it. The fit is at most "
        f"{results['cheapest']['largest_residual']:.3f} away from what was measured. Cost is multiply-adds per answer "
        "after the prompt, at the most that the searches may have spent; it says nothing about waiting."
    )
    yield ""
    yield "## All points"
    yield ""
    yield from _table(*point_cells(results))


def _table(header: Sequence[str], *body: Sequence[str]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *body):
        yield "| " + " | ".join(cells) + " |"


def _trend_cells(trend: Mapping[str, Any]) -> Iterator[list[str]]:
    """A header and a row per group of equal other settings."""
    yield [*trend["groups"][0]["settings"], "largest rise", "paired 95 % interval", "lags", "accuracies", "holds"]
    for group in trend["groups"]:
        rise = group["largest_rise"]
        low, high = rise["interval"]
        yield [
            *(show(value) for value in group["settings"].values()),
            f"{rise['rise']:+.3f}",
            f"{low:+.3f} … {high:+.3f}",
            f"{rise['lags'][0]} → {rise['lags'][1]}",
            f"{rise['accuracies'][0]:.3f} → {rise['accuracies'][1]:.3f}",
            "yes" if group["holds"] else "no",
        ]


def verdicts(results: Mapping[str, Any]) -> Iterator[str]:
    """The checks in a line each."""
    silence, trend = results["silence"], results["lag_trend"]
    if silence["points"]:
        verdict = "yes" if silence["identical"] else f"NO, not at {silence['broken'][0]}"
        yield (
            "Where plans cannot write (injection rate 0), all tokens and log-probabilities are System 1's, bit for "
            f"bit: {verdict} ({silence['points']} points, {silence['problems']:,} problems)."
        )
    else:
        yield "No point of this sweep keeps plans from writing (injection rate 0): nothing to compare with System 1."
    if trend is None:
        return
    broken = [group for group in trend["groups"] if not group["holds"]]
    if not broken:
        yield (
            "Accuracy does not rise with the lag by more than its 95 % interval, whatever the other settings: at no "
            "lag does it lie above the interval of a shorter one, and the paired difference above 0."
        )
    else:
        settings = "; ".join(_words(group["settings"]) for group in broken)
        yield (
            f"Accuracy does not rise with the lag by more than its 95 % interval, but for {len(broken)} of "
            f"{len(trend['groups'])} groups: {settings}."
        )


def recommendations(results: Mapping[str, Any]) -> Iterator[str]:
    """The cheapest setting for each target in a line."""
    for answer in results["cheapest"]["targets"]:
        cheapest, longest = answer["cheapest"], answer["longest_lag"]
        if cheapest is None:
            best = results["cheapest"]["best"]
            yield (
                f"{answer['target']:.0%}: no setting reaches it. The best is {_words(best['setting'])} with "
                f"{best['measured']:.3f} (fit {best['fitted']:.3f})."
            )
            continue
        line = f"{answer['target']:.0%}: {_describe(cheapest)}; {answer['reached_by']} settings reach it."
        if longest is not None and longest["setting"] != cheapest["setting"]:
            line += f" With the longest lag: {_describe(longest)}."
        yield line


def _describe(found: Mapping[str, Any]) -> str:
    low, high = found["fitted_interval"]
    return (
        f"{_words(found['setting'])}: {found['multiply_adds'] / 1e6:.2f} M multiply-adds "
        f"({found['over_system1']:.1f} × System 1), measured {found['measured']:.3f}, "
        f"fit {found['fitted']:.3f} ({low:.3f} … {high:.3f})"
    )


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {show(value)}" for key, value in settings.items()) or "all settings"


def show(value: Any) -> str:
    """A setting's value as people read it; the table has it in full."""
    return f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def point_cells(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """A header and a row per point."""
    points = results["points"]
    names = list(points[0])
    settings = names[: names.index("problems")]
    controls = [name for name in names if name.startswith("control_")]
    yield [
        *settings,
        "accuracy",
        "95 % interval",
        "over System 1",
        "plan hits",
        "M multiply-adds",
        *(name.removeprefix("control_").replace("_", " ") for name in controls),
    ]
    for point in points:
        hits = point["plan_hit_rate"]
        yield [
            *(show(point[name]) for name in settings),
            f"{point['accuracy']:.3f}",
            f"{point['accuracy_low']:.3f} … {point['accuracy_high']:.3f}",
            f"{point['difference']:+.3f}",
            "" if hits is None else f"{hits:.2f}",
            f"{point['multiply_adds_per_answer'] / 1e6:.2f}",
            *("" if point[name] is None else f"{point[name]:.3f}" for name in controls),
        ]


def print_summary(results: Mapping[str, Any]) -> None:
    """Table and verdicts on standard error."""
    header, *body = point_cells(results)
    print_table(f"{results['task']}: {results['trials']} trials", header, body)
    for line in (*verdicts(results), *recommendations(results)):
        print(line, file=sys.stderr)
    print(f"table, pictures and report in {results['output']}", file=sys.stderr)
