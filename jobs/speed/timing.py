"""Interleaved measurement: ours, peer, ours, peer …, so that whatever else the machine does meets both alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Candidate = Callable[[], float]
"""Runs once and returns the seconds that count: its own clock may stand in another process."""

REPEATS = 5
"""Samples of every figure, at least."""


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Candidate:
    """A candidate that is timed from outside, in this process."""

    def sample() -> float:
        started = clock()
        run()
        return clock() - started

    return sample


def synchronized(run: Callable[[], object], device: str) -> Callable[[], object]:
    """``run``, and on a GPU the wait for what it has put into the queue."""
    if device == "cpu":
        return run
    import torch

    def waited() -> None:
        run()
        torch.cuda.synchronize()

    return waited


SETTLE_SECONDS = 0.03
"""Before every sample: idle threads of the other side's library may spin on the cores for a while."""


def interleave(candidates: Mapping[str, Candidate], repeats: int = REPEATS, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every candidate, by name, ``repeats`` each, taken in turns; the garbage collector rests meanwhile.

    Args:
        warm_up: rounds before, which are not counted.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}; allowed: at least 1")
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(warm_up + repeats):
            for name, candidate in candidates.items():
                time.sleep(SETTLE_SECONDS)
                seconds = candidate()
                if number >= warm_up:
                    samples[name].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return samples


def rates(seconds: Sequence[float], units: float) -> list[float]:
    """Units a second, sample by sample."""
    return [units / second for second in seconds]


def median(samples: Sequence[float]) -> float | None:
    """None without samples."""
    return statistics.median(samples) if samples else None


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least ``share`` of all samples do not exceed (nearest rank)."""
    if not samples or not 0 < share <= 1:
        raise ValueError(
            f"share = {share} of {len(samples)} samples; allowed: above 0, at most 1, of at least 1 sample"
        )
    # The product may lie a rounding above a whole number.
    return sorted(samples)[math.ceil(share * len(samples) - 1e-9) - 1]
