"""The engine in a thread of its own, which many callers may use at once.

Invariants:

* the engine belongs to the decode thread; all others put commands into its mailbox, which it empties between steps;
* the thread waits only for a command when nothing is being said, for the pace, and for plans under the virtual clock;
  a command ends a wait for the pace;
* it makes no Ray call; what it says it hands to ``deliver``, which must not block;
* generations join and leave at every step, and are decoded in one batch;
* every accepted generation ends with a finished token or, when the loop ends before it, with :class:`Closed`;
* a command that comes after the end is answered all the same.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crsm.engine import Engine, QueueFull
from crsm.generation import GenerationRequest
from crsm.plan_events import PlanEvent
from crsm.saved_generation import SavedGeneration
from crsm.types import Token

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refused:
    """A generation that was not accepted."""

    generation_id: str
    reason: str
    full: bool = False
    """There was no room; the same request may be accepted later."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The loop has ended; nothing more is said."""

    reason: str


Message = Token | PlanEvent | SavedGeneration | Refused | Closed

THINKING_INTERVAL = 0.01
"""Seconds between two looks at plans for parked generations while nobody speaks."""


@dataclass(frozen=True, slots=True)
class _Join:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class _Cancel:
    generation_id: str


@dataclass(frozen=True, slots=True)
class _Ask:
    question: Callable[[Engine], Any]
    reply: Callable[[Any], None]


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
        self._interrupted: deque[_Command] = deque()
        """Commands that ended a wait for the pace."""
        self._closed: Closed | None = None
        self._steps = 0
        self._snapshots: dict[str, int] = {}
        """Generations of which states are to be handed out, and after how many tokens each."""
        engine.sleep = self._sleep
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, request: GenerationRequest) -> None:
        """Has a generation accepted; its id must be set. A refusal is delivered, not raised."""
        self._put(_Join(request))

    def cancel(self, generation_id: str) -> None:
        """Ends a generation at the next step; unknown ids are ignored."""
        self._put(_Cancel(generation_id))

    def ask(self, question: Callable[[Engine], Any], reply: Callable[[Any], None]) -> None:
        """Has the engine asked something between two steps; the answer, or the ``ValueError`` that the question raised,
        is handed to ``reply`` from the decode thread."""
        self._put(_Ask(question, reply))

    def metrics(self, reply: Callable[[Any], None]) -> None:
        """Has the metrics handed to ``reply``."""
        self.ask(self._metrics, reply)

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
                tokens = self._engine.step()
                self._steps += bool(tokens)
                # Events and states first: a generation's stream ends with its last token.
                said: list[Message] = [*self._engine.take_events(), *self._engine.take_kept(), *tokens]
                if self._snapshots:
                    said += self._due_snapshots(said)
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
        engine = self._engine
        while True:
            if self._interrupted:
                command = self._interrupted.popleft()
            elif engine.busy and self._commands.empty():
                return True
            else:
                try:
                    # Idle, but for parked generations that think: they have to be looked after.
                    command = self._commands.get(timeout=THINKING_INTERVAL if engine.thinking else None)
                except queue.Empty:
                    return True
            match command:
                case _Join(request):
                    self._join(request)
                case _Cancel(generation_id):
                    engine.cancel(generation_id)
                case _Ask(question, reply):
                    _answer(engine, question, reply)
                case _Stop():
                    return False

    def _join(self, request: GenerationRequest) -> None:
        try:
            self._engine.submit(request)
        except (ValueError, QueueFull) as error:
            self._deliver([Refused(request.generation_id, str(error), isinstance(error, QueueFull))])
        else:
            if request.snapshot_every:
                self._snapshots[request.generation_id] = request.snapshot_every

    def _sleep(self, seconds: float) -> None:
        """The engine's pause between two beats; any command ends it."""
        if seconds <= 0:
            return
        try:
            self._interrupted.append(self._commands.get(timeout=seconds))
        except queue.Empty:
            pass

    def _due_snapshots(self, said: Sequence[Message]) -> list[Message]:
        saved: list[Message] = []
        for token in said:
            if not isinstance(token, Token) or token.generation_id not in self._snapshots:
                continue
            if token.finished:
                del self._snapshots[token.generation_id]
            elif (token.position + 1) % self._snapshots[token.generation_id] == 0:
                saved.append(self._engine.snapshot(token.generation_id))
        return saved

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
                _answer(self._engine, command.question, command.reply)

    def _metrics(self, engine: Engine) -> dict[str, Any]:
        return {**engine.metrics.summary(), "steps": self._steps, "generations": engine.counts()}


def _answer(engine: Engine, question: Callable[[Engine], Any], reply: Callable[[Any], None]) -> None:
    try:
        answer = question(engine)
    except ValueError as error:
        answer = error
    reply(answer)
