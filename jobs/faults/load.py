"""Clients that keep generations running and have every one checked.

Invariants:

* each client has one generation at a time, and starts the next when it has ended;
* every generation is checked when it has ended, however it ended, and its tokens are then forgotten;
* a client never ends before its stream does; a stream that does not end is a violation.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from crsm.config import DeliberationConfig, SamplingConfig
from crsm.types import Token
from jobs.faults.invariants import Record, Rules, check_generation

PATIENCE = 120.0
"""Seconds that a stream may take to end when no new ones are begun."""
MESSAGES = 20
"""Violations that are kept in words."""


class Violations:
    """Counts them all, and keeps the first ones in words."""

    def __init__(self) -> None:
        self.count = 0
        self.messages: list[str] = []
        self._lock = threading.Lock()

    def add(self, messages: Sequence[str]) -> None:
        with self._lock:
            self.count += len(messages)
            self.messages += messages[: max(0, MESSAGES - len(self.messages))]


class Load:
    """So many clients of one generator."""

    def __init__(
        self,
        generator: Any,
        prompts: Sequence[tuple[int, ...]],
        concurrency: int,
        sampling: SamplingConfig,
        deliberation: DeliberationConfig,
        rules: Rules,
        violations: Violations,
        name: str,
        seed: int,
    ) -> None:
        """
        Args:
            generator: the actor.
            prompts: what to say on from, drawn at random.
            concurrency: clients.
            sampling: of every generation.
            deliberation: likewise.
            rules: what every generation is held to.
            violations: takes what is found.
            name: begins every generation's id.
            seed: of the drawing.
        """
        self.generations = self.tokens = self.injections = self.cancelled = self.refused = 0
        self._generator, self._prompts, self._rules = generator, prompts, rules
        self._sampling, self._deliberation, self._violations = sampling, deliberation, violations
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[str, Record] = {}
        self._applied: set[int] = set()
        self._threads = [
            threading.Thread(
                target=self._work, args=(f"{name}-{index}", random.Random(f"load {seed} {name} {index}")), daemon=True
            )
            for index in range(concurrency)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, patience: float = PATIENCE) -> None:
        """Begins no more generations; returns when those that run have ended."""
        self._stopping.set()
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        left = [thread for thread in self._threads if thread.is_alive()]
        self._violations.add([f"a stream has not ended after {patience:.0f} s"] * len(left))

    def cancel_one(self, draw: random.Random) -> bool:
        """Has a running generation cancelled; whether there was one."""
        with self._lock:
            running = sorted(name for name, record in self._running.items() if record.tokens)
            if not running:
                return False
            name = draw.choice(running)
            self._running[name].asked_to_cancel = True
        self._generator.cancel.remote(name)
        return True

    def _work(self, name: str, draw: random.Random) -> None:
        number = 0
        while not self._stopping.is_set():
            record = Record(f"{name}-{number}", draw.choice(self._prompts))
            number += 1
            self._read(record)
            if record.error is not None:
                self._stopping.wait(0.5)  # a generator that is gone is not asked a thousand times

    def _read(self, record: Record) -> None:
        with self._lock:
            self._running[record.generation_id] = record
        try:
            for token in stream(self._generator, record, self._sampling, self._deliberation):
                record.tokens.append(token)
        except Exception as error:  # whatever it is, it is a violation, and the other clients go on
            record.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        found = self._check(record)
        with self._lock:
            del self._running[record.generation_id]
            self.generations += 1
            self.tokens += len(record.said)
            self.injections += (injections := sum(token.injection is not None for token in record.tokens))
            self.refused += not injections
            self.cancelled += any(token.finish_reason == "cancelled" for token in record.tokens)
        self._violations.add(found)

    def _check(self, record: Record) -> list[str]:
        try:
            found = check_generation(record, self._rules)
        except Exception as error:  # a check that fails has not found that all is well
            return [f"generation {record.generation_id}: the check failed: {type(error).__name__}: {error}"]
        asked = {token.injection.plan.request_id for token in record.tokens if token.injection is not None}
        with self._lock:
            twice = self._applied & asked
            self._applied |= asked
        return found + [f"the plan of request {request} was applied in two generations" for request in sorted(twice)]


def stream(
    generator: Any, record: Record, sampling: SamplingConfig, deliberation: DeliberationConfig
) -> Iterator[Token]:
    """The tokens of one generation, as its actor streams them: one by one or several at a time."""
    answers = generator.generate.remote(record.prompt, sampling, deliberation, None, record.generation_id)
    for reference in answers:
        said = ray.get(reference)
        if isinstance(said, Token):
            yield said
        else:
            yield from said
