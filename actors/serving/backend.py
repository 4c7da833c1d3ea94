"""What the HTTP front needs of whoever generates."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.state_store import StateHandle
from crsm.config import Config
from crsm.data.tokenizer import Tokenizer
from crsm.generation import GenerationRequest
from crsm.plan_events import PlanEvent
from crsm.saved_generation import SavedGeneration
from crsm.types import Token

Item = Token | PlanEvent | SavedGeneration
"""What a generation hands out."""


class GenerationFailed(RuntimeError):
    """A generation ended without its last token: its generator was closed, failed, or died."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind a backend."""

    name: str
    created: int
    """Seconds since the epoch."""
    tokenizer: Tokenizer
    config: Config
    """The checkpoint's settings with the server's on top: what a request does not say is taken from here."""
    weights_hash: str
    model_version: int
    consensus_weights_L: tuple[float, ...]
    """Weights of the layers' values in their consensus."""
    chat_template: str | None = None
    """Jinja template of a conversation; None: the default one."""


@dataclass(frozen=True, slots=True)
class PlannerCount:
    """How many planners there are."""

    count: int
    maximum: int
    """0: the number cannot be changed."""


class Backend(Protocol):
    """One generator with its planners, and the states that it keeps.

    Errors: ``ValueError`` for what cannot be carried out (nothing was said), :class:`~crsm.engine.QueueFull` for what
    may be tried again, :class:`GenerationFailed` when the generator is gone.
    """

    @property
    def model(self) -> ServedModel: ...

    async def is_ready(self) -> bool:
        """Whether a generation would begin now."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Item], None]:
        """One generation's items in bundles, in order; the last one is a finished token. ``generation_id`` must be set.

        Closing the generator, or cancelling whoever waits for it, cancels the generation at its next token.
        """
        ...

    async def snapshot(self, generation_id: str) -> SavedGeneration:
        """A speaking generation as it stands between two tokens; it goes on.

        Raises:
            ValueError: there is none of this name that has said a token.
        """
        ...

    async def put_state(self, saved: SavedGeneration, seconds: float, owner: str) -> StateHandle:
        """Keeps a state for a time; only its owner finds it again.

        Raises:
            ValueError: it is larger than the store.
        """
        ...

    async def get_state(self, handle: str, owner: str) -> tuple[SavedGeneration, StateHandle]:
        """A kept state, and what is left of its time.

        Raises:
            ValueError: there is none, its time is over, or it is another owner's.
        """
        ...

    async def drop_state(self, handle: str, owner: str) -> bool:
        """Forgets a state; whether there was one of this owner's."""
        ...

    async def planners(self) -> PlannerCount: ...

    async def set_planners(self, count: int) -> PlannerCount:
        """Has so many planners from now on.

        Raises:
            ValueError: the number cannot be changed, or not to this.
        """
        ...

    async def metrics(self) -> dict[str, Any]:
        """Counters of the generator, plain data."""
        ...
