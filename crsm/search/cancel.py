"""How another thread ends a search."""

from __future__ import annotations

import threading

from crsm import native


class CancelToken:
    """Ends every search that it was given to: none begins another simulation after ``cancel``, and all still answer."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.flag = native.core.CancelToken() if native.core is not None else None
        """What the native search looks at, without a lock and without Python."""

    def cancel(self) -> None:
        """From any thread; for good."""
        self._event.set()
        if self.flag is not None:
            self.flag.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._event.is_set()
