"""A generation: what is asked for, and what is kept of it while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from crsm.config import DeliberationConfig, SamplingConfig
from crsm.saved_generation import SavedGeneration
from crsm.steering import NEVER

TOKENS_KEPT = 1024
"""Tokens that are remembered at least: what plans are compared with."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to say on from, and how."""

    prompt: tuple[int, ...]
    """Tokens to consume first; may be empty if ``start`` is in the middle of a turn."""
    sampling: SamplingConfig = SamplingConfig()
    deliberation: DeliberationConfig = DeliberationConfig()
    simulations: int = 64
    generation_id: str = ""
    """Empty: a fresh one is made. The id of a parked generation: the prompt is its next turn."""
    pace: float | None = None
    """Tokens per second at most; None: the engine's."""
    park: bool = False
    """Keep the generation when its turn is over."""
    start: SavedGeneration | None = None
    """Go on from here: under a new id, on any engine with the same weights."""
    forced: tuple[int, ...] = ()
    """The first tokens to say, whatever the model would: what was said already, after a resumption."""
    snapshot_every: int = 0
    """Hand out a :class:`SavedGeneration` every so many tokens; 0: never."""
    keep: bool = False
    """Hand out the state when the turn is over, right before the last token."""
    read_only: bool = False
    """Consume the prompt, hand out the state, and end (with the reason ``read``) before a token is said."""
    reseed: bool = False
    """With ``start`` and no prompt: draw anew from ``sampling.seed`` instead of going on where the saved one was."""
    watch: bool = False
    """Hand out a :class:`~crsm.plan_events.PlanEvent` for everything that happens to its plans."""
    trees: bool = False
    """Have the search trees in the events."""


@dataclass(slots=True, eq=False)
class Generation:
    """A running generation's bookkeeping; its state lies in a slot."""

    id: str
    request: GenerationRequest
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    """The last tokens; the very last is not consumed."""
    first: int = 0
    """Position of ``tokens[0]``."""
    generated: int = 0
    """Tokens said in this turn."""
    slot: int = -1
    tick: int = -1
    """The beat of its pace at which it said its last token."""
    said_at: float = 0.0
    accepted_at: float = 0.0
    ask_at: int = 1
    """Tokens of this turn after which the next plan is due."""
    plans_asked: int = 0
    open_requests: set[int] = field(default_factory=set)
    """Ids of requests that are not settled."""
    forced: list[int] = field(default_factory=list)
    """Tokens to say, the next one last."""
    stops: frozenset[int] = frozenset()
    """Tokens that end it."""
    steered_until: int = NEVER
    """Position before whose consumption the write in force is withdrawn."""
    cancelled: bool = False

    @property
    def position(self) -> int:
        """Of the last token: the one about to be consumed."""
        return self.first + len(self.tokens) - 1

    def say(self, token: int) -> int:
        """Takes note of a token; forgets what no plan can be compared with any more. Returns the token's position."""
        self.tokens.append(token)
        self.generated += 1
        if len(self.tokens) > 4 * TOKENS_KEPT:
            self._forget()
        return self.first + len(self.tokens) - 1

    def finish_reason(self) -> str | None:
        """Why the turn is over by the last token, if it is."""
        if self.tokens[-1] in self.stops:
            return "stop"
        return "length" if self.generated >= self.request.sampling.max_tokens else None

    def _forget(self) -> None:
        settings = self.request.deliberation
        keep = max(TOKENS_KEPT, 2 * (settings.lag + settings.max_lag + settings.plan_length + settings.park_tokens))
        if len(self.tokens) > 4 * keep:
            self.first += len(self.tokens) - keep
            del self.tokens[:-keep]
