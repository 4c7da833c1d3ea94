"""From the decode thread to the streams that wait for it, without holding it up. No Ray.

Invariants:

* the decode thread appends to a list and, at most once per ``interval``, wakes the event loop: no lock, no wait;
* whatever was said while a stream was busy comes to it together, in order: a slow reader gets larger messages and
  delays nobody;
* every stream ends: with a finished token, or with a refusal or the news that the generator has closed.

The interval grows with the number of streams, so that sending never takes the decode thread's core away from it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.decode_loop import Closed, Message, Refused
from crsm.plan_events import PlanEvent
from crsm.saved_generation import SavedGeneration
from crsm.types import Injection, Token

MESSAGES_PER_SECOND = 1000
"""Of all streams together at most: a message costs about half a millisecond of the generator's process."""
_NOTHING = np.empty(0, dtype=np.float32)


class Stream:
    """What waits for one reader."""

    def __init__(self) -> None:
        self._pending: list[Message] = []
        self._there = asyncio.Event()

    def put(self, message: Message) -> None:
        if not self._pending:
            self._there.set()
        self._pending.append(message)

    async def take(self) -> list[Message]:
        """Everything since the last time; waits until there is something."""
        await self._there.wait()
        self._there.clear()
        taken, self._pending = self._pending, []
        return taken


class Streams:
    """The streams of one generator, by generation. Belongs to an event loop; ``deliver`` alone to the decode thread."""

    def __init__(self, interval: float) -> None:
        """
        Args:
            interval: seconds between two wake-ups at least.
        """
        self._interval = interval
        self._streams: dict[str, Stream] = {}
        self._readers: Counter[Stream] = Counter()
        """How many generations go into each stream."""
        self._outbox: deque[Message] = deque()
        self._events: asyncio.AbstractEventLoop | None = None
        self._awake = False
        """A wake-up is on its way, or the event loop will look by itself."""
        self.closed: Closed | None = None

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, generation_id: str) -> bool:
        return generation_id in self._streams

    def open(self, names: Sequence[str], stream: Stream) -> None:
        """Has what these generations say put into a stream."""
        self._events = asyncio.get_running_loop()
        for name in names:
            self._streams[name] = stream
        self._readers[stream] += len(names)

    def close(self, names: Iterable[str]) -> None:
        for name in names:
            if (stream := self._streams.pop(name, None)) is not None:
                self._readers[stream] -= 1
                if not self._readers[stream]:
                    del self._readers[stream]

    def close_all(self, stream: Stream) -> list[str]:
        """Ends whatever goes into a stream; the generations' names."""
        names = [name for name, other in self._streams.items() if other is stream]
        self.close(names)
        return names

    def deliver(self, messages: Sequence[Message]) -> None:
        """From the decode thread. Never blocks."""
        self._outbox.extend(messages)
        if not self._awake and self._events is not None and not self._events.is_closed():
            self._awake = True
            self._events.call_soon_threadsafe(self._sort)

    def _sort(self) -> None:
        """Gives what was said to its streams, and looks again after the interval; sleeps when there was nothing."""
        if not self._outbox:
            self._awake = False
            if not self._outbox:  # nothing came between the look and the sleep
                return
            self._awake = True
        streams, next_message = self._streams, self._outbox.popleft
        for _ in range(len(self._outbox)):
            message = next_message()
            # Tokens are nearly all there is.
            if type(message) is Token and message.injection is None:
                if (stream := streams.get(message.generation_id)) is not None:
                    stream.put(message)
            else:
                self._hand_over(message)
        assert self._events is not None
        self._events.call_later(max(self._interval, len(self._readers) / MESSAGES_PER_SECOND), self._sort)

    def _hand_over(self, message: Message) -> None:
        if isinstance(message, Closed):
            self.closed = message
            for stream in set(self._streams.values()):
                stream.put(message)
        elif (stream_of := self._streams.get(message.generation_id)) is not None:
            stream_of.put(lighten(message) if isinstance(message, Token) else message)


class Tokens(tuple[Token, ...]):
    """Tokens of one message: a tuple that travels by columns, in a fraction of the time that single tokens take."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[..., Tokens], tuple[Any, ...]]:
        names, positions, tokens, logprobs, _, reasons, injections = zip(*self, strict=True) if self else ((),) * 7
        ends = {place: reason for place, reason in enumerate(reasons) if reason is not None}
        applied = {place: injection for place, injection in enumerate(injections) if injection is not None}
        return _from_columns, (names, positions, tokens, logprobs, ends, applied)


def _from_columns(
    names: Sequence[str],
    positions: Sequence[int],
    tokens: Sequence[int],
    logprobs: Sequence[float],
    ends: dict[int, str],
    applied: dict[int, Injection],
) -> Tokens:
    return Tokens(
        Token(name, position, token, logprob, place in ends, ends.get(place), applied.get(place))
        for place, (name, position, token, logprob) in enumerate(zip(names, positions, tokens, logprobs, strict=True))
    )


StreamItem = Tokens | PlanEvent | SavedGeneration
"""One message of a stream."""


def bundled(messages: Sequence[Message]) -> list[StreamItem | Refused | Closed]:
    """The messages in order, runs of tokens drawn together."""
    items: list[StreamItem | Refused | Closed] = []
    said: list[Token] = []
    for message in messages:
        if isinstance(message, Token):  # nearly all there is
            said.append(message)
            continue
        if said:
            items.append(Tokens(said))
            said = []
        items.append(message)
    if said:
        items.append(Tokens(said))
    return items


def lighten(token: Token) -> Token:
    """The token without the arrays of the write that was applied before it: they are large, and of no use outside."""
    if token.injection is None:
        return token
    plan = replace(token.injection.plan, write_u_LRE=_NOTHING, write_b_LRN=_NOTHING, tree=None)
    return token._replace(injection=replace(token.injection, plan=plan))


def ends(message: Message) -> bool:
    """Whether a generation's stream is over with this."""
    return isinstance(message, Refused | Closed) or (isinstance(message, Token) and message.finished)


def ended(messages: Sequence[Message]) -> set[str]:
    """The generations that are over with these."""
    return {
        message.generation_id
        for message in messages
        if (isinstance(message, Token) and message.finished) or isinstance(message, Refused)
    }
