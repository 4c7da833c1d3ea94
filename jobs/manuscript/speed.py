"""The tables of speed, from the rows of ``jobs.benchmark_speed`` and from the fault injection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs.manuscript.numbers import Results, count, figure, p_value, row_named, share, short, text, times
from jobs.manuscript.tabular import rule, tabular

Lines = list[Sequence[str] | str]
Row = Mapping[str, Any]


def search(results: Results) -> str:
    """Simulations a second, beside mctx."""
    return tabular("lrlrr", [_HEADER, rule(), *_compared(results["speed_search"]["results"]["rows"])])


def kernels(results: Results) -> str:
    """Training, decoding and prompts, beside transformers and llama.cpp."""
    lines: Lines = [_HEADER, rule(), *_compared(results["speed_train"]["results"]["rows"]), rule()]
    return tabular("lrlrr", [*lines, *_compared(results["speed_decode"]["results"]["rows"])])


_HEADER = ["", "ours", "peer", "ratio", "of the limit"]


def _compared(rows: Iterable[Row]) -> Lines:
    lines: Lines = []
    for row in rows:
        peer = "--" if row.get("peer") is None else f"{text(row['peer_name'])} {figure(row['peer'])}"
        limit = "--" if row.get("share_of_limit") is None else short(row["share_of_limit"])
        name = row["name"].replace("search, shipped checkpoint", "shipped checkpoint").replace(", 64 simulations", "")
        lines.append(
            [text(f"{name}, {row['unit']}"), figure(row["ours"]), peer, times(row.get("ratio")), limit],
        )
    return lines


def actors(results: Results) -> str:
    """System 2 on beside off: rates, tails, and what the decode thread spends on plans."""
    rows = results["nonblocking"]["results"]["rows"]
    lines: Lines = [["", "on", "off", "rate ratio", "p99, on/off", r"thread, $\mu$s a token"], rule()]
    for row in rows:
        case, _, what = row["name"].rpartition(": ")
        if what != "rate":
            continue
        tail = row_named({"rows": rows}, f"{case}: p99")
        thread = row_named({"rows": rows}, f"{case}: decode thread")
        lines.append(
            [
                text(case.replace(": plans are in time", "")),
                figure(row["ours"]),
                figure(row["peer"]),
                short(row["ratio"]),
                short(tail["ours"] / tail["peer"]),
                figure(thread["ours"], 2),
            ]
        )
    return tabular("lrrrrr", lines)


def pool(results: Results) -> str:
    """The pool by the wall clock, and under faults."""
    measured, faults = results["pool"]["results"], results["chaos"]["results"]
    many = row_named(measured, "256 generations")
    live = row_named(measured, "path_star")
    hits = next(row for row in measured["rows"] if row["name"].endswith("plan hit rate"))
    again = row_named(measured, "the only planner is killed")
    recovery = faults["recovery_seconds"]
    lines: Lines = [
        ["256 generations at once, tokens/s", f"{count(many['ours'])} ({times(many['ratio'])} one generation)"],
        [
            "path-star at 50 tokens/s, lag 1, wall clock",
            f"System 2 {share(live['ours'])}, System 1 {share(live['peer'])}, $p$ {p_value(live['mcnemar_p'])}",
        ],
        ["\\quad plan hit rate", share(hits["ours"])],
        ["the only planner is killed: plans hit again after", f"{again['ours']:.1f} s, at most {again['worst']:.1f} s"],
        rule(),
        [
            f"{faults['seconds']:.0f} s of faults: planners killed, bad plans",
            f"{faults['planner_kills']}, {count(sum(faults['bad_plans'].values()))}",
        ],
        ["\\quad tokens, generations", f"{count(faults['tokens'])}, {count(faults['generations'])}"],
        ["\\quad violations of an invariant", str(faults["violations"])],
        ["\\quad plan hit rate: overall, in calm", ", ".join(short(faults["hit_rate"][key]) for key in _HITS)],
        ["\\quad recovery: median, longest", f"{recovery['median']:.1f} s, {recovery['max']:.1f} s"],
        ["\\quad faults not recovered from before the next", str(recovery["unrecovered"])],
    ]
    return tabular("ll", lines)


_HITS = ("overall", "calm")
