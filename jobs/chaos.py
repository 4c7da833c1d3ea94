"""Faults on purpose: planners killed, plans made bad, and the invariants that hold all the same; or load alone."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.checkpoints import CheckpointOption, limit_threads, load_with_settings, print_table
from jobs.command import ConfigOption, JsonOption, Progress, SeedOption, SetOption, run, write_result

if TYPE_CHECKING:
    from crsm.model import Checkpoint
    from jobs.faults.campaign import PhaseResult
    from jobs.faults.load import Violations
    from jobs.faults.schedule import Phase

STORE_BYTES = 256 * 2**20
"""Of the object store: small, so that filling it is quick."""
PROMPTS = 64
MEMORY_EVERY = 3.0


def main(
    checkpoint: CheckpointOption = "nano",
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Time under faults.")] = 120,
    soak: Annotated[
        float | None,
        typer.Option("--soak", metavar="MINUTES", min=0.1, help="No faults: so long under load, watching memory."),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Generations at a time.")] = 16,
    planners: Annotated[int, typer.Option("--planners", min=1, help="Planner actors.")] = 3,
    pace: Annotated[float, typer.Option("--pace", min=0.1, help="Tokens per second of a paced generation.")] = 10,
    lag: Annotated[int, typer.Option("--lag", min=0, help="Tokens between request and target.")] = 1,
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
) -> int:
    """Injects faults into a generator with planner actors under load, and checks what may never happen.

    Planners are killed in mid-search and all at once, stopped, and made to sleep; plans are lost, doubled, reordered,
    delayed and made bad in every way; generations are cancelled, weights changed, the object store filled. When and
    what follows from --seed. The exit status is 0 only if no invariant was violated.
    """
    loaded = load_with_settings(checkpoint, config, overrides, seed)
    settings = loaded.config
    limit_threads()
    results = _run(loaded, seconds, soak, concurrency, planners, pace, lag)
    _print(results)
    write_result("chaos", settings, settings.seed, results, json)
    return 1 if results["violations"] else 0


def _run(
    checkpoint: Checkpoint, seconds: float, soak: float | None, concurrency: int, planners: int, pace: float, lag: int
) -> dict[str, Any]:
    import os
    import tempfile

    from actors.cluster import start_ray
    from crsm.config import PlannersConfig
    from jobs.faults.campaign import Campaign, run_phase
    from jobs.faults.load import Violations
    from jobs.faults.schedule import Phase, schedule

    config, seed = checkpoint.config, checkpoint.config.seed
    phases: tuple[Phase, ...]
    if soak is None:
        phases = schedule(seed, seconds)
    else:
        phases = (Phase(60 * soak, True, (), ((0.0, 60 * soak),)),)
    violations = Violations()
    done: list[PhaseResult] = []
    with (
        tempfile.TemporaryDirectory(prefix="crsm-chaos-") as folder,
        start_ray("local", object_store_memory=STORE_BYTES),
    ):
        campaign = Campaign(
            checkpoint,
            _prompts(checkpoint),
            concurrency,
            PlannersConfig(count=planners),
            pace,
            config.deliberation.model_copy(update={"lag": lag}),
            config.sampling.model_copy(update={"temperature": 0.0, "seed": seed}),
            seed,
            Path(folder),
            os.getpid(),
            None if soak is None else min(MEMORY_EVERY, 60 * soak / 20),
        )
        for number, phase in enumerate(phases):
            title = "soak" if soak is not None else f"chaos, {'paced' if phase.paced else 'unpaced'}"
            with Progress(title, round(phase.seconds)) as progress:
                done.append(run_phase(campaign, phase, number, violations, progress))
    results = summarize(phases, done, violations)
    if soak is not None:
        results["growth"] = growth(done[0])
    return {"concurrency": concurrency, "planners": planners, "pace": pace, "lag": lag, **results}


def _prompts(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """Fresh problems of every task of the checkpoint, in turn."""
    from crsm.tasks import build_tasks
    from crsm.tasks.base import problems

    tasks = build_tasks(checkpoint.config.tasks)
    drawn = [problems(task, checkpoint.config.seed, "test", -(-PROMPTS // len(tasks))) for task in tasks]
    texts = [problem.prompt for some in zip(*drawn, strict=False) for problem in some]
    return [tuple(checkpoint.tokenizer.encode(text)) for text in texts]


def summarize(phases: tuple[Phase, ...], done: list[PhaseResult], violations: Violations) -> dict[str, Any]:
    """The figures of all phases together, and of each."""
    from jobs.faults.schedule import BadPlan, EventKind

    bad: Counter[BadPlan] = Counter()
    events: Counter[EventKind] = Counter()
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for result in done:
        bad += result.bad_plans
        events += result.done
        outcomes.update(result.metrics.get("outcomes", {}))
        faults.update(result.metrics.get("faults", {}))
    recovery = [second for result in done for second in result.recovery]
    return {
        "violations": violations.count,
        "violation_messages": violations.messages,
        "seconds": sum(result.seconds for result in done),
        "generations": sum(result.generations for result in done),
        "generations_without_a_plan": sum(result.unplanned for result in done),
        "cancelled": sum(result.cancelled for result in done),
        "tokens": sum(result.tokens for result in done),
        "plans": sum(result.plans for result in done),
        "injections": sum(result.injections for result in done),
        "requests": sum(result.metrics.get("requests", 0) for result in done),
        "outcomes": dict(outcomes),
        "faults": dict(faults),
        "planner_kills": sum(result.kills for result in done),
        "events": {kind.value: events[kind] for kind in EventKind if events[kind]},
        "bad_plans": {kind.value: bad[kind] for kind in BadPlan},
        "recovery_seconds": {
            "median": statistics.median(recovery) if recovery else None,
            "max": max(recovery, default=None),
            "unrecovered": sum(result.unrecovered for result in done),
        },
        "hit_rate": {"overall": _overall(outcomes), "calm": _mean([result.calm_rate for result in done])},
        "phases": [
            {
                "paced": phase.paced,
                "seconds": result.seconds,
                "tokens": result.tokens,
                "hit_rate": {"overall": result.metrics.get("plan_hit_rate"), "calm": result.calm_rate},
                "outcomes": result.metrics.get("outcomes", {}),
                "faults": result.metrics.get("faults", {}),
                "pool": result.metrics.get("pool", {}),
            }
            for phase, result in zip(phases, done, strict=True)
        ],
    }


def growth(result: PhaseResult) -> dict[str, Any]:
    """How each process grew, and all of them together: memory of their own, after the warm-up."""
    from jobs.faults.growth import fit_growth, thin

    found: dict[str, Any] = {}
    fits = []
    for (role, pid), samples in sorted(result.memory.items()):
        times, resident, own = zip(*((at, memory.resident, memory.anonymous) for at, memory in samples), strict=True)
        fit = fit_growth(*thin(times, own))
        if fit is None:
            continue
        fits.append(fit)
        found[f"{role}-{pid}"] = {
            "resident_mb": statistics.median(resident) / 2**20,
            "own_mb": fit.level / 2**20,
            "growth_mb": fit.growth / 2**20,
            "growth": fit.share,
            "seconds": fit.seconds,
            "samples": fit.samples,
        }
    level, grown = sum(fit.level for fit in fits), sum(fit.growth for fit in fits)
    overall = {"own_mb": level / 2**20, "growth_mb": grown / 2**20, "growth": grown / level if level else None}
    return {"overall": overall, "processes": found}


def _overall(outcomes: Counter[str]) -> float | None:
    from crsm.types import Reason

    settled = sum(outcomes.values()) - outcomes[Reason.ENDED.value]
    return sum(outcomes[reason.value] for reason in Reason if reason.is_hit) / settled if settled else None


def _mean(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return statistics.fmean(known) if known else None


def _print(results: dict[str, Any]) -> None:
    recovery, rate = results["recovery_seconds"], results["hit_rate"]
    rows = [
        ("violations", str(results["violations"])),
        ("tokens, generations", f"{results['tokens']:,}, {results['generations']:,}"),
        ("plans, applied", f"{results['plans']:,}, {results['injections']:,}"),
        ("hit rate, in calm", f"{_figure(rate['overall'])}, {_figure(rate['calm'])}"),
    ]
    if "growth" in results:
        rows += [
            (f"growth of {name}", f"{one['growth_mb']:+.1f} MB of {one['own_mb']:.0f} ({one['growth']:+.2%})")
            for name, one in [("all", results["growth"]["overall"]), *results["growth"]["processes"].items()]
            if one["growth"] is not None
        ]
    else:
        bad = results["bad_plans"].values()
        rows += [
            ("planner kills", str(results["planner_kills"])),
            ("bad plans, of the rarest kind", f"{sum(bad):,}, {min(bad):,}"),
            ("recovery, median and longest", f"{_figure(recovery['median'])} s, {_figure(recovery['max'])} s"),
        ]
    print_table("soak" if "growth" in results else "chaos", ["", ""], rows)
    for message in results["violation_messages"]:
        print(f"violation: {message}", file=sys.stderr)


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run(main)
