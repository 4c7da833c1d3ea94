"""The planners of the demo: an actor on a local Ray or, where Ray cannot start, a thread of this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.checkpoints import planner_actors
from jobs.command import describe

if TYPE_CHECKING:
    from crsm.model import Checkpoint
    from crsm.planners import Planners


@contextlib.contextmanager
def demo_planners(checkpoint: Checkpoint, use_actors: bool) -> Iterator[tuple[Planners, str]]:
    """Planners by the settings, at least one, and what they are: ``actors`` or ``threads``; alive in the block."""
    with contextlib.ExitStack() as stack:
        actors: Planners | None = None
        if use_actors:
            _say("starting Ray and a planner actor")
            try:
                actors = stack.enter_context(planner_actors(checkpoint))
            except Exception as error:  # Ray has errors of many kinds, and none of them ends the demo
                _say(f"Ray could not start ({describe(error)}): the planner runs in a thread of this process")
        if actors is not None:
            yield actors, "actors"
            return
        from crsm.planners import ThreadPlanners
        from crsm.reasoning import Deliberator

        settings = checkpoint.config.planners
        threads = ThreadPlanners(Deliberator.from_checkpoint(checkpoint), max(1, settings.count), settings.max_batch)
        stack.callback(threads.close)
        yield threads, "threads"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
