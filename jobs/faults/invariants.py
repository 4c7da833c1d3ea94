"""What may never happen, whatever goes wrong: checks on recorded tokens and on counters. Pure.

Each check gives messages, one for each violation; none is good news. Checked of every generation, token by token:

* positions are consecutive, every token names its generation, exactly one token is the last;
* a plan that was applied names this generation, was applied right before the token that carries it, between its target
  and ``max_lag`` tokens later, assumed and planned what was then said, is of the generator's version, and bears the
  note that it was a good one; no request's plan is applied twice;
* before the first plan that was applied, all tokens are System 1's: a refused plan changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crsm.types import Injection, Reason, Token
from jobs.faults.corruption import marked

CANCELLED = "cancelled"


@dataclass(slots=True)
class Record:
    """A generation as its reader saw it."""

    generation_id: str
    prompt: tuple[int, ...]
    tokens: list[Token] = field(default_factory=list)
    """In the order in which they came."""
    error: str | None = None
    """Why the stream broke off."""
    asked_to_cancel: bool = False

    @property
    def said(self) -> list[int]:
        """Token ids; the message that a generation was cancelled is none."""
        return [token.token for token in self.tokens if token.finish_reason != CANCELLED]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a generation was asked for."""

    max_lag: int
    max_tokens: int
    model_version: int
    reference: Callable[[tuple[int, ...]], Sequence[int]]
    """What System 1 says after a prompt, to its end."""
    tied: Callable[[tuple[int, ...], int, int], bool] = lambda text, one, other: False
    """Whether System 1 likes two tokens after a text equally well, to rounding: who shares a batch changes the last
    bits of its logits."""


def check_generation(record: Record, rules: Rules) -> list[str]:
    """Everything that is wrong with one generation."""
    found = [f"the stream broke off: {record.error}"] if record.error is not None else []
    found += _check_stream(record, rules)
    found += _check_injections(record, rules)
    found += _check_system_1(record, rules)
    return [f"generation {record.generation_id}: {message}" for message in found]


def _check_stream(record: Record, rules: Rules) -> list[str]:
    found = []
    first, tokens = len(record.prompt), record.tokens
    expected = first
    for token in tokens:
        if token.generation_id != record.generation_id:
            found.append(f"position {token.position} names generation {token.generation_id}")
        if token.finish_reason == CANCELLED:
            if not record.asked_to_cancel:
                found.append("cancelled, and nobody asked for it")
            continue  # says nothing: its position is that of the token before
        if token.position != expected:
            what = "lost" if token.position > expected else "duplicated"
            found.append(f"position {token.position} after {expected - 1}: a token was {what}")
        expected = token.position + 1
    ends = [index for index, token in enumerate(tokens) if token.finished]
    if len(ends) > 1:
        found.append(f"{len(ends)} tokens are the last")
    if record.error is None and (not ends or ends[0] != len(tokens) - 1):
        found.append("no token is the last" if not ends else f"{len(tokens) - 1 - ends[0]} tokens after the last")
    if len(record.said) > rules.max_tokens:
        found.append(f"{len(record.said)} tokens; allowed: {rules.max_tokens}")
    if any(token.finished is not (token.finish_reason is not None) for token in tokens):
        found.append("a token is the last without a reason, or has a reason and is not")
    return found


def _check_injections(record: Record, rules: Rules) -> list[str]:
    found = []
    first = len(record.prompt)
    at = {token.position: token.token for token in record.tokens if token.finish_reason != CANCELLED}
    applied: set[int] = set()
    for token in record.tokens:
        if (injection := token.injection) is None:
            continue
        plan = injection.plan
        where = f"the plan of request {plan.request_id} at position {injection.position}"
        if plan.generation_id != record.generation_id:
            found.append(f"{where} is one of generation {plan.generation_id}")
        if injection.position != token.position - 1:
            found.append(f"{where} came with the token at {token.position}")
        if not plan.target <= injection.position <= plan.target + rules.max_lag:
            found.append(f"{where} was made for {plan.target}; allowed: up to {rules.max_lag} later")
        if plan.model_version != rules.model_version:
            found.append(f"{where} is of version {plan.model_version}; allowed: {rules.model_version}")
        if plan.request_id in applied:
            found.append(f"{where} was applied before")
        applied.add(plan.request_id)
        if plan.position < first:
            found.append(f"{where} was asked for at {plan.position}, inside the prompt")
        elif (text := _misread(injection, at)) is not None:
            found.append(f"{where} {text}")
        try:
            fate = marked(plan.planner_id)
        except ValueError as error:
            found.append(f"{where}: {error}")
        else:
            if fate is not None and not fate.is_sound:
                found.append(f"{where} was a bad one ({fate.value})")
    return found


def _misread(injection: Injection, at: Mapping[int, int]) -> str | None:
    """How what a plan assumed and planned differs from what had been said when it was applied."""
    plan = injection.plan
    if len(plan.assumed) != plan.target - plan.position:
        return f"assumed {len(plan.assumed)} tokens for a lag of {plan.target - plan.position}"
    for offset, expected in enumerate((*plan.assumed, *plan.line)):
        position = plan.position + 1 + offset
        if position > injection.position:
            return None
        if at.get(position) != expected:
            return f"expected token {expected} at {position}, where {at.get(position)} was said"
    return None


def _check_system_1(record: Record, rules: Rules) -> list[str]:
    said = record.said
    untouched = next((i for i, token in enumerate(record.tokens) if token.injection is not None), len(said))
    expected = rules.reference(record.prompt)
    for index, token in enumerate(said[:untouched]):
        if index >= len(expected):
            return [f"{len(said)} tokens, where System 1 ends after {len(expected)}"]
        if token != expected[index]:
            if rules.tied((*record.prompt, *said[:index]), token, expected[index]):
                return []  # from here on it is another text
            position = len(record.prompt) + index
            return [f"token {token} at {position}, where System 1 says {expected[index]} and no plan was applied"]
    ended = record.tokens and record.tokens[-1].finish_reason not in (None, CANCELLED)
    if untouched == len(said) and ended and len(said) < len(expected):
        return [f"ended after {len(said)} tokens, where System 1 says {len(expected)}"]
    return []


def check_settled(metrics: Mapping[str, Any]) -> list[str]:
    """Whether every request was settled exactly once, by the counters of a generator that says nothing any more."""
    outcomes = metrics["outcomes"]
    settled = sum(outcomes.values()) - outcomes.get(Reason.DECLINED.value, 0)
    # What was declined was never asked; whether it is counted as a request is the generator's matter.
    if metrics["requests"] in (settled, sum(outcomes.values())):
        return []
    return [f"{metrics['requests']} requests and {settled} outcomes: {dict(outcomes)}"]
