"""What reaches the dispatcher of a planner pool, and what an error of an actor call means."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from actors.fleet import Failure
from actors.planner import PlannerInfo
from crsm.types import Plan, PlanRequest


@dataclass(frozen=True, slots=True)
class Submitted:
    requests: tuple[PlanRequest, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    planner: int
    incarnation: int
    batch: int
    result: Future[list[Plan]]


@dataclass(frozen=True, slots=True)
class Ponged:
    planner: int
    incarnation: int
    result: Future[PlannerInfo]


@dataclass(frozen=True, slots=True)
class Updated:
    planner: int
    incarnation: int
    result: Future[int]


@dataclass(frozen=True, slots=True)
class Gone:
    planner: int
    incarnation: int
    result: Future[None]


@dataclass(frozen=True, slots=True)
class NewWeights:
    source: Any


@dataclass(frozen=True, slots=True)
class Resize:
    count: int


@dataclass(frozen=True, slots=True)
class Close:
    pass


News = Submitted | Answered | Ponged | Updated | Gone | NewWeights | Resize | Close


def classify(error: BaseException) -> Failure:
    """What an error of an actor call says about the planner: an error of the deliberation, of the actor, or of Ray."""
    if isinstance(error, ActorUnavailableError):
        return Failure.UNREACHABLE
    if isinstance(error, RayActorError):
        return Failure.ACTOR_DIED
    return Failure.PLANNER_ERROR if isinstance(error, RayTaskError) else Failure.RESULT_LOST


def describe(error: BaseException) -> str:
    """One line of an error, without the remote traceback."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    shown = cause or error
    return f"{type(shown).__name__}: {(str(shown).splitlines() or [''])[0]}"
