"""The checkpoint ``reasoning``: seven kinds of problems with the exact world model, their macros and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.manuscript.numbers import (
    Add,
    Results,
    Value,
    at_lag,
    bought,
    count,
    digit,
    p_value,
    setting,
    share,
    short,
    word,
)
from jobs.manuscript.sources import KINDS, PAIRED
from jobs.manuscript.tabular import rule, tabular

PUBLISHED = (
    ("seven_star_2_many", r"next-token models: chance, $1/2$~\citep{bachmann2024pitfalls,frydenlund2025language}"),
    ("seven_star_5", r"next-token models: chance, $1/5$~\citep{bachmann2024pitfalls,frydenlund2025language}"),
    ("seven_prosqa_public", r"chain of thought 0.775, Coconut 0.970~\citep{hao2024coconut}"),
)
"""What others report; their figures, from the papers named. No result file of ours has them."""
NAMES = {
    "star_2": "path-star, 2 arms of 5",
    "star_5": "path-star, 5 arms of 5",
    "tree_path": "tree-path, depth 3",
    "countdown": "countdown, 4 numbers",
    "maze": r"maze, $5\times5$",
    "sudoku": r"sudoku, $4\times4$",
    "prosqa": "ProsQA",
    "star_2_many": "path-star, 2 arms of 5",
    "prosqa_public": "ProsQA, public problems",
}


# -------------------------------------------------------------------------------------------------------------- tables


def seven(results: Results) -> str:
    """Both systems at lags 1 and 2 on every kind."""
    lines: list[Sequence[str] | str] = [
        ["", "problems", "System 1", r"\multicolumn{3}{c}{System 2, lag 1}", r"\multicolumn{3}{c}{System 2, lag 2}"],
        r"\cmidrule(lr){4-6}\cmidrule(lr){7-9}",
        ["", "", "", *("right", "$p$", "hits") * 2],
        rule(),
    ]
    lines += [_both_lags(kind, results[f"seven_{kind}"]["results"]) for kind in KINDS]
    lines.append(rule())
    lines += [_both_lags(kind, results[f"seven_{kind}"]["results"]) for kind in ("star_2_many", "prosqa_public")]
    return tabular("lrccccccc", lines, tight=True)


def _both_lags(kind: str, measured: Mapping[str, Any]) -> list[str]:
    lags = {row["lag"]: row for row in measured.get("lags", [measured])}
    alone = next(iter(lags.values()))["system1"]
    cells = [NAMES[kind], count(measured["problems"]), share(alone["accuracy"])]
    for lag in (1, 2):
        row = lags.get(lag)
        cells += (
            ["--"] * 3
            if row is None
            else [share(row["system2"]["accuracy"]), p_value(row["mcnemar_p"]), short(row["plan_hit_rate"])]
        )
    return cells


def published(results: Results) -> str:
    """Beside what others report."""
    lines: list[Sequence[str] | str] = [["", "System 1", "System 2, lag 1 / 2", "published"], rule()]
    for name, theirs in PUBLISHED:
        measured = results[name]["results"]
        rows = measured.get("lags", [measured])
        found = {row["lag"]: share(row["system2"]["accuracy"]) for row in rows}
        ours = " / ".join(found.get(lag, "--") for lag in (1, 2))
        lines.append([NAMES[name.removeprefix("seven_")], share(rows[0]["system1"]["accuracy"]), ours, theirs])
    return tabular("lccl", lines, tight=True)


def equal_compute(results: Results) -> str:
    """System 2 beside the best-of-N that costs at least as much, on the same problems."""
    lines: list[Sequence[str] | str] = [
        ["", "simulations", "cost", "System 2", "best of", "cost", "right", "difference", "McNemar $p$"],
    ]
    for kind in PAIRED:
        found = results[f"paired_{kind}"]["results"]
        lines.append(rule())
        for row in found["compute"]["against_best_of"]:
            mine = bought(found, "system_2", row["simulations"])
            theirs = bought(found, "best_of", row["best_of"])
            first = NAMES[kind] if row["simulations"] == 8 else ""
            cells = [str(row["simulations"]), f"{mine['samples']:.1f}", share(mine["accuracy"])]
            cells += [str(row["best_of"]), f"{theirs['samples']:.1f}", share(theirs["accuracy"])]
            lines.append([first, *cells, f"${row['difference']:+.3f}$", p_value(row["mcnemar_p"])])
    return tabular("lrrcrrccc", lines, tight=True)


# ------------------------------------------------------------------------------------------------------------- look-up


def paired(results: Mapping[str, Any], simulations: int) -> Any:
    """System 2 beside the best-of-N that costs at least as much."""
    for row in results["compute"]["against_best_of"]:
        if row["simulations"] == simulations:
            return row
    raise KeyError(f"no pair of {simulations} simulations")


def numbers_kept(config: Mapping[str, Any]) -> tuple[int, int]:
    """What an imagined position keeps with the exact world model, and what a state is: numbers."""
    sizes = config["model"]["backbone"]
    inner, state, layers = sizes["expand"] * sizes["d_model"], sizes["d_state"], sizes["n_layer"]
    window = (inner + 2 * state) * (sizes["d_conv"] - 1)
    record = inner // sizes["headdim"] + inner + state
    return layers * (window + record + sizes["d_model"]), layers * (window + inner * state)


# -------------------------------------------------------------------------------------------------------------- macros


def add_seven_kinds(add: Add) -> None:
    """The macros of these kinds."""

    def system(lag: int, which: str) -> Value:
        return lambda r: share(at_lag(r["results"], lag)[which]["accuracy"])

    def kept(place: int) -> Value:
        return lambda r: f"{4 * numbers_kept(r['config'])[place] / 1024:.0f}"

    def pair(simulations: int, key: str, form: Callable[[float], str]) -> Value:
        return lambda r: form(paired(r["results"], simulations)[key])

    def planned(simulations: int) -> Value:
        return lambda r: share(bought(r["results"], "system_2", simulations)["accuracy"])

    def sampled(simulations: int) -> Value:
        """Of the best-of-N that System 2 is paired with."""
        return lambda r: share(
            bought(r["results"], "best_of", paired(r["results"], simulations)["best_of"])["accuracy"]
        )

    def cost(part: str) -> Value:
        return lambda r: short(r["results"]["compute"]["costs"][part] / 1e6)

    for kind in KINDS:
        add(f"{_letters(kind)}Alone", f"seven_{kind}", system(1, "system1"))
        for lag in (1, 2):
            add(f"{_letters(kind)}Lag{digit(lag)}", f"seven_{kind}", system(lag, "system2"))
    for name, source, lags in (
        ("StarMany", "seven_star_2_many", (2,)),
        ("ProsqaPublic", "seven_prosqa_public", (1, 2)),
    ):
        add(f"{name}Problems", source, lambda r: count(r["results"]["problems"]))
        add(f"{name}Alone", source, system(lags[0], "system1"))
        for lag in lags:
            add(f"{name}Lag{digit(lag)}", source, system(lag, "system2"))
    add("KindProblems", "seven_star_5", lambda r: count(r["results"]["problems"]))
    add("KindSimulations", "seven_star_5", lambda r: str(r["config"]["search"]["simulations"]))
    for name, key in (("KindLayers", "n_layer"), ("KindWidth", "d_model"), ("KindStateSize", "d_state")):
        add(name, "seven_star_5", setting(f"model.backbone.{key}"))
    add("KindPlanLength", "seven_star_5", setting("deliberation.plan_length"))
    add("KindRate", "seven_star_5", setting("deliberation.injection_rate"))
    add("NodeKilobytes", "seven_star_5", kept(0))
    add("StateKilobytes", "seven_star_5", kept(1))
    for kind in PAIRED:
        source = f"paired_{kind}"
        add(f"{_letters(kind)}PairedProblems", source, lambda r: str(r["results"]["problems"]))
        for budget in (8, 16, 32, 64):
            name = f"{_letters(kind)}Paired{digit(budget)}"
            add(name, source, planned(budget))
            add(f"{name}Best", source, sampled(budget))
            add(f"{name}P", source, pair(budget, "mcnemar_p", p_value))
    add("KindCostToken", "paired_star_5", cost("token"))
    add("KindCostExact", "paired_star_5", cost("simulation"))
    add("KindCostLatent", "latent_paired_star_5", cost("simulation"))
    for budget in (16, 64):
        add(f"StarFiveLatent{digit(budget)}", "latent_paired_star_5", planned(budget))
    for kind in ("countdown", "maze"):
        add(f"Latent{_letters(kind)}", f"latent_{kind}", system(1, "system2"))
        add(f"Latent{_letters(kind)}P", f"latent_{kind}", lambda r: p_value(at_lag(r["results"], 1)["mcnemar_p"]))
    add("LatentCountdownMade", "latent_countdown", lambda r: count(_made(r["results"]["plans"]["outcomes"])))
    add("LatentCountdownWritten", "latent_countdown", lambda r: count(r["results"]["plans"]["outcomes"]["on_time"]))
    add("LatentSimulations", "latent_countdown", lambda r: str(r["config"]["search"]["simulations"]))


def _made(outcomes: Mapping[str, int]) -> int:
    """Plans that were there before their text had ended."""
    return sum(number for outcome, number in outcomes.items() if outcome != "ended")


def _letters(kind: str) -> str:
    """``star_5`` → ``StarFive``; ``tree_path`` → ``Tree``, as ``TreePath`` is the other checkpoint's."""
    return {"star_2": "StarTwo", "star_5": "StarFive", "tree_path": "Tree"}.get(kind, word(kind))
