"""The actor system under load: many generations at a time, plans by the wall clock, and a planner that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from crsm.data.sequences import encode_prompt
from crsm.evaluation.statistics import mcnemar
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint, load_checkpoint
from crsm.tasks import build_tasks
from crsm.tasks.base import Problem, Task
from crsm.types import Token
from jobs.speed.actor_rig import Load, Rig
from jobs.speed.pinned_ray import pin
from jobs.speed.rows import Row, make_row
from jobs.speed.timing import interleave, rates

if TYPE_CHECKING:
    from jobs.command import Progress

PACE = 50.0
"""Tokens a second of a generation that somebody reads."""
LAG = 1
"""A plan has 40 ms until its target at that pace."""
LOOK_SECONDS = 0.25
"""Between two looks at the counters after a kill."""


def pool_rows(core: int | None, *, seed: int, progress: Progress, quick: bool = False) -> list[Row]:
    """All rows of ``benchmark_speed pool``.

    Args:
        core: for the generator; None: whatever there is.
        quick: tiny loads: whether it runs.
    """
    checkpoint = load_checkpoint("nano")
    deliberation = checkpoint.config.deliberation.model_copy(update={"lag": LAG})
    checkpoint.model.config = checkpoint.config.model_copy(update={"deliberation": deliberation})
    cores = sorted(os.sched_getaffinity(0)) if core is None else [core, *sorted(os.sched_getaffinity(0))]
    whole = Rig(checkpoint, 0, None, threads=len(cores))
    pin(whole.pid, cores)
    try:
        rows = [_batching(checkpoint, whole, seed, 8 if quick else 256, 20 if quick else 400, len(cores))]
        progress.update(len(rows))
    finally:
        whole.close()
    off = Rig(checkpoint, 0, core)
    try:
        on = Rig(checkpoint, 1, core)
        try:
            rows += _by_the_wall_clock(checkpoint, on, off, seed, 8 if quick else 200)
            progress.update(len(rows))
            rows += [_recovery(checkpoint, on, seed, kills=1 if quick else 3)]
            progress.update(len(rows))
        finally:
            on.close()
    finally:
        off.close()
    return rows


def _prompts(checkpoint: Checkpoint, seed: int, count: int) -> tuple[Task, list[Problem], list[tuple[int, ...]]]:
    task = build_tasks(checkpoint.config.tasks)[0]
    problems = [task.generate(seed, "test", index) for index in range(count)]
    return task, problems, [tuple(encode_prompt(problem, checkpoint.tokenizer)) for problem in problems]


def _batching(checkpoint: Checkpoint, rig: Rig, seed: int, streams: int, tokens: int, threads: int) -> Row:
    """Many generations together beside one alone, System 1 only on all cores, read by a caller as one stream."""
    _, _, prompts = _prompts(checkpoint, seed, streams)
    settings = checkpoint.config.deliberation
    one, many = Load(prompts[:1], 20 * tokens, settings, 1), Load(prompts, tokens, settings, 1)
    seconds = interleave({"one": lambda: rig.run(one).seconds, "many": lambda: rig.run(many).seconds}, 5)
    return make_row(
        f"{streams} generations at a time",
        "tokens/s",
        threads,
        rates(seconds["many"], streams * tokens),
        peer_name="one generation",
        peer=rates(seconds["one"], 20 * tokens),
    )


def _by_the_wall_clock(checkpoint: Checkpoint, on: Rig, off: Rig, seed: int, count: int) -> list[Row]:
    """Accuracy on fresh problems at a reader's pace, plans used when they arrive."""
    task, problems, prompts = _prompts(checkpoint, seed, count)
    _, others, their_prompts = _prompts(checkpoint, seed + 1, count // 2)
    for rig in (on, off):  # connections are made, caches filled, and the pool learns how long a search takes
        _answer(rig, checkpoint, task, others, their_prompts)
    before = on.metrics()["outcomes"]
    correct = {name: _answer(rig, checkpoint, task, problems, prompts) for name, rig in (("on", on), ("off", off))}
    outcomes = {name: n - before.get(name, 0) for name, n in on.metrics()["outcomes"].items()}
    settled = sum(outcomes.values()) - outcomes.get("ended", 0)
    hits = sum(outcomes.get(name, 0) for name in ("on_time", "late", "shut", "superseded"))
    title = f"{task.name} at {PACE:.0f} tokens/s, lag {LAG}, wall clock"
    accuracy = make_row(
        f"{title}: accuracy",
        f"of {count}",
        1,
        [sum(correct["on"]) / count],
        peer_name="System 1",
        peer=[sum(correct["off"]) / count],
        mcnemar_p=mcnemar(correct["on"], correct["off"]),
    )
    hit_rate = make_row(f"{title}: plan hit rate", "of all", 1, [hits / settled if settled else 0.0], outcomes=outcomes)
    return [accuracy, hit_rate]


def _answer(
    rig: Rig, checkpoint: Checkpoint, task: Task, problems: Sequence[Problem], prompts: Sequence[tuple[int, ...]]
) -> list[bool]:
    """Verdicts on the answers; generations join as if their users came one after another."""
    config = checkpoint.config
    requests = [
        GenerationRequest(prompt, config.sampling, config.deliberation, config.search.simulations, f"q{i}", pace=PACE)
        for i, prompt in enumerate(prompts)
    ]
    said: dict[str, list[int]] = {request.generation_id: [] for request in requests}
    streams = []
    for request in requests:
        streams.append(rig.generator.generate_many.remote([request]))
        time.sleep(1 / PACE)
    for stream in streams:
        for reference in stream:
            for token in ray.get(reference):
                assert isinstance(token, Token), token
                said[token.generation_id].append(token.token)
    texts = [checkpoint.tokenizer.decode(tokens) for tokens in said.values()]
    return [task.verify(problem, text) for problem, text in zip(problems, texts, strict=True)]


def _recovery(checkpoint: Checkpoint, rig: Rig, seed: int, kills: int) -> Row:
    """Seconds from the death of the only planner until plans hit again as before, while answers are given all along."""
    _, _, prompts = _prompts(checkpoint, seed, 32)
    config = checkpoint.config
    load = Load(prompts, 64, config.deliberation, config.search.simulations, PACE, answers=True)
    stopping = threading.Event()

    def answer() -> None:
        while not stopping.is_set():
            rig.run(load)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        samples = []
        for _ in range(kills):
            before = rig.metrics()["outcomes"]
            time.sleep(3.0)
            usual = _rate(before, rig.metrics()["outcomes"]) or 0.0
            samples.append(_kill_and_wait(rig, usual))
    finally:
        stopping.set()
        thread.join()
    return make_row("the only planner is killed: plans hit again after", "s", 1, samples, worst=max(samples))


def _kill_and_wait(rig: Rig, usual: float, timeout: float = 60.0) -> float:
    """Kills the planners there are; seconds until the hit rate between two looks is 0.9 of what it usually is."""
    for pid in rig.metrics()["pool"]["pids"]:
        os.kill(pid, signal.SIGKILL)
    killed = time.perf_counter()
    time.sleep(2 * LOOK_SECONDS)
    before = rig.metrics()["outcomes"]
    while time.perf_counter() - killed < timeout:
        time.sleep(LOOK_SECONDS)
        after = rig.metrics()["outcomes"]
        rate = _rate(before, after)
        if rate is not None and rate >= 0.9 * usual:
            return time.perf_counter() - killed
        before = after
    raise RuntimeError(f"no plan hit for {timeout:.0f} s after a planner was killed")


def _rate(before: dict[str, int], after: dict[str, int]) -> float | None:
    new: dict[str, Any] = {name: count - before.get(name, 0) for name, count in after.items() if name != "ended"}
    settled = sum(new.values())
    return sum(new.get(name, 0) for name in ("on_time", "late", "shut", "superseded")) / settled if settled else None
