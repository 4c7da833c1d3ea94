"""What an operator can read of a planner pool."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The pool's counters and what its planners are doing: one consistent view, a moment old at most."""

    planners: dict[str, int] = field(default_factory=dict)
    """Planners by phase."""
    pids: tuple[int, ...] = ()
    """Processes of the planners that are ready."""
    versions: tuple[int, ...] = ()
    """Versions of their weights."""
    in_flight: int = 0
    """Batches sent and not answered."""
    waiting: int = 0
    """Requests not sent."""
    stalled_now: int = 0
    """Planners that take far too long and get nothing more to do."""
    room: int | None = None
    """Requests that would be taken now without dropping others; None: any number (virtual clock)."""
    requests: int = 0
    plans: int = 0
    batches: int = 0
    """Searches asked for."""
    batched: int = 0
    """Requests in them."""
    shrunk: int = 0
    """Requests that were granted fewer simulations than they asked for, to meet the deadline."""
    probes: int = 0
    """Requests that looked too late and were sent all the same, to keep the estimate alive."""
    settled: int = 0
    """Requests answered or shed."""
    in_time: int = 0
    """Requests answered by their deadline, or that had none."""
    late: int = 0
    """Requests answered after their deadline."""
    shed: int = 0
    """Requests dropped since all planners were busy, or since their plan would have come too late."""
    stranded: int = 0
    """Requests dropped since there was no planner."""
    lost_with_planner: int = 0
    """Requests whose planner died, could not be reached, or was replaced."""
    refused: int = 0
    """Requests whose deliberation failed; the planner is well."""
    undelivered: int = 0
    """Requests or plans that Ray lost under way."""
    stalled: int = 0
    """Times that a planner began to stall."""
    cancelled: int = 0
    """Searches that were cancelled since they took too long."""
    replaced: int = 0
    """Planners replaced since they were frozen or stuck."""
    deaths: int = 0
    restarts: int = 0
    scaled_up: int = 0
    """Planners added."""
    scaled_down: int = 0
    """Planners removed."""
    sent_bytes: int = 0
    """Arrays of the requests that were sent to planners."""
    received_bytes: int = 0
    """Arrays of the plans that came back."""
    search_seconds: float = 0.0
    """What a search like the last one takes, as far as one can tell; with the way there and back."""
    last_error: str = ""

    @property
    def mean_batch(self) -> float:
        """Requests per search."""
        return self.batched / self.batches if self.batches else 0.0

    @property
    def in_time_rate(self) -> float:
        """Share of the settled requests that were answered by their deadline; 1 before any was."""
        return self.in_time / self.settled if self.settled else 1.0
