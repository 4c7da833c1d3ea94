"""How a figure is written in LaTeX, and the macros through which the prose names figures.

A macro's name is letters only, as LaTeX wants it. A macro whose result file is not there shows a mark in the text; the
build names the file and the command that makes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.manuscript.sources import HYPOTHESES, SOURCES, TASKS, VARIANTS, Record

Results = Mapping[str, Record]
Value = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Macro:
    """A number of the prose."""

    source: str
    """The result file that it comes from."""
    value: Value
    """From the file's record to LaTeX."""


# ------------------------------------------------------------------------------------------------------------ figures


def share(value: float) -> str:
    """A share or an accuracy, three digits after the point."""
    return f"{value:.3f}"


def short(value: float) -> str:
    return f"{value:.2f}"


def count(value: float) -> str:
    """A whole number with thin groups of thousands."""
    return f"{value:,.0f}".replace(",", "{,}")


def figure(value: float | None, digits: int = 3) -> str:
    """Some significant digits, as a power of ten where it would be long."""
    if value is None or not math.isfinite(value):
        return "--"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return count(value)
    if abs(value) < 0.001:
        return power(value, digits - 1)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def power(value: float, digits: int = 1) -> str:
    """A power of ten in math mode: ``$4.7\\times10^{-97}$``."""
    mantissa, exponent = f"{value:.{max(0, digits - 1)}e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


def p_value(value: float) -> str:
    if value == 0:  # smaller than any number of double precision
        return r"$<\!10^{-300}$"
    return figure(value, 2) if value >= 0.01 else power(value)


def millions(value: float) -> str:
    return f"{value / 1e6:.1f}"


def times(value: float | None) -> str:
    return "--" if value is None else rf"{figure(value, 2 if value < 10 else 3)}$\times$"


def text(value: object) -> str:
    """Plain text with LaTeX's own characters escaped."""
    escaped = re.sub(r"([#$%&_{}])", r"\\\1", str(value).replace("\\", r"\textbackslash "))
    return escaped.replace("~", r"\textasciitilde ").replace("×", r"$\times$").replace("µ", r"$\mu$")


def task_name(task: str) -> str:
    return task.replace("_", "-")


def word(name: str) -> str:
    """``path_star`` → ``PathStar``."""
    return "".join(part.capitalize() for part in name.split("_"))


_DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def digit(value: int) -> str:
    return "".join(_DIGITS[int(place)] for place in str(value))


# ------------------------------------------------------------------------------------------------------------- look-up


def at_lag(results: Mapping[str, Any], lag: int) -> Any:
    """The comparison at one lag of ``benchmark_reasoning``'s results."""
    for compared in results.get("lags", [results]):
        if compared["lag"] == lag:
            return compared
    raise KeyError(f"no lag {lag}")


def row_named(results: Mapping[str, Any], *starts: str) -> Any:
    """The row of a speed result whose name starts so."""
    for row in results["rows"]:
        if any(row["name"].startswith(start) for start in starts):
            return row
    raise KeyError(f"no row {starts[0]!r}")


def point(results: Mapping[str, Any], lag: int, rate: float) -> Any:
    """A cell of the sweep over lag and injection rate."""
    for cell in results["points"]:
        if cell["lag"] == lag and cell["injection_rate"] == rate:
            return cell
    raise KeyError(f"no point at lag {lag}, rate {rate}")


def bought(results: Mapping[str, Any], method: str, budget: int) -> Any:
    """A point of accuracy against compute."""
    for cell in results["compute"]["methods"][method]:
        if cell["budget"] == budget:
            return cell
    raise KeyError(f"no {method} with budget {budget}")


def transported(results: Mapping[str, Any], task: str, late: int, layer: int) -> Any:
    for row in results["tasks"][task]["rows"]:
        if row["late"] == late and row["layer"] == layer:
            return row
    raise KeyError(f"no row for {late} tokens, layer {layer}")


# -------------------------------------------------------------------------------------------------------------- macros


def macros() -> dict[str, Macro]:
    """All macros of the prose, by name."""
    from jobs.manuscript.seven import add_seven_kinds  # which writes its figures with this module's functions

    table: dict[str, Macro] = {}

    def add(name: str, source: str, value: Value) -> None:
        assert source in SOURCES, source
        assert name not in table and re.fullmatch("[A-Za-z]+", name), name
        table[name] = Macro(source, value)

    _add_model(add)
    _add_reasoning(add)
    _add_compute(add)
    add_seven_kinds(add)
    _add_writes(add)
    _add_speed(add)
    _add_gsm8k(add)
    return table


Add = Callable[[str, str, Value], None]


