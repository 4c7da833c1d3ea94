"""What happens to the plans of a generation that is watched, as it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from crsm.generation import Generation
from crsm.types import Injection, Plan, Reason

EventKind = Literal["request", "plan", "inject", "reject"]


@dataclass(frozen=True, slots=True)
class PlanEvent:
    """One event. Every request ends with exactly one ``reject`` or, if its plan was applied, ``inject``."""

    generation_id: str
    kind: EventKind
    seconds: float
    """Since the generation was accepted, on the engine's clock."""
    request_id: int
    """-1: declined before it became a request."""
    position: int
    """``request``: of the token that was known; ``inject``: before whose consumption the plan was applied; else: of the
    generation's last token."""
    target: int
    """Position before whose consumption the plan is to be written."""
    lag: int
    """Tokens between the request and its target."""
    reason: Reason | None = None
    """``inject``: on time or late; ``reject``: why."""
    plan: Plan | None = None
    """``plan``: what came, with its tree if trees were asked for; ``inject``: what was applied."""
    injection: Injection | None = None
    """``inject``: how it was applied."""


class PlanEvents:
    """The events of one engine that nobody has taken yet."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: list[PlanEvent] = []

    def take(self) -> list[PlanEvent]:
        """What happened since the last time, in order."""
        events, self._events = self._events, []
        return events

    def tell(
        self,
        generation: Generation,
        kind: EventKind,
        request_id: int,
        asked_at: int,
        target: int,
        reason: Reason | None = None,
        plan: Plan | None = None,
        injection: Injection | None = None,
    ) -> None:
        """Takes note of an event, if the generation is watched; ``asked_at``: position of the request."""
        if generation.request.watch:
            seconds, lag = self._clock() - generation.accepted_at, target - asked_at
            at = generation.position
            self._events.append(
                PlanEvent(generation.id, kind, seconds, request_id, at, target, lag, reason, plan, injection)
            )
