"""What the HTTP front measures, for whoever counts it."""

from __future__ import annotations

from typing import Protocol


class Telemetry(Protocol):
    """Takes note; must not block. Called from the event loop."""

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered. ``path``: the route, not what the client wrote; 499: the client went before."""
        ...

    def first_token(self, seconds: float) -> None:
        """A choice said its first token so many seconds after its request came."""
        ...

    def tokens(self, count: int, seconds: float | None) -> None:
        """Tokens came together, with so many seconds between two of them; None: they are the first of their choice."""
        ...

    def generations(self, running: int, waiting: int) -> None:
        """How many generations there are now that have said a token, and that have not."""
        ...


class NoTelemetry:
    """Nobody counts."""

    def request(self, path: str, status: int, seconds: float) -> None:
        pass

    def first_token(self, seconds: float) -> None:
        pass

    def tokens(self, count: int, seconds: float | None) -> None:
        pass

    def generations(self, running: int, waiting: int) -> None:
        pass


NO_TELEMETRY = NoTelemetry()
