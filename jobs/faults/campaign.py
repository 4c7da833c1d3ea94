"""A generator under load and faults, or under load alone.

Invariants:

* the thread that runs a phase does everything that is done from outside: it carries out events, takes samples and
  looks at processes; the clients have threads of their own, the planners follow orders that they were born with;
* a phase ends by closing its generator; from then on none of its processes may live, and nothing of it may be left in
  shared memory;
* what lasts is undone at its time or at the end of the phase, whichever is first;
* what finds nobody to do it to (all planners are dead) is tried again for a while, and is then not counted.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
import torch

from actors.generator import start_generator, stop_generator
from actors.weights import share
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from jobs.command import Progress
from jobs.faults.invariants import Rules, check_settled
from jobs.faults.load import Load, Violations
from jobs.faults.planner import Orders, claimed, faulty_planner, read_ledger, start_clock
from jobs.faults.processes import (
    Memory,
    Process,
    actors_of,
    left_in_shared_memory,
    memory_of,
    shared_memory_of,
    signal_all,
    wait_until_gone,
)
from jobs.faults.recovery import Sample, calm_rate, recovery_seconds, sample
from jobs.faults.schedule import BadPlan, Event, EventKind, Phase

SAMPLE_EVERY = 0.25
LOOK_EVERY = 1.0
READY_WITHIN = 180.0
GONE_WITHIN = 30.0
TRIED_FOR = 3.0
TIED = 1e-4
"""Nats between two tokens that rounding may put in either order."""
PRESSURE_SHARE = 0.85
"""Of the object store."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """What all phases share."""

    checkpoint: Checkpoint
    prompts: Sequence[tuple[int, ...]]
    concurrency: int
    planners: PlannersConfig
    pace: float
    """Tokens per second of each generation in paced phases."""
    deliberation: DeliberationConfig
    sampling: SamplingConfig
    seed: int
    folder: Path
    """For ledgers."""
    driver: int
    """The process that started Ray."""
    memory_every: float | None = None
    """Seconds between looks at memory; None: nobody looks."""


@dataclass(slots=True)
class PhaseResult:
    """What a phase came to."""

    seconds: float = 0.0
    generations: int = 0
    unplanned: int = 0
    """Generations to which no plan was applied."""
    cancelled: int = 0
    tokens: int = 0
    injections: int = 0
    plans: int = 0
    """That planners made; the pool's own count begins anew with its process."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The generator's last ones."""
    bad_plans: Counter[BadPlan] = field(default_factory=Counter)
    kills: int = 0
    done: Counter[EventKind] = field(default_factory=Counter)
    """Events that were carried out."""
    calm_rate: float | None = None
    recovery: list[float] = field(default_factory=list)
    unrecovered: int = 0
    memory: dict[tuple[str, int], list[tuple[float, Memory]]] = field(default_factory=lambda: defaultdict(list))
    """By role and process."""


def system_1(checkpoint: Checkpoint, sampling: SamplingConfig, max_lag: int) -> Rules:
    """What a plain backbone says, worked out once for every prompt."""

    @cache
    def reference(prompt: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(Engine(checkpoint).generate_all([GenerationRequest(prompt, sampling)])[0])

    def tied(text: tuple[int, ...], one: int, other: int) -> bool:
        with torch.inference_mode():
            logits_V = checkpoint.model.prefill(torch.tensor([text]))[0][0].log_softmax(dim=-1)
        return abs(float(logits_V[one] - logits_V[other])) < TIED

    return Rules(max_lag, sampling.max_tokens, checkpoint.model_version, reference, tied)


def run_phase(campaign: Campaign, phase: Phase, number: int, violations: Violations, progress: Progress) -> PhaseResult:
    """Starts a generator, loads it, does what the schedule says, and ends it."""
    ledger = campaign.folder / f"phase-{number}"
    ledger.mkdir(parents=True)
    running = _Running(campaign, phase, number, ledger, violations, progress)
    try:
        running.wait_until_ready()
        running.run()
    finally:
        running.end()
    return running.result


class _Running:
    """One phase under way."""

    def __init__(
        self, campaign: Campaign, phase: Phase, number: int, ledger: Path, violations: Violations, progress: Progress
    ) -> None:
        self.result = PhaseResult()
        self._campaign, self._phase, self._ledger = campaign, phase, ledger
        self._violations, self._progress = violations, progress
        self._draw = random.Random(f"campaign {campaign.seed} {number}")
        sizes = campaign.checkpoint.config.model.backbone
        orders = Orders(campaign.seed, phase, str(ledger), sizes.vocab_size)
        self._seen: set[Process] = set()
        self._shared: set[str] = set()
        self._samples: list[Sample] = []
        self._hurt: list[float] = []
        """When planners were killed from outside."""
        self._undo: list[tuple[float, Callable[[], object]]] = []
        self._ballast: list[Any] = []
        self._plans_counted = 0
        self._generator = start_generator(
            campaign.checkpoint,
            campaign.planners,
            EngineConfig(clock="wall", pace=campaign.pace if phase.paced else None),
            planner_cpus=0.5,
            planner_class=faulty_planner(orders),
        )
        self._load = Load(
            self._generator,
            campaign.prompts,
            campaign.concurrency,
            campaign.sampling,
            campaign.deliberation,
            system_1(campaign.checkpoint, campaign.sampling, campaign.deliberation.max_lag),
            violations,
            f"phase-{number}",
            campaign.seed,
        )

    def wait_until_ready(self) -> None:
        until = time.monotonic() + READY_WITHIN
        while _ready(self._metrics()) < self._campaign.planners.count:
            if time.monotonic() > until:
                raise RuntimeError(f"the planners are not ready after {READY_WITHIN:.0f} s")
            time.sleep(0.1)

    def run(self) -> None:
        self._load.start()
        started = time.time()
        start_clock(self._ledger, started)
        events = [event for event in self._phase.events if event.kind in self._actions]
        samples_at = looks_at = memory_at = 0.0
        while (now := time.time() - started) < self._phase.seconds:
            for event in [event for event in events if event.at <= now]:
                done = self._actions[event.kind](self, event, now)
                self.result.done[event.kind] += done
                if done or now > event.at + TRIED_FOR:
                    events.remove(event)
            self._undo_due(now)
            if now >= looks_at:
                self._look()
                looks_at = now + LOOK_EVERY
            if self._campaign.memory_every is not None and now >= memory_at:
                self._weigh(now)
                memory_at = now + self._campaign.memory_every
            if now >= samples_at:
                self._sample(now)
                samples_at = now + SAMPLE_EVERY
            time.sleep(0.02)
        self.result.seconds = now
        self._undo_due(float("inf"))
        self._load.stop()
        self.result.metrics = self._metrics()
        self._violations.add(check_settled(self.result.metrics))
        self._evaluate(started, now)

    def end(self) -> None:
        """Nothing may be left."""
        self._undo_due(float("inf"))
        self._look()
        stop_generator(self._generator)
        left = wait_until_gone(self._seen, GONE_WITHIN)
        self._violations.add([f"process {process.pid} ({process.actor}) lives on" for process in left])
        self._violations.add([f"{name} is left" for name in left_in_shared_memory(self._shared)])

    # ---------------------------------------------------------------- looking

    def _metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = ray.get(self._generator.metrics.remote(), timeout=60)
        plans = metrics.get("pool", {}).get("plans", 0)
        self.result.plans += plans - self._plans_counted if plans >= self._plans_counted else plans
        self._plans_counted = plans
        return metrics

    def _sample(self, now: float) -> None:
        try:
            metrics = self._metrics()
        except ray.exceptions.GetTimeoutError:
            self._violations.add(["the generator has not told its metrics for 60 s"])
            return
        self._samples.append(sample(now, metrics["outcomes"]))
        hit_rate, load = metrics["plan_hit_rate"], self._load
        figures = {"tokens": load.tokens, "hit_rate": hit_rate, "violations": self._violations.count}
        self._progress.update(round(now), **figures)

    def _look(self) -> None:
        for process in actors_of(self._campaign.driver):
            self._seen.add(process)
            self._shared |= shared_memory_of(process)

    def _weigh(self, now: float) -> None:
        for process in actors_of(self._campaign.driver):
            if (memory := memory_of(process)) is not None:
                self.result.memory[process.role, process.pid].append((now, memory))

    def _of(self, role: str) -> list[Process]:
        return [process for process in actors_of(self._campaign.driver) if process.role == role]

    def _evaluate(self, started: float, seconds: float) -> None:
        result, load = self.result, self._load
        result.generations, result.tokens, result.injections = load.generations, load.tokens, load.injections
        result.unplanned, result.cancelled = load.refused, load.cancelled
        result.bad_plans = read_ledger(self._ledger)
        ordered = {kind: claimed(self._ledger, kind) for kind in (EventKind.KILL, EventKind.SLEEP)}
        result.done.update({kind: len(times) for kind, times in ordered.items()})
        result.kills += len(ordered[EventKind.KILL])
        result.calm_rate = calm_rate(self._samples, self._phase.calm)
        kills = sorted([*(at - started for at in ordered[EventKind.KILL]), *self._hurt])
        if result.calm_rate:
            result.recovery, result.unrecovered = recovery_seconds(self._samples, kills, result.calm_rate, seconds)

    # ---------------------------------------------------------------- doing

    def _later(self, now: float, event: Event, undo: Callable[[], object]) -> None:
        self._undo.append((now + event.seconds, undo))

    def _undo_due(self, now: float) -> None:
        due = [undo for at, undo in self._undo if at <= now]
        self._undo = [(at, undo) for at, undo in self._undo if at > now]
        for undo in due:
            undo()

    def _kill_all(self, event: Event, now: float) -> bool:
        killed = signal_all(self._of("planner"), signal.SIGKILL)
        self.result.kills += killed
        self._hurt.append(now)
        return killed > 0

    def _stall(self, event: Event, now: float) -> bool:
        planners = self._of("planner")
        if not planners:
            return False
        stopped = [self._draw.choice(planners)]
        self._later(now, event, lambda: signal_all(stopped, signal.SIGCONT))
        return signal_all(stopped, signal.SIGSTOP) > 0

    def _kill_pool(self, event: Event, now: float) -> bool:
        killed = signal_all(self._of("pool"), signal.SIGKILL)
        if killed:
            self._hurt.append(now)
        return killed > 0

    def _cancel(self, event: Event, now: float) -> bool:
        return self._load.cancel_one(self._draw)

    def _change_weights(self, event: Event, now: float) -> bool:
        checkpoint = self._campaign.checkpoint
        newer = dataclasses.replace(checkpoint, model_version=checkpoint.model_version + 1)
        self._generator.update_planners.remote([share(newer)])
        self._later(now, event, lambda: self._generator.update_planners.remote([share(checkpoint)]))
        return True

    def _press(self, event: Event, now: float) -> bool:
        size = int(ray.cluster_resources().get("object_store_memory", 0) * PRESSURE_SHARE / 8)
        # In parts, so that one object need not find a hole of that size.
        self._ballast += [ray.put(np.ones(size, np.uint8)) for _ in range(8)]
        self._later(now, event, self._ballast.clear)
        return True

    _actions: ClassVar[dict[EventKind, Callable[[_Running, Event, float], bool]]] = {
        EventKind.KILL_ALL: _kill_all,
        EventKind.STALL: _stall,
        EventKind.KILL_POOL: _kill_pool,
        EventKind.CANCEL: _cancel,
        EventKind.WEIGHTS: _change_weights,
        EventKind.PRESSURE: _press,
    }


def _ready(metrics: dict[str, Any]) -> int:
    return int(metrics.get("pool", {}).get("planners", {}).get("ready", 0))
