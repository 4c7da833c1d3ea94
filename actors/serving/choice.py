"""What one generation says, as the text, the tokens and the notes of one choice. Pure: no clock, no tasks.

Invariants:

* the pieces that ``take`` hands out, joined, are the text of the answer; no character of a stop string, and nothing
  after one, is ever among them;
* tokens and log-probabilities are handed out with the text that they are part of, not before it;
* once ``finish`` is set, nothing is taken in any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.serving.backend import GenerationFailed, Item
from actors.serving.event_json import EventJson
from actors.serving.generation_log import GenerationLog
from actors.serving.stop_strings import StopStrings
from crsm.data.tokenizer import Tokenizer
from crsm.plan_events import PlanEvent
from crsm.saved_generation import SavedGeneration
from crsm.types import Token

Finish = Literal["stop", "length", "deadline"]


@dataclass(frozen=True, slots=True)
class Details:
    """What is wanted beside the text."""

    logprobs: bool = False
    events: bool = False
    tokens: bool = False
    """With ``events``: every token by itself, as a stream has them."""


@dataclass(slots=True)
class Spoken:
    """A token with its place in the text."""

    position: int
    token: int
    text: str
    logprob: float
    injected: bool
    offset: int
    """Characters before it."""


@dataclass(slots=True)
class Said:
    """What has come since the last time."""

    text: str
    tokens: list[Spoken] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


class Choice:
    """One choice of a completion."""

    def __init__(
        self,
        index: int,
        generation_id: str,
        tokenizer: Tokenizer,
        notes: EventJson,
        *,
        stop: Sequence[str] = (),
        details: Details = Details(),
        log: GenerationLog | None = None,
        before: Sequence[int] = (),
        echo: str = "",
    ) -> None:
        """
        Args:
            index: of the choice.
            generation_id: of its generation.
            tokenizer: of the model.
            notes: writes events.
            stop: strings before which the text ends.
            details: what is wanted beside the text.
            log: writes the lines of an event log; None: not wanted.
            before: tokens that the answer goes on from without a break, so that its first word keeps its space.
            echo: text to begin with.
        """
        self.index, self.generation_id, self.echo = index, generation_id, echo
        self._notes, self._details, self._log = notes, details, log
        self._decoder = tokenizer.stream()
        for token in before:
            self._decoder.push(token)
        self._terminal = frozenset(tokenizer.terminal_ids)
        self._verdicts = (
            {tokenizer.verdict_id(True): "yes", tokenizer.verdict_id(False): "no"} if tokenizer.has_verdicts else {}
        )
        self._stop = StopStrings(stop) if stop else None
        self._by_token = details.logprobs or details.tokens
        self._plain = not (stop or self._by_token or log)
        """Only the text is wanted."""
        self._text: list[str] = [echo] if echo else []
        self._decoded = self._released = len(echo)
        """Characters that were decoded, and that may be handed out."""
        self._pending: deque[Spoken] = deque()
        self._events: list[dict[str, Any]] = []
        self.said: list[int] = []
        """Every token, in order; the one that ended the answer too."""
        self.injections: list[dict[str, Any]] = []
        self.saved: SavedGeneration | None = None
        self.finish: Finish | None = None
        self.stopped_by_text = False
        """It ended with a stop string: the generation itself has not ended."""
        self.verdict: str | None = None

    @property
    def finish_reason(self) -> str | None:
        """As OpenAI names it."""
        return "length" if self.finish == "deadline" else self.finish

    def feed(self, items: Sequence[Item]) -> None:
        """Takes in what the generation has handed out.

        Raises:
            GenerationFailed: it was cancelled by somebody else.
        """
        said, text, push = self.said, self._text, self._decoder.push
        for item in items:
            if self.finish is not None:
                return
            if isinstance(item, Token):
                if self._plain and not item.finished and item.injection is None:  # nearly all there is
                    said.append(item.token)
                    text.append(push(item.token))
                else:
                    self._feed_token(item)
            elif isinstance(item, PlanEvent):
                if self._details.events:
                    self._events.append(self._notes.event(item))
                if self._log is not None:
                    self._log.event(item)
            else:
                self.saved = item

    def _feed_token(self, token: Token) -> None:
        if token.finish_reason == "cancelled":
            raise GenerationFailed(f"generation {self.generation_id} was cancelled by the server")
        self.said.append(token.token)
        if token.injection is not None:
            self.injections.append(self._notes.injection(token))
        if self._log is not None:
            self._log.token(token)
        ends = token.finished and token.finish_reason == "stop" and token.token in self._terminal
        if ends:
            self.verdict = self._verdicts.get(token.token)
        else:
            piece = self._decoder.push(token.token)
            if self._by_token:
                self._pending.append(
                    Spoken(
                        token.position, token.token, piece, token.logprob, token.injection is not None, self._decoded
                    )
                )
                self._decoded += len(piece)
            self._release(piece if self._stop is None else self._stop.push(piece))
        if self._stop is not None and self._stop.stopped:
            self.stopped_by_text = True
            self._end("stop")
        elif token.finished:
            self._end("stop" if token.finish_reason == "stop" else "length")

    def expire(self) -> None:
        """Its time is over: what was said is the answer."""
        if self.finish is None:
            self._end("deadline")

    def _end(self, finish: Finish) -> None:
        if not self.stopped_by_text:
            rest = self._decoder.flush()
            self._release(rest if self._stop is None else self._stop.push(rest) + self._stop.flush())
        self.finish = finish

    def _release(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._released += len(text)

    def take(self) -> Said:
        """What may be handed out and has not been."""
        said = Said("".join(self._text), events=self._events, log=self._log.take() if self._log else [])
        self._text, self._events = [], []
        if self._by_token:
            self._take_tokens(said.tokens)
        return said

    def _take_tokens(self, taken: list[Spoken]) -> None:
        pending, over = self._pending, self.finish is not None
        while pending:
            spoken = pending[0]
            if spoken.offset + len(spoken.text) > self._released:
                if not over:
                    return
                # The stop string began in this token, or before it.
                if spoken.offset >= self._released and spoken.text:
                    pending.clear()
                    return
                spoken.text = spoken.text[: self._released - spoken.offset]
            taken.append(pending.popleft())