def _add_model(add: Add) -> None:
    def parameters(part: str) -> Value:
        return lambda r: count(r["results"]["parameters"][part])

    for part in ("backbone", "world_model", "writer"):
        add(f"Parameters{word(part)}", "training", parameters(part))
    add("ParametersTotal", "training", lambda r: f"{sum(r['results']['parameters'].values()) / 1e6:.1f}")
    add("ParametersBackboneMillions", "training", lambda r: f"{r['results']['parameters']['backbone'] / 1e6:.2f}")
    add("Machine", "training", lambda r: text("{cores} cores of an {cpu}, torch {torch}".format(**r["machine"])))
    add("TrainingMinutes", "training", lambda r: f"{r['results']['wall_seconds'] / 60:.0f}")
    add("TrustHorizon", "training", lambda r: str(r["results"]["stages"]["stage_2"]["trust_horizon"]))
    add("BranchAccuracy", "training", lambda r: share(r["results"]["stages"]["stage_3"]["branch_accuracy"]))

    def gates(record: Any) -> Any:
        return record["results"]["stages"]["stage_4"]["gates"]

    add("GatePlans", "training", lambda r: count(gates(r)["plans"]))
    add("GateWritten", "training", lambda r: short(gates(r)["written"]))
    add("GateRight", "training", lambda r: short(gates(r)["written_right"]))
    add("GateThreshold", "training", lambda r: rf"${gates(r)['threshold']:.2f}$")
    add("GateAuc", "training", lambda r: short(gates(r)["auc"]))
    add("GateEce", "training", lambda r: share(gates(r)["ece"]))
    for name, path in _SETTINGS.items():
        add(name, "training", setting(path))


_SETTINGS = {
    "Simulations": "search.simulations",
    "SearchActions": "search.num_actions",
    "SearchDepth": "search.max_depth",
    "InjectionRate": "deliberation.injection_rate",
    "PlanLength": "deliberation.plan_length",
    "MaxLag": "deliberation.max_lag",
    "LateDecay": "deliberation.late_decay",
    "GateBar": "stage_3.gate_accuracy",
    "WriterRank": "model.writer.rank",
    "Layers": "model.backbone.n_layer",
    "Width": "model.backbone.d_model",
    "WorldWidth": "model.world_model.width",
    "StateSize": "model.backbone.d_state",
    "UncertaintyPenalty": "model.critic.uncertainty_penalty",
}
"""Settings of the shipped checkpoint that the prose names."""


def setting(path: str) -> Value:
    def value(record: Any) -> str:
        found = record["config"]
        for key in path.split("."):
            found = found[key]
        return str(found)

    return value


def _add_reasoning(add: Add) -> None:
    def system(task: str, lag: int, which: str) -> tuple[str, Value]:
        return task, lambda r: share(at_lag(r["results"], lag)[which]["accuracy"])

    def control(lag: int, name: str) -> Value:
        return lambda r: share(at_lag(r["results"], lag)["controls"][name]["accuracy"])

    def hits(lag: int) -> Value:
        return lambda r: short(at_lag(r["results"], lag)["plan_hit_rate"])

    add("Problems", "path_star", lambda r: str(r["results"]["problems"]))
    for lag in (0, 1, 2):
        add(f"PathStarLag{digit(lag)}", *system("path_star", lag, "system2"))
        add(f"PathStarUntrainedLag{digit(lag)}", "path_star", control(lag, "untrained_planner"))
        add(f"PathStarHitsLag{digit(lag)}", "path_star", hits(lag))
    add("PathStarAlone", *system("path_star", 1, "system1"))
    add("PathStarP", "path_star", lambda r: p_value(at_lag(r["results"], 1)["mcnemar_p"]))
    add("TreePathAlone", *system("tree_path", 1, "system1"))
    add("TreePathLagOne", *system("tree_path", 1, "system2"))
    add("TreePathP", "tree_path", lambda r: p_value(at_lag(r["results"], 1)["mcnemar_p"]))
    for name in ("other_problem", "random_write", "silent_tokens", "time_shifted", "oracle"):
        add(f"PathStar{word(name)}", "path_star", control(1, name))
        add(f"TreePath{word(name)}", "tree_path", control(1, name))
    add("PathStarShiftedLagZero", "path_star", control(0, "time_shifted"))
    for lag in (0, 2, 3, 4, 6):
        add(f"TreePathLag{digit(lag)}", "tree_path_lags", system("tree_path", lag, "system2")[1])
    add("TreePathLagThreeP", "tree_path_lags", lambda r: p_value(at_lag(r["results"], 3)["mcnemar_p"]))
    add("TreePathHitsLagSix", "tree_path_lags", lambda r: short(at_lag(r["results"], 6)["plan_hit_rate"]))
    for task in TASKS:
        for variant, _, _ in VARIANTS:
            for lag in (0, 1, 2):
                name = f"{word(variant)}{word(task)}Lag{digit(lag)}"
                add(name, f"{variant}_{task}", system(task, lag, "system2")[1])
        for hypotheses in HYPOTHESES:
            add(
                f"{word(task)}Hits{digit(hypotheses)}",
                f"hypotheses_{task}_{hypotheses}",
                lambda r: short(r["results"]["plan_hit_rate"]),
            )
    _add_sweep(add)


