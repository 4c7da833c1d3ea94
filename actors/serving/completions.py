"""Completions and chat completions, streamed or not.

Everything is checked before a response exists; the response itself runs the generations, so that whatever ends it ends
them. Its status is decided when the first item has come: until then an error is an answer of its own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.serving.bodies import read_body
from actors.serving.choice import Choice, Details, Said, Spoken
from actors.serving.connection import while_connected
from actors.serving.errors import ApiError, ClientGone, to_json
from actors.serving.front import STATE_PREFIX, Front, RequestInfo
from actors.serving.generation_log import GenerationLog
from actors.serving.requests import check_limits, check_model, generation_requests, prompts_of
from actors.serving.run import Run, as_api_error
from actors.serving.schema import Asked, ChatRequest, CompletionRequest, CrsmOptions
from actors.serving.sse import DONE, Chunks, Kind, error_event
from crsm.generation import GenerationRequest
from crsm.saved_generation import SavedGeneration

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""


async def complete(front: Front, request: Request) -> Response:
    """POST /v1/completions."""
    body = await read_body(request, CompletionRequest, front.settings.body_seconds)
    check_model(body.model, front.served)
    prompts = prompts_of(body.prompt)
    check_limits(body, len(prompts), front.settings)
    return await _respond(front, request, body, prompts, "prompt", "text")


async def complete_chat(front: Front, request: Request) -> Response:
    """POST /v1/chat/completions."""
    body = await read_body(request, ChatRequest, front.settings.body_seconds)
    check_model(body.model, front.served)
    check_limits(body, 1, front.settings)
    text = front.render(body.messages) if body.messages else ""
    return await _respond(front, request, body, [text], "messages", "chat")


async def _respond(
    front: Front, request: Request, body: Asked, prompts: Sequence[str | list[int]], field: str, kind: Kind
) -> Response:
    info: RequestInfo = request.scope["crsm"]
    options = body.crsm or CrsmOptions()
    saved = None if options.state is None else await front.saved_state(options.state, info.owner)
    front.note_prompt(info.request_id, prompts)
    names = [field] if len(prompts) == 1 else [f"{field}[{place}]" for place in range(len(prompts))]
    encoded = [
        await front.encode(prompt, name, may_be_empty=saved is not None)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    completion_id = f"{'cmpl' if kind == 'text' else 'chatcmpl'}-{uuid.uuid4().hex}"
    requests = generation_requests(body, encoded, front.served, front.settings, saved, completion_id)
    choices = _choices(front, body, options, requests, saved)
    return CompletionResponse(front, info, body, kind, completion_id, choices, requests, sum(map(len, encoded)))


def _choices(
    front: Front,
    body: Asked,
    options: CrsmOptions,
    requests: Sequence[GenerationRequest],
    saved: SavedGeneration | None,
) -> list[Choice]:
    served = front.served
    logprobs = body.logprobs is not None if isinstance(body, CompletionRequest) else bool(getattr(body, "logprobs", 0))
    details = Details(logprobs, events=bool(options.events), tokens=bool(options.events and body.stream))
    choices = []
    for index, request in enumerate(requests):
        echo = isinstance(body, CompletionRequest) and bool(body.echo)
        before: tuple[int, ...] = request.prompt if echo else ()
        if saved is not None and not request.prompt:
            before = saved.tokens[-4:]  # the rest of a character, at most
        choices.append(
            Choice(
                index,
                request.generation_id,
                served.tokenizer,
                front.notes,
                stop=body.stop or (),
                details=details,
                log=GenerationLog(request, served) if options.log else None,
                before=before,
                echo=served.tokenizer.decode(before) if echo and request.prompt else "",
            )
        )
    return choices


@dataclass(slots=True)
class _Sent:
    """What a stream has handed out of a choice."""

    begun: bool = False
    ended: bool = False


class CompletionResponse(Response):
    """Runs the generations of one request and answers it."""

    def __init__(
        self,
        front: Front,
        info: RequestInfo,
        body: Asked,
        kind: Kind,
        completion_id: str,
        choices: Sequence[Choice],
        requests: Sequence[GenerationRequest],
        prompt_tokens: int,
    ) -> None:
        super().__init__(media_type="text/event-stream" if body.stream else "application/json")
        self._front, self._info, self._body, self._kind = front, info, body, kind
        self._id, self._created = completion_id, int(time.time())
        self._choices, self._requests, self._prompt_tokens = choices, requests, prompt_tokens
        self._options = body.crsm or CrsmOptions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._body.stream:
            self._front.open_streams += 1
            try:
                await self._stream(scope, receive, send)
            finally:
                self._front.open_streams -= 1
            return
        try:
            async with self._run(interval=self._deadline) as run:
                try:
                    await run.all()
                finally:
                    self._info.tokens = run.tokens
                answer = self._whole(run)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await Response(to_json(answer), media_type="application/json")(scope, receive, send)

    @property
    def _deadline(self) -> float:
        return self._options.deadline or self._front.settings.max_deadline

    def _run(self, interval: float | None = None) -> Run:
        front, save = self._front, self._options.save_state
        seconds = None if not save else front.settings.state_seconds if save is True else float(save)
        return Run(
            front.backend,
            front.admission,
            front.telemetry,
            self._choices,
            self._requests,
            owner=self._info.owner,
            deadline=self._deadline,
            interval=front.interval if interval is None else lambda: interval,
            state_seconds=seconds,
            came=self._info.came,
        )

    # ---------------------------------------------------------------- streamed

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        served = self._front.served
        usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        chunks = Chunks(self._kind, self._id, self._created, served.name, served.weights_hash, usage)
        sent = [_Sent() for _ in self._choices]
        started = False
        run = self._run()
        try:
            async with run:
                try:
                    while not all(each.ended for each in sent):
                        await run.news()
                        data = b"".join(self._chunks(run, chunks, sent))
                        if not started:
                            started = True
                            await send(self._start())
                        if data:
                            await send({"type": "http.response.body", "body": data, "more_body": True})
                finally:
                    self._info.tokens = run.tokens
            end = (chunks.usage(self._usage()) if usage else b"") + DONE
        except OSError:  # of ``send``: nobody reads
            raise ClientGone from None
        except Exception as failure:
            error = as_api_error(failure, self._front.admission)
            if not started:
                await error.response()(scope, receive, send)
                return
            end = b"".join(self._chunks(run, chunks, sent)) + error_event(error) + DONE
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _start(self) -> dict[str, Any]:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # proxies would hold events back
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    def _chunks(self, run: Run, chunks: Chunks, sent: Sequence[_Sent]) -> Iterator[bytes]:
        """The events for what has come since the last time."""
        seconds = run.seconds
        for place, (choice, mine) in enumerate(zip(self._choices, sent, strict=True)):
            if mine.ended:
                continue
            said, ends = choice.take(), run.done[place]
            if not (ends or said.text or said.tokens or said.events or said.log):
                continue
            notes: dict[str, Any] = {}
            if self._options.events:
                notes = {"events": said.events, "tokens": [_told(token) for token in said.tokens], "t": seconds}
            if self._options.log:
                notes["log"] = said.log
            if ends:
                notes |= {"finish": choice.finish, "verdict": choice.verdict, "state": _state_name(run.states[place])}
            yield chunks.chunk(
                choice.index,
                said.text,
                choice.finish_reason if ends else None,
                self._logprobs(said.tokens),
                notes or None,
                first=not mine.begun,
            )
            mine.begun, mine.ended = True, ends

    # ---------------------------------------------------------------- at once

    def _whole(self, run: Run) -> dict[str, Any]:
        served = self._front.served
        said = [choice.take() for choice in self._choices]
        return {
            "id": self._id,
            "object": "text_completion" if self._kind == "text" else "chat.completion",
            "created": self._created,
            "model": served.name,
            "system_fingerprint": served.weights_hash,
            "choices": [self._whole_choice(choice, each) for choice, each in zip(self._choices, said, strict=True)],
            "usage": self._usage(),
            "crsm": {
                "choices": [
                    self._notes(choice, each, state)
                    for choice, each, state in zip(self._choices, said, run.states, strict=True)
                ]
            },
        }

    def _whole_choice(self, choice: Choice, said: Said) -> dict[str, Any]:
        text: dict[str, Any] = (
            {"text": said.text}
            if self._kind == "text"
            else {"message": {"role": "assistant", "content": said.text, "refusal": None}}
        )
        return {
            "index": choice.index,
            **text,
            "logprobs": self._logprobs(said.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _notes(self, choice: Choice, said: Said, state: str | None) -> dict[str, Any]:
        notes = {
            "index": choice.index,
            "generation": choice.generation_id,
            "finish": choice.finish,
            "verdict": choice.verdict,
            "injections": choice.injections,
            "state": _state_name(state),
        }
        if self._options.events:
            notes["events"] = said.events
        if self._options.log:
            notes["log"] = said.log
        return notes

    def _usage(self) -> dict[str, int]:
        said = sum(len(choice.said) for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": said,
            "total_tokens": self._prompt_tokens + said,
        }

    def _logprobs(self, tokens: Sequence[Spoken]) -> dict[str, Any] | None:
        if isinstance(self._body, CompletionRequest):
            if self._body.logprobs is None:
                return None
            return {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [_logprob(token) for token in tokens],
                "top_logprobs": None,
                "text_offset": [token.offset for token in tokens],
            }
        if not isinstance(self._body, ChatRequest) or not self._body.logprobs:
            return None
        content = [
            {
                "token": token.text,
                "logprob": _logprob(token),
                "bytes": list(token.text.encode("utf-8")),
                "top_logprobs": [],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _told(token: Spoken) -> dict[str, Any]:
    return {
        "position": token.position,
        "id": token.token,
        "text": token.text,
        "logprob": _logprob(token),
        "injected": token.injected,
    }


def _logprob(token: Spoken) -> float:
    return round(token.logprob, 6) if token.logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def _state_name(handle: str | None) -> str | None:
    return None if handle is None else f"{STATE_PREFIX}{handle.removeprefix(STATE_PREFIX)}"
