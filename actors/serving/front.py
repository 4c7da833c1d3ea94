"""What all endpoints share: the backend, the limits, who is let in, and how events and conversations are written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.serving.admission import Admission
from actors.serving.backend import Backend, ServedModel
from actors.serving.chat import Render, make_renderer
from actors.serving.errors import ApiError, invalid
from actors.serving.event_json import EventJson
from actors.serving.requests import encode_prompt, plain_messages
from actors.serving.schema import ChatMessage
from actors.serving.settings import ServeSettings
from actors.serving.telemetry import Telemetry
from crsm.saved_generation import SavedGeneration

logger = logging.getLogger(__name__)

LONG_PROMPT = 20_000
"""Characters of a prompt that is encoded in a thread, beside the event loop."""
STATE_PREFIX = "state-"


@dataclass(slots=True)
class RequestInfo:
    """What is known of a request beside what it holds; in ``scope["crsm"]``."""

    request_id: str
    came: float
    """On the event loop's clock."""
    owner: str = ""
    """sha256 of the API key; empty without keys."""
    tokens: int = 0
    """Said for it."""


class Front:
    """One server's shared objects."""

    def __init__(
        self, backend: Backend, settings: ServeSettings, telemetry: Telemetry, is_draining: Callable[[], bool]
    ) -> None:
        self.backend, self.settings, self.telemetry = backend, settings, telemetry
        self.is_draining = is_draining
        self.admission = Admission(settings.max_concurrent, telemetry, is_draining)
        self.open_streams = 0
        self._weights = ("", -1)
        """Hash and version of those that ``_notes`` and ``_render`` belong to."""
        self._notes: EventJson
        self._render: Render
        self._follow()

    def _follow(self) -> ServedModel:
        served = self.backend.model
        if (weights := (served.weights_hash, served.model_version)) != self._weights:
            self._weights = weights
            self._notes, self._render = EventJson(served), make_renderer(served.chat_template, served.tokenizer)
        return served

    @property
    def served(self) -> ServedModel:
        """The model, as it is now: its weights may be updated."""
        return self._follow()

    @property
    def notes(self) -> EventJson:
        """Writes the events of the model as it is now."""
        self._follow()
        return self._notes

    def interval(self) -> float:
        """Seconds between two events of a stream at least."""
        return max(self.settings.stream_interval, self.open_streams / self.settings.events_per_second)

    async def encode(self, prompt: str | Sequence[int], field: str, *, may_be_empty: bool) -> tuple[int, ...]:
        """A prompt's tokens; a long one does not hold up other requests.

        Raises:
            ApiError: 400, it cannot be encoded.
        """
        tokenizer, settings = self.served.tokenizer, self.settings
        if isinstance(prompt, str) and len(prompt) > LONG_PROMPT:
            return await asyncio.to_thread(encode_prompt, prompt, tokenizer, settings, field, may_be_empty=may_be_empty)
        return encode_prompt(prompt, tokenizer, settings, field, may_be_empty=may_be_empty)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """A conversation as text.

        Raises:
            ApiError: 400, the template refuses it.
        """
        try:
            return self._render(plain_messages(messages))
        except ValueError as error:
            raise invalid(f"messages: {error}", "messages") from None

    async def saved_state(self, name: str, owner: str, field: str = "crsm.state") -> SavedGeneration:
        """The state that a handle names.

        Raises:
            ApiError: 404, there is none, or it is another owner's.
        """
        try:
            return (await self.backend.get_state(handle_of(name), owner))[0]
        except ValueError:
            raise no_state(name, field) from None

    def note_prompt(self, request_id: str, prompts: Sequence[object]) -> None:
        """Writes prompts into the log, if that is wanted."""
        if self.settings.log_prompts:
            logger.info("%s asks %r", request_id, list(prompts))


def handle_of(name: str) -> str:
    """The backend's handle of a state that clients know under a name."""
    return name.removeprefix(STATE_PREFIX)


def no_state(name: str, field: str | None) -> ApiError:
    return ApiError(
        404,
        f"{field or 'state'} = {name[:80]!r} does not exist, or its time is over; allowed: the id of a state",
        param=field,
        code="state_not_found",
    )
