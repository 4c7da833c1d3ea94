"""A planner that makes plans bad, stalls and dies on schedule.

Invariants:

* what it does to a plan depends on the seed and the request; when it does it, on the clock of its machine;
* a bad plan goes the way of a good one: it is an answer of :meth:`~actors.planner.PlannerActor.plan`;
* every plan carries a note of what was done to it, and every deed is written into the ledger, a folder, before the
  answer leaves: a planner that is killed has lost nothing of it;
* an order to die or to sleep is carried out by exactly one planner: the first that searches when it is due.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from actors.planner import PlannerActor
from crsm.types import Plan, PlanRequest
from jobs.faults.corruption import corrupt, mark
from jobs.faults.schedule import BadPlan, Event, EventKind, Phase, fate_of

DIES_AFTER = 0.001
"""Seconds into a search."""
DELAY = 0.1
"""Seconds at most that a delayed plan, and what is in the same answer, comes later."""
CLOCK_FILE = "started"
"""In the ledger: when the phase started, in ``time.time()`` seconds. Until it is there, nothing goes wrong."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a planner is to do wrong."""

    seed: int
    phase: Phase
    ledger: str
    """A folder of the machine on which everything runs."""
    vocabulary: int
    """Tokens that the model knows."""


def faulty_planner(orders: Orders) -> type[FaultyPlanner]:
    """A planner class that follows these orders."""
    return type("OrderedFaultyPlanner", (FaultyPlanner,), {"orders": orders})


class FaultyPlanner(PlannerActor):
    """Use :func:`faulty_planner`: Ray hands over the class, and the orders with it."""

    orders: ClassVar[Orders]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._ledger = Path(self.orders.ledger)
        self._book = Ledger(self._ledger, os.getpid())
        self._again: list[Plan] = []
        """Plans that will come once more."""

    def plan(self, requests: list[PlanRequest], *rest: Any, **named: Any) -> list[Plan]:
        now = self._now()
        if now is None:
            return [mark(plan, None) for plan in super().plan(requests, *rest, **named)]
        if self._obeys(EventKind.KILL, now):
            threading.Timer(DIES_AFTER, os.kill, (os.getpid(), signal.SIGKILL)).start()
            super().plan(requests, *rest, **named)
            time.sleep(60)  # had the search been shorter than that
        plans = super().plan(requests, *rest, **named)
        if (sleep := self._obeys(EventKind.SLEEP, now)) is not None:
            time.sleep(sleep.seconds)
        if not any(storm.at <= now < storm.at + storm.seconds for storm in self.orders.phase.of(EventKind.STORM)):
            return [mark(plan, None) for plan in plans]
        return self._storm(plans)

    def _storm(self, plans: Sequence[Plan]) -> list[Plan]:
        others = sorted({plan.generation_id for plan in plans})
        answer, again = [*self._again], []
        delay, done = 0.0, Counter[BadPlan]()
        for plan in plans:
            fate = fate_of(self.orders.seed, plan.request_id)
            if fate is None:
                answer.append(mark(plan, None))
                continue
            done[fate] += 1
            draw = random.Random(f"deed {self.orders.seed} {plan.request_id}")
            bad = mark(corrupt(plan, fate, self.orders.vocabulary, others, draw), fate)
            match fate:
                case BadPlan.LOST:
                    continue
                case BadPlan.DUPLICATED:
                    answer += [bad, bad]
                    again.append(bad)
                case BadPlan.REORDERED:
                    answer.insert(draw.randrange(len(answer) + 1), bad)
                case BadPlan.DELAYED:
                    delay = max(delay, draw.uniform(DELAY / 10, DELAY))
                    answer.append(bad)
                case _:
                    answer.append(bad)
        self._again = again
        self._book.write(done)
        time.sleep(delay)
        return answer

    def _now(self) -> float | None:
        """Seconds since the phase started."""
        started = started_at(self._ledger)
        return None if started is None else time.time() - started

    def _obeys(self, kind: EventKind, now: float) -> Event | None:
        """An order that is due and that nobody has carried out."""
        for event in self.orders.phase.of(kind):
            if event.at <= now and claim(self._ledger, event):
                return event
        return None


class Ledger:
    """What a planner did, a line for each deed, in a file of its own."""

    def __init__(self, folder: Path, pid: int) -> None:
        self._file = open(folder / f"deeds-{pid}-{time.time_ns()}", "a", encoding="utf-8", buffering=1)

    def write(self, deeds: Counter[BadPlan]) -> None:
        if deeds:
            self._file.write("".join(f"{deed.value}\n" for deed in deeds.elements()))
            self._file.flush()


def read_ledger(folder: Path) -> Counter[BadPlan]:
    """What all planners did. A line that was being written when its planner died does not count."""
    deeds: Counter[BadPlan] = Counter()
    for file in folder.glob("deeds-*"):
        text = file.read_text(encoding="utf-8")
        deeds.update(BadPlan(line) for line in text[: text.rfind("\n") + 1].split())
    return deeds


def claim(folder: Path, event: Event) -> bool:
    """Takes an order; whether nobody had it before. Survives the one who takes it."""
    try:
        with open(folder / f"order-{event.kind.value}-{event.number}", "x", encoding="utf-8") as file:
            file.write(repr(time.time()))
    except FileExistsError:
        return False
    return True


def claimed(folder: Path, kind: EventKind) -> list[float]:
    """When the orders of a kind were taken, in ``time.time()`` seconds."""
    texts = (file.read_text(encoding="utf-8") for file in folder.glob(f"order-{kind.value}-*"))
    return sorted(float(text) for text in texts if text)


def start_clock(folder: Path, now: float) -> None:
    """Has the phase start: readers find the whole number or none."""
    (folder / "starting").write_text(repr(now), encoding="utf-8")
    (folder / "starting").rename(folder / CLOCK_FILE)


def started_at(folder: Path) -> float | None:
    try:
        return float((folder / CLOCK_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
