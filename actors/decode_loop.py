"""The engine in a thread of its own, which many callers may use at once.

Invariants:

* the engine belongs to the decode thread; all others put commands into its mailbox, which it empties between steps;
* the thread waits only for a command when nothing is being said, for the pace, and for plans under the virtual clock;
* it makes no Ray call; what it says it hands to ``deliver``, which must not block;
* generations join and leave at every step, and are decoded in one batch;
* every accepted generation ends with a finished token or, when the loop ends before it, with :class:`Closed`;
* a command that comes after the end is answered all the same.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crsm.engine import Engine, GenerationRequest
from crsm.types import Token

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refused:
    """A generation that was not accepted."""

    generation_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The loop has ended; nothing more is said."""

    reason: str


Message = Token | Refused | Closed


@dataclass(frozen=True, slots=True)
class _Join:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class _Cancel:
    generation_id: str


@dataclass(frozen=True, slots=True)
class _Ask:
    reply: Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Join | _Cancel | _Ask | _Stop


class DecodeLoop:
    """Runs an engine until it is stopped."""

    def __init__(self, engine: Engine, deliver: Callable[[Sequence[Message]], None]) -> None:
        """
        Args:
            engine: used by the decode thread alone from now on.
            deliver: takes what was said in one step; called from the decode thread.
        """
        self._engine, self._deliver = engine, deliver
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._closed: Closed | None = None
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, request: GenerationRequest) -> None:
        """Has a generation accepted; its id must be set. A refusal is delivered, not raised."""
        self._put(_Join(request))

    def cancel(self, generation_id: str) -> None:
        """Ends a generation at the next step; unknown ids are ignored."""
        self._put(_Cancel(generation_id))

    def ask(self, reply: Callable[[dict[str, Any]], None]) -> None:
        """Has the metrics handed to ``reply``, from the decode thread, between two steps."""
        self._put(_Ask(reply))

    def stop(self) -> None:
        """Ends the loop after the running step; does not wait for it."""
        self._put(_Stop())

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end of a stopped loop; whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _put(self, command: _Command) -> None:
        self._commands.put(command)
        if self._closed is not None:
            self._answer_late()

    def _run(self) -> None:
        reason = "the generator was closed"
        try:
            while self._obey():
                said = self._engine.step()
                self._steps += 1
                if said:
                    self._deliver(said)
        except Exception as error:  # whatever it is, every waiting caller must hear of it
            logger.exception("the decode loop failed")
            reason = f"the decode loop failed: {type(error).__name__}: {error}"
        finally:
            self._closed = Closed(reason)
            self._deliver([self._closed])
            self._answer_late()

    def _obey(self) -> bool:
        """Carries out the commands there are, waiting for one if nothing is being said; whether to go on."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            match command:
                case _Join(request):
                    try:
                        self._engine.submit(request)
                    except ValueError as error:
                        self._deliver([Refused(request.generation_id, str(error))])
                case _Cancel(generation_id):
                    self._engine.cancel(generation_id)
                case _Ask(reply):
                    reply(self._metrics())
                case _Stop():
                    return False

    def _answer_late(self) -> None:
        """Answers what came after the end; any thread may do so, since the engine rests."""
        assert self._closed is not None
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, _Join):
                self._deliver([Refused(command.request.generation_id, self._closed.reason)])
            elif isinstance(command, _Ask):
                command.reply(self._metrics())

    def _metrics(self) -> dict[str, Any]:
        return {**self._engine.metrics.summary(), "steps": self._steps}
