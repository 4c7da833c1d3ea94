"""What System 2 costs System 1: the same generator with planners and without, in turns, each on its own core.

``ours`` is System 2 on, ``peer`` is off, and ``ratio`` is on over off, for rates and for latencies alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crsm.config import Config, DeliberationConfig, DeviceName, EngineConfig
from crsm.data.sequences import encode_prompt
from crsm.model import Checkpoint, load_checkpoint
from crsm.tasks import build_tasks
from jobs.speed.actor_rig import STALLING, Load, Rig, Seen
from jobs.speed.rows import Row, make_row
from jobs.speed.shapes import TEN_MILLION, Shape, build
from jobs.speed.timing import interleave, median

if TYPE_CHECKING:
    from jobs.command import Progress

OFF = "System 2 off"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    streams: int
    tokens: int
    repeats: int = 5
    stalled: bool = False
    """Every planner sits on its requests for ten seconds."""
    pace: float | None = None
    lag: int = 2
    answers: bool = False
    """Real answers, which end by themselves, instead of a number of tokens."""


READ_LAYERS = (3, 7, 11, 14)
"""Of the 10M shape; its messages are bf16."""

CASES = {
    "nano": (
        Case("nano, 1 stream", 1, 20_000, repeats=7),
        Case("nano, 32 streams", 32, 3_000),
        Case("nano, 64 answers at 50 tokens/s each", 64, 64, repeats=5, pace=50.0, answers=True),
        Case("nano, 1 stream, planners stalled", 1, 20_000, repeats=8, stalled=True),
    ),
    "10M": (
        Case("10M, 1 stream", 1, 1_500, repeats=7),
        Case("10M, 1 stream, lag 32: plans are in time", 1, 1_500, repeats=7, lag=32),
        Case("10M, 16 streams", 16, 300),
        Case("10M, 8 streams at 20 tokens/s each", 8, 80, repeats=2, pace=20.0),
        Case("10M, 1 stream, planners stalled", 1, 1_500, repeats=8, stalled=True),
    ),
}
QUICK_CASES = {
    "nano": (Case("nano, 2 streams", 2, 30, repeats=1), Case("nano, paced", 2, 10, repeats=1, pace=100.0)),
}


GPU_SHARE = 0.25
"""Of a GPU, for each generator and each planner: two generators and a planner live at a time."""


def nonblocking_rows(
    core: int | None, *, seed: int, progress: Progress, quick: bool = False, device: DeviceName = "cpu"
) -> list[Row]:
    """All rows of ``benchmark_speed nonblocking``.

    Args:
        core: for the generator; None: whatever there is.
        quick: tiny loads: whether it runs.
        device: of both systems; a GPU is shared by all of them.
    """
    rows: list[Row] = []
    for shape, cases in (QUICK_CASES if quick else CASES).items():
        checkpoint = load_checkpoint("nano") if shape == "nano" else random_checkpoint(TEN_MILLION, seed)
        engine = EngineConfig(clock="wall", wire="fp32" if shape == "nano" else "bf16", device=device)
        share = GPU_SHARE if device == "cuda" else 0.0
        where: dict[str, Any] = {"device": device, "num_gpus": share, "gpus": share}
        on, off = (Rig(checkpoint, planners, core, engine=engine, **where) for planners in (1, 0))
        try:
            for case in cases:
                rows += _rows(case, on, off, load_of(case, checkpoint, seed), pinned=core is not None)
                progress.update(len(rows))
        finally:
            on.close()
            off.close()
    return rows


def load_of(case: Case, checkpoint: Checkpoint, seed: int) -> Load:
    """Fresh problems of the first task, a plan every 4 tokens."""
    task = build_tasks(checkpoint.config.tasks)[0]
    problems = [task.generate(seed, "test", index) for index in range(case.streams)]
    deliberation: DeliberationConfig = checkpoint.config.deliberation.model_copy(
        update={"lag": case.lag, "plan_every": 4}
    )
    prompts = [tuple(encode_prompt(problem, checkpoint.tokenizer)) for problem in problems]
    return Load(prompts, case.tokens, deliberation, checkpoint.config.search.simulations, case.pace, case.answers)


def random_checkpoint(shape: Shape, seed: int) -> Checkpoint:
    """A model of that shape with random weights, the vocabulary and the settings of the shipped one."""
    shipped = load_checkpoint("nano")
    model = build(replace(shape, vocab_size=shipped.tokenizer.vocab_size), seed, read_layers=READ_LAYERS)
    config: Config = shipped.config.model_copy(update={"model": model.config.model, "name": shape.name})
    model.config = config
    return Checkpoint(model, shipped.tokenizer, trust_horizon=shipped.trust_horizon)


def _rows(case: Case, on: Rig, off: Rig, load: Load, *, pinned: bool) -> list[Row]:
    seen: dict[str, list[Seen]] = {"on": [], "off": []}
    prefix = STALLING if case.stalled else "run"

    def candidate(name: str, rig: Rig) -> float:
        seen[name].append(rig.run(load, prefix))
        return seen[name][-1].seconds

    interleave({"on": lambda: candidate("on", on), "off": lambda: candidate("off", off)}, case.repeats)
    mine, theirs = seen["on"][1:], seen["off"][1:]  # without the warm-up
    outcomes: dict[str, int] = {}
    for run in mine:
        for name, count in run.metrics["outcomes"].items():
            outcomes[name] = outcomes.get(name, 0) + count
    note = None if pinned else "not pinned: there is one core"
    figures = {
        "requests": sum(run.metrics["requests"] for run in mine),
        "outcomes": outcomes,
        "injections": sum(run.metrics["injections"] for run in mine),
        "plan_hit_rate": median([run.plan_hit_rate for run in mine]),
    }
    speed = _on_over_off(
        make_row(
            f"{case.name}: rate",
            "tokens/s",
            1,
            [run.tokens_per_second for run in mine],
            peer_name=OFF,
            peer=[run.tokens_per_second for run in theirs],
            note=note,
            **figures,
        )
    )
    latency = _on_over_off(
        make_row(
            f"{case.name}: p99 between tokens",
            "ms",
            1,
            [1e3 * run.p99 for run in mine],
            peer_name=OFF,
            peer=[1e3 * run.p99 for run in theirs],
            note=note,
        )
    )
    thread = make_row(
        f"{case.name}: decode thread on requests and plans",
        "µs a token",
        1,
        [1e6 * run.deliberation for run in mine],
        note=f"hit rate {figures['plan_hit_rate']:.3f}, {figures['injections']:,} plans written",
    )
    return [speed, latency, thread]


def _on_over_off(row: Row) -> Row:
    assert row.ours is not None and row.peer is not None
    return replace(row, ratio=row.ours / row.peer)
