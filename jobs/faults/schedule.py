"""What goes wrong when: a pure function of a seed and a time.

Invariants:

* the same seed and time give the same schedule, event for event;
* time is cut into rounds; in each, planners die one by one, plans are bad in a storm that begins before the last of
  them has died, and the rest of the round is calm: nothing goes wrong there, so that hit rates have something to be
  compared with;
* phases are whole rounds, the paced ones first;
* what happens to a request's plan depends on the seed and the request alone, not on the planner or the moment.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

ROUND_SECONDS = 20.0
KILLS_PER_ROUND = 4
CANCELS_PER_ROUND = 4
"""Of a whole round; a shorter one has fewer."""
FAULTS_UNTIL = 0.45
"""Share of a round in which processes are hurt."""
STORM_FROM, STORM_UNTIL = 0.1, 0.75
"""Shares of a round between which plans are made bad."""
SHARE_OF_BAD_PLANS = 0.8
"""In a storm."""


class EventKind(str, enum.Enum):
    """What is done to the system."""

    KILL = "kill"
    """A planner dies in mid-search, by SIGKILL."""
    KILL_ALL = "kill_all"
    """All planners die at once."""
    STALL = "stall"
    """A planner is stopped (SIGSTOP) for a while."""
    SLEEP = "sleep"
    """A deliberation sleeps for a while before it answers."""
    STORM = "storm"
    """Plans are lost, doubled, reordered, delayed and made bad for a while."""
    CANCEL = "cancel"
    """A running generation is cancelled."""
    WEIGHTS = "weights"
    """Planners get weights of another version for a while, then the right ones again."""
    PRESSURE = "pressure"
    """The object store is filled for a while."""
    KILL_POOL = "kill_pool"
    """The process that dispatches to the planners dies, where there is one."""


EXTRAS = (
    EventKind.KILL_ALL,
    EventKind.STALL,
    EventKind.SLEEP,
    EventKind.WEIGHTS,
    EventKind.PRESSURE,
    EventKind.KILL_POOL,
)
"""Two of them in every round, one in a short one, each as often as the others."""


class BadPlan(str, enum.Enum):
    """What is done to a plan on its way."""

    NAN = "nan"
    INFINITY = "infinity"
    SHAPE = "shape"
    VOCABULARY = "vocabulary"
    CONFIDENCE = "confidence"
    VERSION = "version"
    GENERATION = "generation"
    POSITION = "position"
    TARGET = "target"
    UNKNOWN = "unknown"
    """It names a request that nobody made."""
    LOST = "lost"
    DUPLICATED = "duplicated"
    """It comes twice in its answer, and once more with a later one."""
    REORDERED = "reordered"
    DELAYED = "delayed"

    @property
    def is_sound(self) -> bool:
        """What it holds is right all the same: it may be applied."""
        return self in (BadPlan.LOST, BadPlan.DUPLICATED, BadPlan.REORDERED, BadPlan.DELAYED)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that is done."""

    at: float
    """Seconds after the start of its phase."""
    kind: EventKind
    seconds: float = 0.0
    """How long it lasts."""
    number: int = 0
    """Its place among the events of its kind in its phase."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Some rounds under one generator."""

    seconds: float
    paced: bool
    events: tuple[Event, ...]
    """In order of time."""
    calm: tuple[tuple[float, float], ...]
    """From when to when nothing goes wrong."""

    def of(self, kind: EventKind) -> tuple[Event, ...]:
        return tuple(event for event in self.events if event.kind is kind)


def schedule(seed: int, seconds: float) -> tuple[Phase, ...]:
    """The phases of a run.

    Raises:
        ValueError: no time at all.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds = {seconds}; allowed: more than 0")
    draw = random.Random(f"schedule {seed}")
    rounds = max(1, round(seconds / ROUND_SECONDS))
    unpaced = 0 if rounds == 1 else max(1, rounds // 3)
    length = seconds / rounds
    each = 2 if length >= ROUND_SECONDS / 2 else 1
    extras = _in_turn(draw, each * rounds)
    plan = [_round(draw, length, extras[each * index : each * (index + 1)]) for index in range(rounds)]
    phases = [_phase(plan[: rounds - unpaced], length, paced=True)]
    if unpaced:
        phases.append(_phase(plan[rounds - unpaced :], length, paced=False))
    return tuple(phases)


def fate_of(seed: int, request_id: int, share: float = SHARE_OF_BAD_PLANS) -> BadPlan | None:
    """What becomes of a request's plan in a storm; None: nothing."""
    draw = random.Random(f"plan {seed} {request_id}")
    return draw.choice(tuple(BadPlan)) if draw.random() < share else None


def _in_turn(draw: random.Random, count: int) -> list[EventKind]:
    kinds: list[EventKind] = []
    while len(kinds) < count:
        kinds += draw.sample(EXTRAS, len(EXTRAS))
    return kinds[:count]


def _round(draw: random.Random, length: float, extras: Sequence[EventKind]) -> list[Event]:
    hurt = FAULTS_UNTIL * length
    events = [Event(STORM_FROM * length, EventKind.STORM, (STORM_UNTIL - STORM_FROM) * length)]
    kills, cancels = (max(1, round(each * length / ROUND_SECONDS)) for each in (KILLS_PER_ROUND, CANCELS_PER_ROUND))
    share = hurt / kills  # one in each: planners need seconds to start, and the dead cannot be killed
    events += [Event((index + draw.random()) * share, EventKind.KILL) for index in range(kills)]
    events += [Event(draw.uniform(0, STORM_UNTIL * length), EventKind.CANCEL) for _ in range(cancels)]
    # Whatever lasts is over before the calm.
    longest = min(3.0, (STORM_UNTIL - FAULTS_UNTIL) * length)
    events += [Event(draw.uniform(0, hurt), kind, draw.uniform(longest / 3, longest)) for kind in extras]
    return events


def _phase(rounds: Sequence[list[Event]], length: float, paced: bool) -> Phase:
    ordered = sorted(
        (
            Event(event.at + index * length, event.kind, event.seconds)
            for index, one in enumerate(rounds)
            for event in one
        ),
        key=lambda event: (event.at, event.kind.value),
    )
    seen: dict[EventKind, int] = {}
    events = []
    for event in ordered:
        number = seen[event.kind] = seen.get(event.kind, -1) + 1
        events.append(Event(event.at, event.kind, event.seconds, number))
    calm = tuple(((index + STORM_UNTIL) * length, (index + 1) * length) for index in range(len(rounds)))
    return Phase(len(rounds) * length, paced, tuple(events), calm)
