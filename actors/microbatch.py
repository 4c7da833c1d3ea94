"""Which of the waiting requests make up a search, and with what budgets. Pure.

All plans of a search come back together, when its largest tree is done. So a micro-batch is filled in the order of the
ranking, and its budgets are cut, alike for all, until the search is back by the earliest deadline in it:

* never below ``least`` simulations; a request that cannot be on time even so, but before it expires, is late anyway: it
  gets ``least`` simulations and is cut off only when it expires;
* a request that would cost the others more simulations than it gets waits for another search;
* requests with and without a deadline are not mixed, so that one without is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.ranking import Ask, Turn
from actors.service_time import ServiceTime

_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request gets."""

    ask: Ask
    simulations: int
    deadline: float | None
    """For the search: the request's, or when it expires if it is late anyway."""

    @property
    def is_shrunk(self) -> bool:
        return self.simulations < self.ask.simulations


def as_asked(asks: Sequence[Ask]) -> tuple[Grant, ...]:
    """A batch that is taken as it is."""
    return tuple(Grant(ask, ask.simulations, ask.deadline) for ask in asks)


def hopeless(ask: Ask, start: float, service: ServiceTime, least: int) -> bool:
    """Whether a search of this request alone, from ``start`` on, would be back after it expires."""
    if ask.expires is None:
        return False
    steps = min(least, ask.simulations)
    return start + service.estimate(steps, steps * ask.hypotheses) > ask.expires


def fill(
    order: Sequence[Turn], start: float, service: ServiceTime, max_batch: int, least: int
) -> tuple[list[Turn], tuple[Grant, ...]]:
    """A micro-batch for a planner that is free from ``start`` on: the turns taken, and what each of them gets."""
    taken: list[Turn] = []
    late: list[bool] = []
    limit, cap = _NEVER, _NEVER
    steps = work = trees = granted = 0
    for turn in order:
        if len(taken) == max_batch:
            break
        ask = turn.ask
        if taken and (ask.deadline is None) != (taken[0].ask.deadline is None):
            continue
        floor = min(least, ask.simulations)
        if hopeless(ask, start, service, least):
            continue
        is_late = ask.deadline is not None and start + service.estimate(floor, floor * ask.hypotheses) > ask.deadline
        by = ask.expires if is_late else ask.deadline
        budget = floor if is_late else ask.simulations
        new_limit = min(limit, _NEVER if by is None or ask.deadline is None else by)
        new_steps, new_work, new_trees = max(steps, budget), work + budget * ask.hypotheses, trees + ask.hypotheses
        new_cap, new_granted = _NEVER, float(new_work)
        if start + service.estimate(new_steps, new_work) > new_limit:
            new_cap = service.affordable(new_limit - start, new_trees)
            new_granted = min(new_work, new_cap * new_trees)
        if taken and (new_cap < min(least, new_steps) or new_granted < granted):
            continue
        limit, cap, steps, work, trees, granted = new_limit, new_cap, new_steps, new_work, new_trees, int(new_granted)
        taken.append(turn)
        late.append(is_late)
    return taken, tuple(_grant(turn.ask, is_late, cap, least) for turn, is_late in zip(taken, late, strict=True))


def _grant(ask: Ask, is_late: bool, cap: float, least: int) -> Grant:
    floor = min(least, ask.simulations)
    if is_late:
        return Grant(ask, floor, ask.expires)
    return Grant(ask, ask.simulations if cap >= ask.simulations else max(floor, int(cap)), ask.deadline)


def in_excess(order: Sequence[Turn], room: int, now: float) -> list[Ask]:
    """What to drop so that ``room`` requests are left: those whose target has passed, oldest first, then the last."""
    surplus = len(order) - room
    if surplus <= 0:
        return []
    passed = [turn.ask for turn in order if turn.ask.deadline is not None and turn.ask.deadline < now]
    dropped = sorted(passed, key=lambda ask: ask.ticket)[:surplus]
    gone = {ask.ticket for ask in dropped}
    last = (turn.ask for turn in reversed(order) if turn.ask.ticket not in gone)
    return [*dropped, *(ask for ask, _ in zip(last, range(surplus - len(dropped)), strict=False))]
