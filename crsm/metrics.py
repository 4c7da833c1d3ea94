"""Counters of what became of the plans."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from crsm.delta_buffer import Fault
from crsm.latency import Histogram
from crsm.types import Injection, Plan, Reason


@dataclass(slots=True)
class PlanMetrics:
    """What an operator wants to know: how many requests, what became of them, what was written where."""

    requests: int = 0
    tokens: int = 0
    outcomes: Counter[Reason] = field(default_factory=Counter)
    injections: int = 0
    injections_per_layer: Counter[int] = field(default_factory=Counter)
    simulations: int = 0
    planner_seconds: float = 0.0
    request_bytes: int = 0
    plan_bytes: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    """Plans that were refused, or had nobody to go to, by what was wrong with them."""
    futures: Counter[int] = field(default_factory=Counter)
    """Which of a request's hypotheses came true, 0 the likeliest: how many of them are worth their search."""
    deliberation_seconds: float = 0.0
    """Time that the decode loop spent on requests and plans."""
    token_seconds: Histogram = field(default_factory=Histogram)
    """From one token of a generation to its next."""

    def plan_arrived(self, plan: Plan) -> None:
        self.simulations += plan.simulations
        self.planner_seconds += plan.seconds
        self.plan_bytes += plan.num_bytes

    def applied(self, injection: Injection) -> None:
        self.injections += 1
        for layer, alpha in enumerate(injection.alpha_L):
            if alpha > 0:
                self.injections_per_layer[layer] += 1

    @property
    def plan_hit_rate(self) -> float:
        """Share of the requests whose plan was usable at its target. Plans for a text that had ended do not count."""
        settled = sum(self.outcomes.values()) - self.outcomes[Reason.ENDED]
        hits = sum(count for reason, count in self.outcomes.items() if reason.is_hit)
        return hits / settled if settled else 0.0

    def forget_times(self) -> None:
        """Begins to measure times anew; counters go on."""
        self.planner_seconds = self.deliberation_seconds = 0.0
        self.token_seconds = Histogram()

    def summary(self) -> dict[str, Any]:
        """Plain data; whatever depends on how fast the machine is stands under ``times``, in seconds."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "plan_hit_rate": self.plan_hit_rate,
            "outcomes": {reason.value: self.outcomes[reason] for reason in Reason if self.outcomes[reason]},
            "injections": self.injections,
            "injections_per_layer": {str(layer): n for layer, n in sorted(self.injections_per_layer.items())},
            "simulations": self.simulations,
            "request_bytes": self.request_bytes,
            "plan_bytes": self.plan_bytes,
            "faults": {fault.value: self.faults[fault] for fault in Fault if self.faults[fault]},
            "futures": {str(rank): count for rank, count in sorted(self.futures.items())},
            "times": {
                "planners": self.planner_seconds,
                "deliberation": self.deliberation_seconds,
                "token": self.token_seconds.summary(),
            },
        }