def _add_sweep(add: Add) -> None:
    source = "ablate_lag_rate"
    add("SweepCells", source, lambda r: str(len(r["results"]["points"])))
    add("SweepProblems", source, lambda r: count(r["results"]["points"][0]["problems"]))
    add("SweepAlone", source, lambda r: share(r["results"]["points"][0]["system1_accuracy"]))
    add("SweepSilent", source, lambda r: count(r["results"]["silence"]["problems"]))

    def in_time(record: Any) -> list[float]:
        """Where the plan comes before the decision, and the rate is neither weak nor strong."""
        points = record["results"]["points"]
        return [cell["accuracy"] for cell in points if cell["lag"] <= 2 and 0.02 <= cell["injection_rate"] <= 0.2]

    def cell(lag: int, rate: float, key: str) -> Value:
        return lambda r: share(point(r["results"], lag, rate)[key])

    add("SweepWorst", source, lambda r: share(min(in_time(r))))
    add("SweepBest", source, lambda r: share(max(in_time(r))))
    for name, rate in (("Weak", 0.01), ("Strong", 0.5)):
        for lag in (0, 1, 2):
            add(f"Sweep{name}Lag{digit(lag)}", source, cell(lag, rate, "accuracy"))
    add("SweepLateOracle", source, cell(3, 0.05, "control_oracle"))
    add("SweepLate", source, cell(3, 0.05, "accuracy"))


def _add_compute(add: Add) -> None:
    def cell(method: str, budget: int) -> Value:
        return lambda r: share(bought(r["results"], method, budget)["accuracy"])

    def cost(budget: int) -> Value:
        return lambda r: f"{bought(r['results'], 'system_2', budget)['samples']:.1f}"

    for task in TASKS:
        source = f"compute_{task}"
        for method, name in (("system_2", "Plan"), ("best_of", "Best")):
            for budget in (8, 16, 32, 64) if method == "system_2" else (4, 8, 16):
                add(f"{word(task)}{name}{digit(budget)}", source, cell(method, budget))
        add(f"{word(task)}Beam", source, cell("beam_search", 16))
        add(f"{word(task)}Majority", source, cell("self_consistency", 16))
    for budget in (8, 16, 64):
        add(f"PlanCost{digit(budget)}", "compute_path_star", cost(budget))
    add("CostSimulation", "compute_path_star", lambda r: short(r["results"]["compute"]["costs"]["simulation"] / 1e6))
    add("CostToken", "compute_path_star", lambda r: short(r["results"]["compute"]["costs"]["token"] / 1e6))


def _add_writes(add: Add) -> None:
    def audit(task: str, line: str, key: str, form: Callable[[float], str]) -> Value:
        def value(record: Any) -> str:
            (group,) = (v for k, v in record["results"]["tasks"][task]["audit"].items() if k.startswith(line))
            return form(group[key])

        return value

    def stable(row: int, key: str, digits: int) -> Value:
        return lambda r: f"{r['results']['stability'][row][key]:.{digits}f}"

    add("FollowRight", "steering", audit("path_star", "right", "follow_rate", share))
    add("FollowWrongTree", "steering", audit("tree_path", "wrong", "follow_rate", share))
    add("AloneWrongTree", "steering", audit("tree_path", "wrong", "alone", share))
    add("AfterKlWorst", "steering", audit("tree_path", "wrong", "after_kl", lambda value: figure(value, 2)))
    for row, name in enumerate(("Writer", "Random", "Adversarial")):
        add(f"Ratio{name}", "steering", stable(row, "max_ratio", 7))
        add(f"MeanRatio{name}", "steering", stable(row, "mean_ratio", 3))
        add(f"Growth{name}", "steering", stable(row, "max_growth", 3))
    add("StabilityWrites", "steering", lambda r: count(r["results"]["stability"][0]["writes"]))

    def carried(late: int, layer: int, key: str, form: Callable[[float], str]) -> Value:
        return lambda r: form(transported(r["results"], "path_star", late, layer)[key])

    def two(value: float) -> str:
        return figure(value, 2)

    add("CarriedFirst", "transport", carried(8, 0, "carried", two))
    add("FixedFirst", "transport", carried(8, 0, "fixed", two))
    add("RawFirst", "transport", carried(8, 0, "raw", two))
    add("LateFirst", "transport", carried(8, 0, "late_write", two))
    add("LateOneFirst", "transport", carried(1, 0, "late_write", two))
    add("CarriedSecond", "transport", carried(8, 1, "carried", two))
    add("CarriedThird", "transport", carried(8, 2, "carried", two))
    add("CarriedLastSoon", "transport", carried(1, 3, "carried", two))
    add("LeftFirst", "transport", carried(4, 0, "withdrawn", two))
    add("CutFirst", "transport", carried(4, 0, "cut", two))
    add("NormAfterFirst", "transport", carried(4, 0, "norm_withdrawn", share))


