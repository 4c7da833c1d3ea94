"""From answers to figures: every system's measures, and what sets it apart from System 1 on the same problems. Pure.

Differences are paired by problem: an exact McNemar test where a measure is right or wrong per problem, and a bootstrap
interval that resamples problems, always from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crsm.evaluation.benchmarks.base import Benchmark, Measure, Record
from crsm.evaluation.statistics import (
    bootstrap_difference,
    bootstrap_interval,
    bootstrap_ratio,
    mcnemar,
    wilson_interval,
)

Figures = dict[str, Any]


def tabulate(
    benchmark: Benchmark,
    records: Mapping[str, Sequence[Record]],
    plans: Mapping[str, Mapping[str, int]],
    resamples: int,
) -> Figures:
    """The figures of a benchmark.

    Args:
        benchmark: what was asked.
        records: by system, ``system1`` among them: all answers, in order.
        plans: by system, counts of what became of its plans.
        resamples: of every bootstrap interval.

    Returns:
        ``kind``, ``problems``, ``digest``, and by system ``measures`` (``value``, ``interval``, and beside System 1
        ``difference``, its ``difference_interval``, ``mcnemar_p``), ``tokens``, ``changed``: answers that are not
        System 1's bit for bit, and for a planned system ``plans`` with ``plan_hit_rate``.
    """
    base = benchmark.measures(records["system1"])
    systems: dict[str, Figures] = {}
    for name, answers in records.items():
        measures = {
            measure: _describe(found, None if name == "system1" else base[measure], resamples)
            for measure, found in benchmark.measures(answers).items()
        }
        systems[name] = {"measures": measures, "tokens": sum(record["tokens"] for record in answers)}
        if name != "system1":
            pairs = zip(answers, records["system1"], strict=True)
            systems[name]["changed"] = sum(mine["bits"] != theirs["bits"] for mine, theirs in pairs)
            counted = dict(plans.get(name, {}))
            rate = counted.get("hits", 0) / counted["settled"] if counted.get("settled") else None
            systems[name]["plans"] = counted | {"plan_hit_rate": rate}
        if "bits_per_token" in measures:
            systems[name]["perplexity"] = 2.0 ** measures["bits_per_token"]["value"]
    return {"kind": benchmark.kind, "problems": len(benchmark), "digest": benchmark.digest, "systems": systems}


def _describe(mine: Measure, base: Measure | None, resamples: int) -> Figures:
    figures: Figures = {"value": mine.value, "interval": _interval(mine, resamples)}
    if base is None:
        return figures
    figures["difference"] = mine.value - base.value
    if mine.bottom_M is None:
        figures["difference_interval"] = bootstrap_difference(mine.top_M, base.top_M, samples=resamples)
    else:
        figures["difference_interval"] = bootstrap_ratio(mine.top_M - base.top_M, mine.bottom_M, samples=resamples)
    binary = mine.is_binary and base.is_binary
    figures["mcnemar_p"] = mcnemar(base.top_M, mine.top_M) if binary else None
    return figures


def _interval(measure: Measure, resamples: int) -> tuple[float, float]:
    if measure.is_binary:
        return wilson_interval(int(measure.top_M.sum()), len(measure.top_M))
    if measure.bottom_M is None:
        return bootstrap_interval(measure.top_M, samples=resamples)
    return bootstrap_ratio(measure.top_M, measure.bottom_M, samples=resamples)


# ------------------------------------------------------------------------------------------------------------- in words


def rows(figures: Figures) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """A table per measure of a benchmark: its name, its header, and a row per system."""
    systems: Mapping[str, Figures] = figures["systems"]
    for measure in systems["system1"]["measures"]:
        header = ["", measure, "95 % interval", "minus System 1", "95 % interval", "McNemar p", "plan hits", "changed"]
        body = []
        for name, system in systems.items():
            found = system["measures"][measure]
            cells = [_shown(name), f"{found['value']:.3f}", _range(found["interval"])]
            if name == "system1":
                body.append([*cells, "", "", "", "", ""])
                continue
            p, rate = found["mcnemar_p"], system["plans"]["plan_hit_rate"]
            cells += [f"{found['difference']:+.3f}", _range(found["difference_interval"], "+.3f")]
            cells += ["" if p is None else f"{p:.2g}", "" if rate is None else f"{rate:.3f}"]
            body.append([*cells, f"{system['changed']:,}"])
        yield measure, header, body


def compute_rows(curves: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and rows of accuracy against compute."""
    header = ["method, budget", "accuracy", "95 % interval", "multiply-adds", "costs as samples"]
    body = [
        [
            f"{method.replace('_', ' ')}, {point['budget']}",
            f"{point['accuracy']:.3f}",
            _range(point["interval"]),
            f"{point['multiply_adds'] / 1e6:.2f} M",
            f"{point['samples']:.2f}",
        ]
        for method, points in curves["methods"].items()
        for point in points
    ]
    return header, body


def report(title: str, results: Mapping[str, Any], command: str) -> str:
    """All figures as Markdown. The same answers give the same text, whoever gave them, and in how many starts."""
    return "\n".join(_lines(title, results, command)) + "\n"


def _lines(title: str, results: Mapping[str, Any], command: str) -> Iterator[str]:
    checkpoint = results["checkpoint"]
    yield f"# {title}"
    yield ""
    yield (
        f"`{checkpoint['name']}` (weights {checkpoint['weights']}), seed {results['seed']}, lag {results['lag']}, "
        "virtual clock. Intervals are Wilson's where an answer is right or wrong, and bootstrapped over problems "
        "otherwise; differences are paired by problem. *Changed*: answers that are not System 1's, bit for bit."
    )
    yield ""
    yield f"    {command}"
    for name, figures in results["benchmarks"].items():
        yield ""
        yield f"## {name}"
        yield ""
        yield f"{figures['problems']:,} {'windows' if figures['kind'] == 'text' else 'problems'}; {_asked(figures)}."
        for _, header, body in rows(figures):
            yield ""
            yield from _table(header, body)
        if figures["kind"] == "text":
            shown = [f"{_shown(name)} {system['perplexity']:.2f}" for name, system in figures["systems"].items()]
            yield ""
            yield f"Perplexity per token: {', '.join(shown)}."
        if "compute" in figures:
            yield ""
            yield "Accuracy against compute after the prompt, one plan per answer:"
            yield ""
            yield from _table(*compute_rows(figures["compute"]))


def _shown(system: str) -> str:
    return {"system1": "System 1", "system2": "System 2"}.get(system, system.replace("_", " "))


def _asked(figures: Figures) -> str:
    asked = figures["settings"]
    parts = [f"split {asked['split']}"] if figures["kind"] != "text" else [f"windows of {asked['window']:,} tokens"]
    if asked["shots"]:
        parts.append(f"{asked['shots']} solved examples before each")
    if asked["samples"] > 1 and figures["kind"] == "answers":
        parts.append(f"{asked['samples']} samples at temperature {asked['temperature']:g}")
    return ", ".join(parts)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *body):
        yield "| " + " | ".join(cells) + " |"


def _range(interval: Sequence[float], form: str = ".3f") -> str:
    return f"{interval[0]:{form}} … {interval[1]:{form}}"
