"""Generations between two turns: kept for a time, up to a number, and thinking on meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from crsm.config import EngineConfig
from crsm.deliberation import Deliberation, Foresight
from crsm.generation import Generation
from crsm.saved_generation import SavedGeneration


@dataclass(slots=True)
class Parked:
    """A generation between two turns."""

    generation: Generation
    saved: SavedGeneration
    since: float
    foresight: Foresight = field(default_factory=Foresight)


class Parking:
    """The parked generations of one engine, the one that rested longest first."""

    def __init__(
        self,
        config: EngineConfig,
        deliberation: Deliberation,
        clock: Callable[[], float],
        end: Callable[[Generation], None],
    ) -> None:
        """
        Args:
            config: how many are kept, and for how long.
            deliberation: thinks about their next turns.
            clock: seconds.
            end: told of every generation that is forgotten.
        """
        self._config, self._deliberation, self._clock, self._end = config, deliberation, clock, end
        self._parked: dict[str, Parked] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, generation_id: str) -> bool:
        return generation_id in self._parked

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._parked)

    def put(self, generation: Generation, saved: SavedGeneration) -> None:
        """Keeps a generation; of too many the one that rested longest is forgotten."""
        self.forget_old()
        while self._parked and len(self._parked) >= self._config.max_parked:
            self.forget(next(iter(self._parked)))
        if not self._config.max_parked:
            self._end(generation)
            return
        generation.tokens, generation.first = generation.tokens[-1:], generation.position
        self._parked[generation.id] = Parked(generation, saved, self._clock())

    def get(self, generation_id: str) -> Parked:
        return self._parked[generation_id]

    def take(self, generation_id: str) -> Parked | None:
        """Whoever goes on leaves."""
        return self._parked.pop(generation_id, None)

    def forget(self, generation_id: str) -> bool:
        """Drops a generation and its plans; whether there was one."""
        parked = self._parked.pop(generation_id, None)
        if parked is None:
            return False
        self._end(parked.generation)
        return True

    def forget_old(self) -> None:
        oldest = self._clock() - self._config.park_seconds
        for name in [name for name, parked in self._parked.items() if parked.since < oldest]:
            self.forget(name)

    def think(self) -> None:
        """Asks for what next turns may need, within each one's budget."""
        self.forget_old()
        for parked in self._parked.values():
            self._deliberation.foresee(parked.generation, parked.saved, parked.foresight)

    @property
    def thinking(self) -> bool:
        """Whether something is still to be asked or to come back."""
        return any(
            self._deliberation.is_unanswered(parked.generation)
            or self._deliberation.can_foresee(parked.saved, parked.foresight)
            for parked in self._parked.values()
        )
