"""The targeted delta buffer: plans wait here for the token that they were made for.

A plan is keyed by (generation, target). Right before the token at position ``p`` is consumed, the generation takes what
is due: plans for ``p`` and, if they arrived late, for up to ``max_lag`` positions before it. Every request ends with
exactly one :class:`~crsm.types.Reason`.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from crsm.config import BackboneConfig
from crsm.search.sketch import unfit_sketch
from crsm.types import Plan, Reason
from crsm.wire import is_finite


@dataclass(frozen=True, slots=True)
class Due:
    """What a generation found when it asked."""

    plan: Plan | None
    """The plan to apply."""
    late: int
    """Tokens after its target."""
    outcomes: tuple[tuple[Plan, Reason], ...]
    """One per request that was settled, the applied one included."""
    ranks: tuple[int, ...]
    """For every request with a usable plan: which of its futures came true, 0 for the likeliest."""


class Fault(str, enum.Enum):
    """What is wrong with a plan that came back."""

    SHAPE = "shape"
    """An array of another shape or type, or none."""
    NOT_FINITE = "not_finite"
    """NaN or infinity."""
    RANGE = "range"
    """A gate or a probability outside its range, or probabilities that do not sum to 1."""
    VOCABULARY = "vocabulary"
    """A token that the model does not know."""
    GENERATION = "generation"
    """Generation, position or target are not those of the request."""
    VERSION = "version"
    """Made with other weights."""
    DUPLICATE = "duplicate"
    """Its request is settled already."""
    UNKNOWN = "unknown"
    """No such request was ever made."""


class Malformed(NamedTuple):
    """What is wrong with a plan, as a kind and in words."""

    fault: Fault
    message: str


class DeltaBuffer:
    """Plans by generation and target."""

    def __init__(self) -> None:
        self._plans: defaultdict[str, dict[int, list[Plan]]] = defaultdict(dict)

    def __len__(self) -> int:
        return sum(len(plans) for targets in self._plans.values() for plans in targets.values())

    def __contains__(self, generation_id: str) -> bool:
        """Whether a generation may have plans waiting."""
        return generation_id in self._plans

    def put(self, plan: Plan) -> None:
        self._plans[plan.generation_id].setdefault(plan.target, []).append(plan)

    def take(self, generation_id: str, position: int, tokens: Sequence[int], first: int, max_lag: int) -> Due:
        """Takes everything due before the token at ``position`` is consumed.

        Args:
            generation_id: whose plans.
            position: the token about to be consumed.
            tokens: generated tokens, the one at ``position`` last.
            first: position of ``tokens[0]``.
            max_lag: how late a plan may be.
        """
        waiting = self._plans.get(generation_id, {})
        outcomes: list[tuple[Plan, Reason]] = []
        usable: list[Plan] = []
        ranks: list[int] = []
        for target in sorted(target for target in waiting if target <= position):
            by_request: dict[int, list[Plan]] = defaultdict(list)
            for plan in waiting.pop(target):
                by_request[plan.request_id].append(plan)
            for futures in by_request.values():
                matching = [rank for rank, plan in enumerate(futures) if matches(plan, tokens, first, position)]
                if position - target > max_lag:
                    outcomes.append((futures[0], Reason.STALE))
                elif not matching:
                    outcomes.append((futures[0], Reason.MISMATCH))
                else:
                    usable.append(futures[matching[0]])
                    ranks.append(matching[0])
        if not waiting:
            self._plans.pop(generation_id, None)
        chosen = next((plan for plan in reversed(usable) if plan.confidence_L.any()), None)
        for plan in usable:
            if plan is chosen:
                outcomes.append((plan, Reason.LATE if plan.target < position else Reason.ON_TIME))
            else:
                outcomes.append((plan, Reason.SUPERSEDED if plan.confidence_L.any() else Reason.SHUT))
        return Due(chosen, position - chosen.target if chosen else 0, tuple(outcomes), tuple(ranks))

    def drop(self, generation_id: str, target: int, request_id: int) -> None:
        """Forgets the plans of one request."""
        waiting = self._plans.get(generation_id, {})
        if target in waiting:
            waiting[target] = [plan for plan in waiting[target] if plan.request_id != request_id]

    def waiting(self, generation_id: str) -> list[Plan]:
        """The plans that wait for a generation, by target."""
        targets = self._plans.get(generation_id, {})
        return [plan for target in sorted(targets) for plan in targets[target]]

    def end(self, generation_id: str) -> list[Plan]:
        """Forgets a generation; returns the plans that were waiting for it."""
        return [plan for plans in self._plans.pop(generation_id, {}).values() for plan in plans]


def matches(plan: Plan, tokens: Sequence[int], first: int, position: int) -> bool:
    """Whether the text up to and with ``position`` is what the plan assumed and, past its target, what it planned."""
    expected = (*plan.assumed, *plan.line)
    start = plan.position + 1 - first
    said = tokens[start : position + 1 - first]
    # Past its line a plan has nothing more to say.
    return len(said) < len(plan.assumed) + max(1, len(plan.line)) and tuple(said) == expected[: len(said)]


def check_plan(plan: Plan, sizes: BackboneConfig, rank: int) -> Malformed | None:
    """What is wrong with a plan's form; None: nothing.

    A plan comes from another process: it is checked before it may touch a state.
    """
    layers = sizes.n_layer
    actions = plan.policy_tokens_A
    if not isinstance(actions, np.ndarray) or actions.ndim != 1 or actions.dtype.kind not in "iu":
        return Malformed(Fault.SHAPE, f"policy_tokens_A is {_form(actions)}; allowed: integers of one dimension")
    want = {
        "confidence_L": (layers,),
        "value_root_L": (layers,),
        "value_plan_L": (layers,),
        "write_u_LRE": (layers, rank, sizes.d_inner),
        "write_b_LRN": (layers, rank, sizes.d_state),
        "policy_probs_A": actions.shape,
    }
    for name, shape in want.items():
        array = getattr(plan, name)
        rounded = name.startswith("write") and isinstance(array, np.ndarray) and array.dtype == np.uint16
        if not isinstance(array, np.ndarray) or array.shape != shape or not (rounded or array.dtype.kind == "f"):
            return Malformed(Fault.SHAPE, f"{name} is {_form(array)}; allowed: floating point of shape {shape}")
        if not is_finite(array):
            return Malformed(Fault.NOT_FINITE, f"{name} holds NaN or infinity")
    # Lists: for a handful of numbers they take a fraction of numpy's time, and this runs in the decode thread.
    confidence, probs = plan.confidence_L.tolist(), plan.policy_probs_A.tolist()
    if min(confidence) < 0 or max(confidence) > 1:
        return Malformed(Fault.RANGE, f"confidence_L = {confidence}; allowed: [0, 1]")
    if min(probs, default=0.0) < 0 or abs(sum(probs) - 1) > 1e-3:
        return Malformed(Fault.RANGE, f"policy_probs_A = {probs}; allowed: probabilities that sum to 1")
    tokens = (*plan.assumed, *plan.line, *actions.tolist())
    if tokens and not (0 <= min(tokens) and max(tokens) < sizes.vocab_size):
        return Malformed(Fault.VOCABULARY, f"a token lies outside the vocabulary of {sizes.vocab_size}")
    if len(plan.assumed) != plan.target - plan.position:
        message = f"{len(plan.assumed)} assumed tokens for a lag of {plan.target - plan.position}"
        return Malformed(Fault.SHAPE, message)
    if plan.sketch_S6 is not None and (reason := unfit_sketch(plan.sketch_S6)):
        return Malformed(Fault.SHAPE, f"sketch_S6 {reason}")
    return None


def _form(array: object) -> str:
    """Type and shape of what stands in the place of an array."""
    return f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
