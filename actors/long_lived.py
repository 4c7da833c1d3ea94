"""For processes that live long and must answer quickly."""

from __future__ import annotations

import gc


def freeze_memory() -> None:
    """Takes all that is there now out of the garbage collector's sight.

    Libraries leave some hundred thousand objects that never die. A full collection looks at each of them and holds up
    the whole process meanwhile, for as long as a thousand tokens take; afterwards it looks at what has come since.
    """
    gc.collect()
    gc.freeze()
