"""The event log: everything that must be known to say the same text again without a planner.

One JSON object a line. ``start`` (checkpoint version, prompt, sampling), ``request``, ``inject`` (position, gates,
hash of the write, the write itself), ``reject`` (reason) and ``token``. :func:`read_log` gives the generations of a
file with their injections; replaying applies these at the recorded positions.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from crsm.config import DeliberationConfig, SamplingConfig
from crsm.types import Injection, Plan, Reason, Token

Event = dict[str, Any]
"""One line of a log, plain data."""

FORMAT = 1
_ARRAYS = (
    "value_root_L",
    "value_plan_L",
    "confidence_L",
    "write_u_LRE",
    "write_b_LRN",
    "policy_tokens_A",
    "policy_probs_A",
)
_DTYPES = ("float32", "int64", "uint16")
"""uint16: a write rounded to bf16 (:mod:`crsm.wire`)."""


@dataclass(slots=True)
class LoggedGeneration:
    """One generation as a log tells it."""

    generation_id: str
    prompt: tuple[int, ...]
    sampling: SamplingConfig
    deliberation: DeliberationConfig
    model_version: int
    model_hash: str
    injections: dict[int, Injection] = field(default_factory=dict)
    """By position."""
    tokens: list[int] = field(default_factory=list)


def start_event(
    generation_id: str,
    prompt: tuple[int, ...],
    sampling: SamplingConfig,
    deliberation: DeliberationConfig,
    model_version: int,
    model_hash: str,
    *,
    fresh: bool = True,
) -> Event:
    """``fresh``: from the beginning, not from a state that no log holds."""
    return {
        "event": "start",
        "format": FORMAT,
        "fresh": fresh,
        "generation": generation_id,
        "prompt": list(prompt),
        "sampling": sampling.model_dump(mode="json"),
        "deliberation": deliberation.model_dump(mode="json"),
        "model_version": model_version,
        "model_hash": model_hash,
    }


def request_event(generation_id: str, request_id: int, position: int, target: int, model_version: int) -> Event:
    """A plan was asked for."""
    return {
        "event": "request",
        "generation": generation_id,
        "request": request_id,
        "position": position,
        "target": target,
        "model_version": model_version,
    }


def inject_event(injection: Injection) -> Event:
    """A plan was applied; with everything that is needed to apply it again."""
    plan = injection.plan
    return {
        "event": "inject",
        "generation": plan.generation_id,
        "request": plan.request_id,
        "position": injection.position,
        "target": plan.target,
        "requested_at": plan.position,
        "alpha": list(injection.alpha_L),
        "policy_weight": injection.policy_weight,
        "assumed": list(plan.assumed),
        "line": list(plan.line),
        "uncertainty": plan.uncertainty,
        "simulations": plan.simulations,
        "planner": plan.planner_id,
        "model_version": plan.model_version,
        "hash": write_hash(plan),
        "arrays": {name: _encode(getattr(plan, name)) for name in _ARRAYS},
    }


def reject_event(generation_id: str, request_id: int, target: int, reason: Reason) -> Event:
    """A plan was not applied."""
    return {
        "event": "reject",
        "generation": generation_id,
        "request": request_id,
        "target": target,
        "reason": reason.value,
    }


def token_event(token: Token) -> Event:
    """A token was said."""
    return {
        "event": "token",
        "generation": token.generation_id,
        "position": token.position,
        "token": token.token,
        "logprob": token.logprob,
        "finish": token.finish_reason,
    }


class EventLog:
    """Writes events to an open text file, a line each, flushed."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, event: Event) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def write_hash(plan: Plan) -> str:
    """Identity of a plan's write."""
    digest = hashlib.sha256(plan.write_u_LRE.tobytes())
    digest.update(plan.write_b_LRN.tobytes())
    return digest.hexdigest()[:16]


def read_log(path: str | Path) -> list[LoggedGeneration]:
    """The generations of a log, in the order in which they started.

    Raises:
        ValueError: naming file and line, for anything that is not a whole log of this format.
    """
    generations: dict[str, LoggedGeneration] = {}
    for number, event in _lines(path):
        try:
            _apply(event, generations)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not an event of this log: {error}") from error
    if not generations:
        raise ValueError(f"{path}: holds no generation; allowed: a file written with --event-log")
    return list(generations.values())


def _lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"event log {str(path)!r} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(event, dict):
            raise ValueError(f"{path}, line {number}: a {type(event).__name__}; allowed: an object")
        yield number, event


def _apply(event: dict[str, Any], generations: dict[str, LoggedGeneration]) -> None:
    kind, name = event["event"], event["generation"]
    if kind == "start":
        if event["format"] != FORMAT:
            raise ValueError(f"format = {event['format']}; allowed: {FORMAT}")
        if not event.get("fresh", True):
            raise ValueError(f"generation {name!r} goes on from a saved state, which a log does not hold")
        generations[name] = LoggedGeneration(
            name,
            tuple(event["prompt"]),
            SamplingConfig.model_validate(event["sampling"]),
            DeliberationConfig.model_validate(event["deliberation"]),
            event["model_version"],
            event["model_hash"],
        )
    elif kind == "inject":
        injection = _decode_injection(event)
        generations[name].injections[injection.position] = injection
    elif kind == "token":
        if event["token"] >= 0:  # the last event of a cancelled generation says no token
            generations[name].tokens.append(int(event["token"]))
    elif kind not in ("request", "reject"):
        raise ValueError(f"event = {kind!r}; allowed: start, request, inject, reject, token")


def _decode_injection(event: dict[str, Any]) -> Injection:
    arrays: dict[str, Any] = {name: _decode(event["arrays"][name]) for name in _ARRAYS}
    plan = Plan(
        request_id=event["request"],
        generation_id=event["generation"],
        position=event["requested_at"],
        target=event["target"],
        assumed=tuple(event["assumed"]),
        line=tuple(event["line"]),
        uncertainty=event["uncertainty"],
        simulations=event["simulations"],
        planner_id=event["planner"],
        model_version=event["model_version"],
        **arrays,
    )
    if write_hash(plan) != event["hash"]:
        raise ValueError(f"the write has hash {write_hash(plan)}; the event says {event['hash']}")
    return Injection(plan, event["position"], tuple(event["alpha"]), event["policy_weight"])


def _encode(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def _decode(field: dict[str, Any]) -> np.ndarray:
    if field["dtype"] not in _DTYPES:
        raise ValueError(f"dtype = {field['dtype']!r}; allowed: {', '.join(_DTYPES)}")
    return np.frombuffer(base64.b64decode(field["data"]), dtype=field["dtype"]).reshape(field["shape"]).copy()
