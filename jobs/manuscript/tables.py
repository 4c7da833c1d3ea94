"""The tables, from results to LaTeX. A table whose result file is not there says so, with the command that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.manuscript import seven, speed
from jobs.manuscript.numbers import Results, at_lag, count, figure, p_value, share, short, task_name, text
from jobs.manuscript.sources import HYPOTHESES, KINDS, PAIRED, SOURCES, TASKS, VARIANTS, Source
from jobs.manuscript.tabular import rule, tabular

CONTROLS = (
    ("gate_zero", "gates zero"),
    ("random_write", "random write of equal norm"),
    ("other_problem", "another problem's plan"),
    ("time_shifted", "the plan of two positions before"),
    ("untrained_planner", "untrained world model"),
    ("oracle", "the solution as the plan"),
    ("silent_tokens", "the plan's tokens said aloud"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """One generated table."""

    sources: tuple[str, ...]
    draw: Callable[[Results], str]


def table_file(table: Table, results: Results) -> str:
    """LaTeX of a table, or of what is missing for it."""
    missing = [SOURCES[name] for name in table.sources if name not in results]
    return "% Made by python -m jobs.paper generate. Do not edit.\n" + (
        placeholder(missing) if missing else table.draw(results)
    )


def placeholder(missing: Sequence[Source]) -> str:
    """In the place of a table or figure: which files are missing, and the command that makes each."""
    lines = [
        rf"\emph{{No result file}} \texttt{{{text(source.name)}.json}}. It is made by\\"
        + "\n"
        + rf"\texttt{{python -m jobs.paper measure {text(source.name)}}}"
        for source in missing
    ]
    return (
        r"\fbox{\begin{minipage}{0.92\linewidth}\raggedright\small " + "\\\\[2pt]\n".join(lines) + "\\end{minipage}}\n"
    )


# ----------------------------------------------------------------------------------------------------------- reasoning


def reasoning(results: Results) -> str:
    """Both systems and all controls: path-star at three lags, tree-path at one."""
    columns = [at_lag(results["path_star"]["results"], lag) for lag in (0, 1, 2)]
    columns.append(at_lag(results["tree_path"]["results"], 1))
    lines: list[Sequence[str] | str] = [
        ["", r"\multicolumn{3}{c}{path-star}", "tree-path"],
        r"\cmidrule(lr){2-4}\cmidrule(lr){5-5}",
        ["", *(f"lag {column['lag']}" for column in columns)],
        rule(),
        ["System 1", *(_with_interval(column["system1"]) for column in columns)],
        ["System 2", *(_with_interval(column["system2"]) for column in columns)],
        ["McNemar $p$", *(p_value(column["mcnemar_p"]) for column in columns)],
        ["plan hit rate", *(short(column["plan_hit_rate"]) for column in columns)],
        rule(),
    ]
    for name, words in CONTROLS:
        cells = [share(column["controls"][name]["accuracy"]) for column in columns]
        if name == "gate_zero" and all(column["controls"][name]["identical"] for column in columns):
            words += ", bit-identical"
        lines.append([words, *cells])
    return tabular("lcccc", lines)


def _with_interval(measured: Any) -> str:
    low, high = measured["interval"]
    return f"{share(measured['accuracy'])} {{\\scriptsize [{low:.2f}, {high:.2f}]}}"


def tree_lags(results: Results) -> str:
    """Tree-path against the lag."""
    compared = results["tree_path_lags"]["results"]["lags"]
    return tabular(
        "l" + "c" * len(compared),
        [
            ["lag", *(str(row["lag"]) for row in compared)],
            rule(),
            ["System 1", *(share(row["system1"]["accuracy"]) for row in compared)],
            ["System 2", *(share(row["system2"]["accuracy"]) for row in compared)],
            ["hit rate", *(short(row["plan_hit_rate"]) for row in compared)],
        ],
        tight=True,
    )


def hypotheses(results: Results) -> str:
    """Hit rate and accuracy with several assumed futures."""
    lines: list[Sequence[str] | str] = [["futures", *(str(count) for count in HYPOTHESES)], rule()]
    for task in TASKS:
        found = [results[f"hypotheses_{task}_{count}"]["results"] for count in HYPOTHESES]
        lines.append([f"{task_name(task)}, hits", *(short(row["plan_hit_rate"]) for row in found)])
        lines.append(["\\quad accuracy", *(share(row["system2"]["accuracy"]) for row in found)])
    return tabular("l" + "c" * len(HYPOTHESES), lines, tight=True)


# -------------------------------------------------------------------------------------------------------------- writes


def steering(results: Results) -> str:
    """Whether plans are followed, and what else their writes do."""
    lines: list[Sequence[str] | str] = [
        ["", "followed", "without", r"$\Delta\log p$", "KL next", "KL after"],
        rule(),
    ]
    for task, measured in results["steering"]["results"]["tasks"].items():
        for name, row in measured["audit"].items():
            line = name.split(",")[0]
            cells = [share(row["follow_rate"]), share(row["alone"]), f"{row['log_prob_gain']:+.2f}"]
            lines.append(
                [
                    f"{task_name(task)}, {line} plan",
                    *cells,
                    figure(row["next_kl"], 2),
                    figure(row["after_kl"], 2),
                ]
            )
    return tabular("lccccc", lines)


def stability(results: Results) -> str:
    """The norm bound, measured: a write before every token."""
    lines: list[Sequence[str] | str] = [
        ["write", r"$\alpha$", "writes", r"largest $\|h'\|/\|h\|$", "mean", "largest norm over plain run's"],
        rule(),
    ]
    for row in results["steering"]["results"]["stability"]:
        cells = [f"{row['rate']:g}", count(row["writes"]), f"{row['max_ratio']:.7f}", f"{row['mean_ratio']:.4f}"]
        lines.append([row["write"], *cells, share(row["max_growth"])])
    return tabular("lccccc", lines)


def transport(results: Results) -> str:
    """Error of carried writes per layer, on path-star."""
    rows = results["transport"]["results"]["tasks"]["path_star"]["rows"]
    lates = sorted({row["late"] for row in rows})
    layers = sorted({row["layer"] for row in rows})
    cell = {(row["late"], row["layer"]): row for row in rows}
    spans = "".join(rf"\cmidrule(lr){{{2 + 4 * place}-{5 + 4 * place}}}" for place in range(3))
    groups = (("carried", r"carried by $\prod a$"), ("fixed", r"carried by $0.9^k$"), ("late_write", "written late"))
    lines: list[Sequence[str] | str] = [
        ["", *(rf"\multicolumn{{{len(lates)}}}{{c}}{{{words}}}" for _, words in groups)],
        spans,
        ["layer, $k=$", *(str(late) for _ in groups for late in lates)],
        rule(),
    ]
    for layer in layers:
        cells = [_error(cell[late, layer][key]) for key, _ in groups for late in lates]
        lines.append([str(layer + 1), *cells])
    return tabular("l" + "c" * len(groups) * len(lates), lines, tight=True)


def _error(value: float) -> str:
    """Two digits; rounding error as a power of ten."""
    return r"$<\!10^{-5}$" if value < 1e-5 else f"{value:.2f}"


def withdrawal(results: Results) -> str:
    """What a withdrawal leaves, on path-star."""
    rows = results["transport"]["results"]["tasks"]["path_star"]["rows"]
    lines: list[Sequence[str] | str] = [
        ["layer", "left of the effect", "heads clipped", "norm before", "norm after"],
        rule(),
    ]
    for row in rows:
        if row["late"] == 4:
            keys = ("withdrawn", "cut", "norm_written", "norm_withdrawn")
            lines.append([str(row["layer"] + 1), *(short(row[key]) for key in keys)])
    return tabular("lcccc", lines)


def variants(results: Results) -> str:
    """System 2 as shipped, and with one setting changed."""
    lags = (0, 1, 2)
    lines: list[Sequence[str] | str] = [
        ["", *(rf"\multicolumn{{{len(lags)}}}{{c}}{{{task_name(task)}}}" for task in TASKS)],
        r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}",
        ["", *(f"lag {lag}" for _ in TASKS for lag in lags)],
        rule(),
    ]
    shipped = {"path_star": "path_star", "tree_path": "tree_path_lags"}
    rows = [("as shipped", shipped)]
    rows += [(what, {task: f"{name}_{task}" for task in TASKS}) for name, _, what in VARIANTS]
    for what, names in rows:
        found = [at_lag(results[names[task]]["results"], lag) for task in TASKS for lag in lags]
        lines.append([what, *(share(row["system2"]["accuracy"]) for row in found)])
    return tabular("l" + "c" * len(TASKS) * len(lags), lines)


# ------------------------------------------------------------------------------------------------------------ training


def training(results: Results) -> str:
    """The four stages of the shipped checkpoint."""
    found = results["training"]["results"]
    stages, parameters = found["stages"], found["parameters"]
    trains = {
        "stage_1": ("backbone, fusion, critics", ("backbone", "fusion", "critic")),
        "stage_2": ("world model", ("world_model",)),
        "stage_3": ("critics", ("critic",)),
        "stage_4": ("plan writer", ("writer",)),
    }
    lines: list[Sequence[str] | str] = [["stage", "trains", "parameters", "steps", "seconds", "held out"], rule()]
    for name, (what, parts) in trains.items():
        stage = stages[name]
        number = name.removeprefix("stage_")
        trained = count(sum(parameters[part] for part in parts))
        cells = [what, trained, count(stage["steps"]), count(stage["seconds"])]
        lines.append([number, *cells, _held_out(name, stage)])
    return tabular("llrrrl", lines)


def _held_out(name: str, stage: Any) -> str:
    def worst(prefix: str, pick: Callable[[Iterable[float]], float]) -> float:
        return pick(value for key, value in stage.items() if key.startswith(prefix) and value is not None)

    if name == "stage_1":
        return f"value AUC of every layer {short(worst('valid/value_auc/', min))} or more"
    if name == "stage_2":
        return f"trust horizon {stage['trust_horizon']} steps"
    if name == "stage_3":
        return f"pairwise branch accuracy {share(stage['branch_accuracy'])}"
    return f"plans followed {share(worst('valid/follow_rate/', min))} or more"


# --------------------------------------------------------------------------------------------------------------- files


def provenance(results: Results) -> str:
    """Every result file: where it came from and the command that makes it anew."""
    lines: list[Sequence[str] | str] = [["result file", "commit", "seed", "command"], rule()]
    for name, source in SOURCES.items():
        record = results.get(name)
        made = ["--", "--"] if record is None else [rf"\texttt{{{record['commit'][:7]}}}", str(record["seed"])]
        command = text(source.command.removeprefix("python -m ")).replace("--", r"-{}-")
        lines.append([rf"\texttt{{{text(name)}}}", *made, rf"\ttfamily {command}"])
    columns = r"lll>{\raggedright\arraybackslash\hangindent1em}p{0.56\linewidth}"
    return "\n".join(["{\\scriptsize", tabular(columns, lines, long=True, tight=True).rstrip(), "}", ""])


TABLES = {
    "reasoning": Table(("path_star", "tree_path"), reasoning),
    "tree_lags": Table(("tree_path_lags",), tree_lags),
    "hypotheses": Table(tuple(f"hypotheses_{task}_{count}" for task in TASKS for count in HYPOTHESES), hypotheses),
    "steering": Table(("steering",), steering),
    "stability": Table(("steering",), stability),
    "transport": Table(("transport",), transport),
    "withdrawal": Table(("transport",), withdrawal),
    "variants": Table(
        ("path_star", "tree_path_lags", *(f"{name}_{task}" for name, _, _ in VARIANTS for task in TASKS)), variants
    ),
    "seven": Table(tuple(f"seven_{kind}" for kind in (*KINDS, "star_2_many", "prosqa_public")), seven.seven),
    "published": Table(tuple(name for name, _ in seven.PUBLISHED), seven.published),
    "equal_compute": Table(tuple(f"paired_{kind}" for kind in PAIRED), seven.equal_compute),
    "training": Table(("training",), training),
    "speed_search": Table(("speed_search",), speed.search),
    "speed_kernels": Table(("speed_train", "speed_decode"), speed.kernels),
    "speed_actors": Table(("nonblocking",), speed.actors),
    "speed_pool": Table(("pool", "chaos"), speed.pool),
    "provenance": Table((), provenance),
}
