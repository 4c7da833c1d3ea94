"""The generations of one request, side by side.

Invariants:

* every generation has a task that reads it, and its backend generator is closed before the task ends, whatever ends it;
* leaving the ``async with`` ends all of them, and waits until they have ended;
* a generation's place is free for others as soon as it has ended, however slowly its text is read;
* after an event the next one waits for ``interval``, so that tokens share events; the first token of the first choice
  and the end of the last do not wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from actors.serving.admission import Admission, Ticket
from actors.serving.backend import Backend, GenerationFailed, Item
from actors.serving.choice import Choice
from actors.serving.errors import ApiError, invalid
from actors.serving.telemetry import Telemetry
from crsm.engine import QueueFull
from crsm.generation import GenerationRequest
from crsm.saved_generation import SavedGeneration
from crsm.types import Token

logger = logging.getLogger(__name__)


class Run:
    """Reads the generations of a request into its choices."""

    def __init__(
        self,
        backend: Backend,
        admission: Admission,
        telemetry: Telemetry,
        choices: Sequence[Choice],
        requests: Sequence[GenerationRequest],
        *,
        owner: str,
        deadline: float,
        interval: Callable[[], float],
        state_seconds: float | None = None,
        came: float | None = None,
    ) -> None:
        """
        Args:
            backend: who generates.
            admission: has to let the generations in.
            telemetry: counts.
            choices: what is said goes here.
            requests: a generation for every choice.
            owner: of the generations and of the states that are kept.
            deadline: seconds for all of it.
            interval: seconds between two events at least, as things are now.
            state_seconds: keep the states for so long; None: do not keep them.
            came: when the request came, on the event loop's clock; None: now.
        """
        self._backend, self._admission, self._telemetry = backend, admission, telemetry
        self.choices, self._requests = choices, requests
        self._owner, self._deadline, self._interval = owner, deadline, interval
        self._state_seconds = state_seconds
        self._events = asyncio.get_running_loop()
        self.accepted = self._events.time()
        self._came = self.accepted if came is None else came
        self.states: list[str | None] = [None] * len(choices)
        self.done: list[bool] = [False] * len(choices)
        """Nothing more comes, the state is kept."""
        self.error: ApiError | None = None
        self._news = asyncio.Event()
        self._fresh = False
        """Something came that was not handed out."""
        self._timer: asyncio.TimerHandle | None = None
        self._next = self.accepted
        self._expired = False
        self._tickets: list[Ticket] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Run:
        wanted = [(request.generation_id, request.sampling.max_tokens) for request in self._requests]
        self._tickets = self._admission.enter(wanted, self._owner)
        self._tasks = [self._events.create_task(self._read(place)) for place in range(len(self.choices))]
        self._alarm = self._events.call_at(self.accepted + self._deadline, self._expire)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for ticket in self._tickets:  # of tasks that never ran
            self._admission.leave(ticket)

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.error is not None or all(self.done)

    @property
    def tokens(self) -> int:
        """Said so far, by all."""
        return sum(len(choice.said) for choice in self.choices)

    @property
    def seconds(self) -> float:
        """Since the generations were accepted."""
        return round(self._events.time() - self.accepted, 6)

    async def news(self) -> None:
        """Waits until there is something to hand out, and it is time to.

        Raises:
            ApiError: the request failed, and all its generations with it.
        """
        await self._news.wait()
        self._news.clear()
        self._fresh = False
        if self.error is not None:
            raise self.error
        self._next = self._events.time() + self._interval()

    async def all(self) -> None:
        """Waits until all is said.

        Raises:
            ApiError: as :meth:`news`.
        """
        while not self.over:
            await self.news()
        if self.error is not None:
            raise self.error

    # ---------------------------------------------------------------- one generation

    async def _read(self, place: int) -> None:
        choice, ticket = self.choices[place], self._tickets[place]
        try:
            try:
                await self._follow(choice, self._requests[place], ticket)
            except asyncio.CancelledError:
                if not self._expired or choice.finish is not None:
                    raise
                if not any(other.said for other in self.choices):
                    raise ApiError(408, f"nothing was said within crsm.deadline = {self._deadline:g} s") from None
                choice.expire()
            if self._state_seconds is not None:
                self.states[place] = await self._keep(place)
            self.done[place] = True
        except Exception as error:
            self._fail(as_api_error(error, self._admission))
        finally:
            self._admission.leave(ticket)
        self._tell(at_once=self.over)

    async def _follow(self, choice: Choice, request: GenerationRequest, ticket: Ticket) -> None:
        """Feeds a choice until it is over."""
        before, stream = 0.0, self._backend.generate(request)
        try:
            async for items in stream:
                choice.feed(items)
                now = self._events.time()
                if count := len(choice.said) - ticket.said:
                    if ticket.said == 0:
                        self._telemetry.first_token(now - self._came)
                        self._telemetry.tokens(count, None)
                    else:
                        self._telemetry.tokens(count, (now - before) / count)
                    first, before = ticket.said == 0, now
                    self._admission.says(ticket, count)
                    self._tell(at_once=first)
                else:
                    self._tell(at_once=False)
                if choice.finish is not None:
                    return
            raise GenerationFailed(f"generation {choice.generation_id} ended without its last token")
        finally:
            await stream.aclose()

    def _tell(self, *, at_once: bool) -> None:
        """Wakes whoever hands out, now or when the interval is over."""
        self._fresh = True
        if at_once or self._events.time() >= self._next:
            self._news.set()
        elif self._timer is None:
            self._timer = self._events.call_at(self._next, self._wake)

    def _wake(self) -> None:
        self._timer = None
        if self._fresh:
            self._news.set()

    def _fail(self, error: ApiError) -> None:
        """Ends the whole request."""
        if self.error is None:
            self.error = error
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()
        self._news.set()

    def _expire(self) -> None:
        self._expired = True
        for task, choice in zip(self._tasks, self.choices, strict=True):
            if choice.finish is None:
                task.cancel()

    # ---------------------------------------------------------------- its state

    async def _keep(self, place: int) -> str:
        """Keeps the state at the end of a choice's text; its handle."""
        choice, request = self.choices[place], self._requests[place]
        saved = choice.saved
        if saved is None or choice.stopped_by_text or choice.finish == "deadline":
            # The generation was cut off, perhaps some tokens after the last that counts: those are read again.
            saved = await read_state(
                self._backend,
                replace(
                    request,
                    prompt=(*request.prompt, *choice.said),
                    generation_id=f"{request.generation_id}-state",
                    keep=False,
                    read_only=True,
                    watch=False,
                    trees=False,
                ),
            )
        elif choice.finish == "length":
            saved = replace(saved, finished=False)  # it may go on
        assert self._state_seconds is not None
        return (await self._backend.put_state(saved, self._state_seconds, self._owner)).handle


def as_api_error(error: Exception, admission: Admission) -> ApiError:
    """What a client is told of whatever a backend raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return admission.full(str(error))
    if isinstance(error, GenerationFailed):
        return ApiError(503, str(error), code="generation_failed", headers={"retry-after": "1"})
    if isinstance(error, ValueError):
        return invalid(str(error))
    logger.error("a backend failed", exc_info=error)
    return ApiError(500, "the server failed", code="internal_error")


async def read_state(backend: Backend, request: GenerationRequest) -> SavedGeneration:
    """The state after a prompt that is only read.

    Raises:
        ValueError: the prompt cannot be read.
        QueueFull: too many wait.
        GenerationFailed: the generator is gone.
    """
    saved: SavedGeneration | None = None
    stream = backend.generate(request)
    try:
        async for items in stream:
            for item in items:
                if isinstance(item, SavedGeneration):
                    saved = item
                elif _is_last(item):
                    break
    finally:
        await stream.aclose()
    if saved is None:
        raise GenerationFailed(f"generation {request.generation_id} ended without its state")
    return saved


def _is_last(item: Item) -> bool:
    return isinstance(item, Token) and item.finished
