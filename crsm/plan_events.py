"""What happens to the plans of a generation that is watched, as it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
