"""The event log of one generation, a few lines at a time: what ``crsm replay`` reads, put together from a stream."""

from __future__ import annotations

import json

from actors.serving.backend import ServedModel
from crsm.event_log import Event, inject_event, reject_event, request_event, start_event, token_event
from crsm.generation import GenerationRequest
from crsm.plan_events import PlanEvent
from crsm.types import Token


class GenerationLog:
    """Writes lines as things happen, and hands them out."""

    def __init__(self, request: GenerationRequest, served: ServedModel) -> None:
        self._version = served.model_version
        self._lines: list[str] = []
        self._write(
            start_event(
                request.generation_id,
                request.prompt,
                request.sampling,
                request.deliberation,
                served.model_version,
                served.weights_hash,
                fresh=request.start is None,
            )
        )

    def event(self, event: PlanEvent) -> None:
        """A request, an injection or a rejection; that a plan came is no event of a log."""
        name, injection = event.generation_id, event.injection
        if event.kind == "request":
            asked_at = event.target - event.lag
            self._write(request_event(name, event.request_id, asked_at, event.target, self._version))
        elif event.kind == "inject" and injection is not None:
            if any(injection.alpha_L) or injection.policy_weight > 0:  # as the engine's own log
                self._write(inject_event(injection))
        elif event.kind == "reject" and event.reason is not None and event.request_id >= 0:
            self._write(reject_event(name, event.request_id, event.target, event.reason))

    def token(self, token: Token) -> None:
        self._write(token_event(token))

    def take(self) -> list[str]:
        """The lines since the last time."""
        lines, self._lines = self._lines, []
        return lines

    def _write(self, event: Event) -> None:
        self._lines.append(json.dumps(event))