def _add_speed(add: Add) -> None:
    def ratio(source: str, *starts: str) -> None:
        name, start = starts[0], starts[1:]
        add(name, source, lambda r: figure(row_named(r["results"], *start)["ratio"], 2))

    ratio("speed_search", "SearchRatioOne", "search, 1 tree, 64 simulations")
    ratio("speed_search", "SearchRatioMany", "search, 64 trees")
    add(
        "DeliberationMs",
        "speed_search",
        lambda r: f"{row_named(r['results'], 'deliberation')['ours']:.1f}",
    )
    ratio("nonblocking", "RateOne", "nano, 1 stream: rate")
    ratio("nonblocking", "RateMany", "nano, 32 streams: rate")
    ratio("nonblocking", "RateStalled", "nano, 1 stream, planners stalled: rate")
    ratio("nonblocking", "RateLarge", "10M, 1 stream, lag 32: plans are in time: rate")
    ratio("nonblocking", "RateLargeStalled", "10M, 1 stream, planners stalled: rate")
    add("LiveAccuracy", "pool", lambda r: share(row_named(r["results"], "path_star")["ours"]))
    add("LiveAlone", "pool", lambda r: share(row_named(r["results"], "path_star")["peer"]))
    add(
        "LiveHits",
        "pool",
        lambda r: share(row_named(r["results"], "path_star at 50 tokens/s, lag 1, wall clock: plan hit rate")["ours"]),
    )
    add("ChaosKills", "chaos", lambda r: str(r["results"]["planner_kills"]))
    add("ChaosBad", "chaos", lambda r: count(sum(r["results"]["bad_plans"].values())))
    add("ChaosTokens", "chaos", lambda r: count(r["results"]["tokens"]))
    add("ChaosViolations", "chaos", lambda r: str(r["results"]["violations"]))
    add("ChaosHits", "chaos", lambda r: short(r["results"]["hit_rate"]["overall"]))
    add("ChaosCalm", "chaos", lambda r: short(r["results"]["hit_rate"]["calm"]))
    add("ChaosSlowest", "chaos", lambda r: f"{r['results']['recovery_seconds']['max']:.0f}")


def _add_gsm8k(add: Add) -> None:
    def stage(record: Any, number: int) -> Any:
        return record["results"]["stages"][f"stage_{number}"]

    source = "gsm8k_training"
    add("GsmParameters", source, lambda r: f"{r['results']['parameters']['backbone'] / 1e6:.1f}")
    add("GsmPerplexity", source, lambda r: f"{stage(r, 1)['valid/perplexity/gsm8k']:.1f}")
    add("GsmAuc", source, lambda r: short(stage(r, 3)["judgment"]["gsm8k"]["auc"]))
    add("GsmBranch", source, lambda r: short(stage(r, 3)["branch_accuracy"]))
    add("GsmHorizon", source, lambda r: str(stage(r, 2)["trust_horizon"]))
    add("GsmAccuracy", "gsm8k", lambda r: short(r["results"]["system2"]["accuracy"]))
    add("GsmProblems", "gsm8k", lambda r: str(r["results"]["problems"]))
    add("GsmHigh", "gsm8k", lambda r: share(r["results"]["system2"]["interval"][1]))


def macro_file(results: Results) -> str:
    """``generated/numbers.tex``: every macro, with a mark in the place of those whose result file is not there."""
    lines = ["% Made by python -m jobs.paper generate. Do not edit."]
    for name, macro in macros().items():
        record = results.get(macro.source)
        value = rf"\missing{{{text(macro.source)}}}" if record is None else macro.value(record)
        lines.append(rf"\newcommand{{\{name}}}{{{value}\xspace}}")
    return "\n".join(lines) + "\n"
