"""When a worker saves because its node, or that of another worker, is about to go.

Ray Train watches for nodes that are being drained (by an autoscaler, by ``ray drain-node``) and tells every worker of
a group when one of theirs is; ``RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S`` says how often it looks. When the node is gone
it starts the group anew, from the last saved state, with as many workers as there is room for. Its public
``ray.train.get_preemption_info()`` is a call to an actor that all workers have to make together, too slow for every
step; here each worker looks at its own copy of the notice, and the loop agrees.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SHARE = 0.2
"""Share of the time that saving may take while a notice stands."""
SHORTEST = 2.0
"""Seconds between two states, at least."""


def notice_of_this_worker() -> Any:
    """What Ray Train has told this worker of nodes about to go; None: nothing."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


class SaveOnNotice:
    """Soon after there is news, and then again and again: nobody knows which step is the last."""

    def __init__(
        self, look: Callable[[], Any] = notice_of_this_worker, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look, self._clock = look, clock
        self._known: Any = None
        self._saved_at = self._due_at = -float("inf")

    def is_due(self) -> bool:
        """Whether this worker wants the state saved after the present step."""
        notice = self._look()
        if notice is not None and notice != self._known:
            # Not at once after a state that another worker asked for: they hear the same news one after the other.
            self._due_at = self._saved_at + SHORTEST
        self._known = notice
        return notice is not None and self._clock() >= self._due_at

    def saved(self, seconds: float) -> None:
        """A state was saved, on whoever's wish, in so many seconds."""
        self._saved_at = self._clock()
        self._due_at = self._saved_at + max(SHORTEST, seconds / SHARE)
