"""What the front of a replica counts (:mod:`actors.metrics` has the names, and what generators count).

Invariant: whatever happens for every chunk is a sum in memory; Ray hears of it once in an interval, but for latencies.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from actors.metrics import Counts

OBSERVATION_INTERVAL = 0.02
"""Seconds between two times between tokens that are handed on: each costs more than what it is about."""


class ServiceTelemetry:
    """Takes note of what the front does (:class:`actors.serving.telemetry.Telemetry`)."""

    def __init__(self, counts: Counts, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts, self._clock = counts, clock
        self._tokens = 0
        self._observe_at = clock()
        self._generations = (0, 0)

    def request(self, path: str, status: int, seconds: float) -> None:
        self._counts.add("crsm_requests", 1, path=path, status=str(status))
        self._counts.observe("crsm_request_seconds", seconds, path=path)

    def first_token(self, seconds: float) -> None:
        self._counts.observe("crsm_first_token_seconds", seconds)

    def tokens(self, count: int, seconds: float | None) -> None:
        self._tokens += count
        if seconds is not None and (now := self._clock()) >= self._observe_at:
            self._counts.observe("crsm_inter_token_seconds", seconds)
            self._observe_at = now + OBSERVATION_INTERVAL

    def generations(self, running: int, waiting: int) -> None:
        self._generations = (running, waiting)

    def flush(self) -> None:
        """Hands on what was summed up."""
        self._counts.add("crsm_tokens", self._tokens)
        self._tokens = 0
        running, waiting = self._generations
        self._counts.set("crsm_generations_running", running)
        self._counts.set("crsm_generations_waiting", waiting)
