"""What happens to plans, as JSON of the stream.

A plan is what some planner sent: before it was checked it may hold anything, so nothing here trusts a number to be
finite or a token to be in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from actors.serving.backend import ServedModel
from crsm.plan_events import PlanEvent
from crsm.search.consensus import consensus
from crsm.search.sketch import nested, unfit_sketch
from crsm.types import Injection, Plan, Token


class EventJson:
    """Writes the events of one model's generations."""

    def __init__(self, served: ServedModel) -> None:
        self._tokenizer = served.tokenizer
        self._weights_L = np.asarray(served.consensus_weights_L, np.float32)
        self._penalty = np.float32(served.config.model.critic.uncertainty_penalty)

    def event(self, event: PlanEvent) -> dict[str, Any]:
        """One event, as the stream tells it."""
        told: dict[str, Any] = {
            "type": f"crsm.{event.kind}",
            "t": number(event.seconds),
            "request": event.request_id if event.request_id >= 0 else None,
            "position": event.position,
            "target": event.target,
            "lag": event.lag,
        }
        if event.kind == "plan" and event.plan is not None:
            told |= self._plan(event.plan)
        elif event.kind == "inject":
            told |= self._inject(event)
        elif event.kind == "reject":
            told["reason"] = event.reason.value if event.reason is not None else None
        return told

    def injection(self, token: Token) -> dict[str, Any]:
        """The plan that was applied right before a token."""
        injection = token.injection
        assert injection is not None
        plan = injection.plan
        return {
            "position": injection.position,
            "token": token.token,
            "line": self.text(plan.line),
            **self._applied(injection),
            **self._values(plan),
            "lag": plan.target - plan.position,
            "late": injection.position - plan.target,
        }

    def text(self, ids: Iterable[Any]) -> str:
        """Some tokens as text, whatever they are."""
        decoder = self._tokenizer.stream()
        return "".join([self._piece(decoder, token) for token in ids]) + decoder.flush()

    def _piece(self, decoder: Any, token: Any) -> str:
        try:
            return str(decoder.push(token))
        except (TypeError, ValueError):
            return "\N{REPLACEMENT CHARACTER}"

    def _plan(self, plan: Plan) -> dict[str, Any]:
        told = {
            **self._values(plan),
            "uncertainty": number(plan.uncertainty),
            "gates": numbers(plan.confidence_L),
            "assumed": self.text(plan.assumed),
            "line": self.text(plan.line),
            "line_tokens": [int(token) for token in plan.line],
            "policy": [
                {"id": int(token), "text": self.text([token]), "probability": number(share)}
                for token, share in zip(_flat(plan.policy_tokens_A), _flat(plan.policy_probs_A), strict=False)
                if math.isfinite(token)
            ],
            "simulations": plan.simulations,
            "seconds": number(plan.seconds),
            "planner": plan.planner_id,
        }
        if plan.sketch_S6 is not None and not unfit_sketch(plan.sketch_S6):
            told["tree"] = self._tree(nested(plan.sketch_S6))
        return told

    def _inject(self, event: PlanEvent) -> dict[str, Any]:
        injection = event.injection
        if injection is None:
            return {}
        plan = injection.plan
        return {
            "late": injection.position - plan.target,
            "reason": event.reason.value if event.reason is not None else None,
            **self._applied(injection),
            **self._values(plan),
            "line": self.text(plan.line),
            "policy_weight": number(injection.policy_weight),
        }

    def _applied(self, injection: Injection) -> dict[str, Any]:
        return {"gates": numbers(injection.plan.confidence_L), "alpha": numbers(injection.alpha_L)}

    def _values(self, plan: Plan) -> dict[str, Any]:
        return {"value_now": self._value(plan.value_root_L), "value_planned": self._value(plan.value_plan_L)}

    def _value(self, values_L: Any) -> float | None:
        values = np.asarray(values_L)
        if values.shape != self._weights_L.shape or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            return None
        return number(float(consensus(values.astype(np.float32), self._weights_L, self._penalty)))

    def _tree(self, node: dict[str, Any]) -> dict[str, Any]:
        """A node and those below it; siblings come by their visits."""
        token = node["token"]
        return {
            "token": token,
            "text": "" if token is None else self.text([token]),
            "visits": node["visits"],
            "value": number(node["value"]),
            "prior": number(node["prior"]),
            "terminal": node["terminal"],
            "children": [self._tree(child) for child in node["children"]],
        }


def number(value: float) -> float | None:
    """A finite number, to six places; None for any other."""
    return round(float(value), 6) if math.isfinite(value) else None


def numbers(values: Any) -> list[float | None]:
    return [number(value) for value in _flat(values)]


def _flat(values: Any) -> Sequence[float]:
    array = np.asarray(values)
    flat: list[float] = array.ravel().tolist() if array.dtype.kind in "fiu" else []
    return flat
