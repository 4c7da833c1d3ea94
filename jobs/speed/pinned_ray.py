"""A local Ray for measurements, with every process on the core that it is to have.

One core belongs to the generator, the others to everything else: planners, pool, Ray's own daemons, the driver. What is
measured on the generator's core is then the generator, and what System 2 takes from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def pinned_ray() -> Iterator[int | None]:
    """A local Ray on all cores but one; yields the core that is left for the generator, or None: there is only one."""
    from actors.cluster import start_ray

    cores = sorted(os.sched_getaffinity(0))
    own = cores[0] if len(cores) > 1 else None
    try:
        if own is not None:
            # Children inherit it: Ray's daemons, and the workers that they start.
            pin(os.getpid(), cores[1:])
        with start_ray():
            yield own
    finally:
        pin(os.getpid(), cores)


def pin(pid: int, cores: Iterable[int]) -> None:
    """Puts all threads of a process on these cores; threads that it starts later inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:  # a thread that has ended meanwhile
            continue
