"""Is a plan followed, what else does its write change, and does the state stay bounded?"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import CheckpointOption, limit_threads, load_with_settings, pick_task, print_table
from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, run, write_result

if TYPE_CHECKING:
    from crsm.model import Checkpoint

POSITIONS = 5
"""The first answer positions, at each of which plans are written."""


def main(
    checkpoint: CheckpointOption = "nano",
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Repeatable; all tasks of the checkpoint if none."),
    ] = None,
    problems: Annotated[int, typer.Option("--problems", min=1, help="Fresh test problems of each task.")] = 200,
    rate: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="RATES", help="α of the writes; repeatable, or 0.1,0.2. The settings' if none."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Length of the generation for stability.")] = 1000,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> None:
    """Verify the writes: follow rate, side effects, gate sparsity, stability of the state.

    Oracle plans (the next tokens of a right answer, and of a wrong one) are written at each of the first answer
    positions: how many are followed to the end, how the probability of their tokens changes, and what is left of the
    write in the tokens after it. Then a long text with a write before every token: no write may make a head's norm
    grow. Exit status 1 if one did.
    """
    loaded = load_with_settings(checkpoint, config, overrides, seed)
    settings = loaded.config
    rates = parse_rates(rate) or [settings.deliberation.injection_rate]
    names = task or [entry.label for entry in settings.tasks]
    tasks = [pick_task(settings, name) for name in names]
    threads = limit_threads()

    from crsm.evaluation.steering_audit import WRITES, follow_rates, gate_sparsity, lines_of, long_text, stability
    from crsm.tasks.base import problems as draw

    results: dict[str, Any] = {
        "checkpoint": {"name": checkpoint, "weights": loaded.weights_hash, "version": loaded.model_version},
        "threads": threads,
        "tasks": {},
    }
    text: list[int] = []
    stable: list[dict[str, Any]] = []
    with Progress("verify steering", 2 * len(tasks) + len(WRITES)) as progress:
        for number, judge in enumerate(tasks):
            fresh = draw(judge, settings.seed, "test", problems)
            lines = lines_of(loaded, judge, fresh, settings.seed)
            follow = follow_rates(loaded, lines, rates=rates, positions=POSITIONS)
            progress.update(2 * number + 1, **{judge.name: f"{len(lines)} lines"})
            gates = gate_sparsity(loaded, judge, fresh)
            progress.update(2 * number + 2, **{judge.name: f"{gates['applied']} plans written"})
            results["tasks"][judge.name] = {"problems": len(fresh), "audit": _summary(follow), "rows": follow} | {
                "gates": gates
            }
            text += long_text(loaded, lines, -(-tokens // len(tasks)))
        for number, write in enumerate(WRITES):
            # The writer's own writes as they are used; the others as strong as they can be.
            alpha = max(rates) if write == "writer" else 1.0
            stable.append(stability(loaded, text, rate=alpha, write=write, seed=settings.seed))
            progress.update(2 * len(tasks) + number + 1, **{write: stable[-1]["max_ratio"]})
    results["stability"] = stable
    _print(loaded, results)
    write_result("verify_steering", settings, settings.seed, results, json)
    grown = [row["write"] for row in stable if not row["bounded"]]
    if grown:
        raise SystemExit(f"error: a state grew under the writes {', '.join(grown)}; allowed: a ratio of at most 1")


def parse_rates(texts: Sequence[str] | None) -> list[float]:
    """Rates from ``["0.1"]`` or ``["0.1,0.2"]``.

    Raises:
        ValueError: naming the part that is no rate.
    """
    rates = []
    for part in (part.strip() for text in texts or () for part in text.split(",")):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ValueError(f"rate = {part!r}; allowed: numbers from 0 to 1, with commas between them")
        rates.append(value)
    return rates


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over the positions, per kind of line and rate."""
    keys = ("follow_rate", "alone", "log_prob_gain", "next_kl", "after_kl")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['line']}, rate {row['rate']:g}", []).append(row)
    means = {}
    for name, group in groups.items():
        # A plan that reaches the end of the answer leaves nothing after it: NaN, which does not count.
        found = {key: [row[key] for row in group if not math.isnan(row[key])] for key in keys}
        means[name] = {key: sum(values) / len(values) if values else math.nan for key, values in found.items()}
    return means


def _print(checkpoint: Checkpoint, results: dict[str, Any]) -> None:
    for name, result in results["tasks"].items():
        print_table(
            f"{name}, {result['problems']} problems: oracle plans, written at the first {POSITIONS} answer positions",
            ["line", "position", "rate", "followed", "without", "Δ log p", "KL next", "KL after"],
            (
                (
                    row["line"],
                    str(row["position"]),
                    f"{row['rate']:g}",
                    f"{row['follow_rate']:.3f}",
                    f"{row['alone']:.3f}",
                    f"{row['log_prob_gain']:+.2f}",
                    f"{row['next_kl']:.3f}",
                    "none after" if math.isnan(row["after_kl"]) else f"{row['after_kl']:.4f}",
                )
                for row in result["rows"]
            ),
        )
        gates = result["gates"]
        print_table(
            f"{name}: gates of System 2's own {gates['plans']} plans, {gates['applied']} written",
            ["layer", "shut", "confidence where open", "written"],
            (
                (
                    str(row["layer"]),
                    f"{row['shut']:.3f}",
                    "none open" if row["confidence"] is None else f"{row['confidence']:.3f}",
                    str(row["applied"]),
                )
                for row in gates["layers"]
            ),
        )
    print_table(
        "stability: a write before every token of a long text",
        ["write", "rate", "writes", "largest ratio", "mean ratio", "norm over unwritten", "bounded"],
        (
            (
                row["write"],
                f"{row['rate']:g}",
                str(row["writes"]),
                f"{row['max_ratio']:.7f}",
                f"{row['mean_ratio']:.4f}",
                f"{row['max_growth']:.3f}",
                "yes" if row["bounded"] else "NO",
            )
            for row in results["stability"]
        ),
    )
    if checkpoint.model.gate.calibrated:
        return
    print("the gates of this checkpoint are shut: System 2 writes nothing", file=sys.stderr)


if __name__ == "__main__":
    run(main)
