"""States of prompts and of speaking generations, kept for a time under a handle that only their owner can use."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from actors.serving.bodies import read_body
from actors.serving.connection import while_connected
from actors.serving.errors import ApiError, invalid, json_response
from actors.serving.front import STATE_PREFIX, Front, RequestInfo, handle_of, no_state
from actors.serving.requests import check_model, prompts_of, read_only_request
from actors.serving.run import as_api_error, read_state
from actors.serving.schema import ForkRequest, StateRequest
from actors.state_store import StateHandle
from crsm.saved_generation import SavedGeneration


async def make_state(front: Front, request: Request) -> Response:
    """POST /v1/states."""
    info: RequestInfo = request.scope["crsm"]
    body = await read_body(request, StateRequest, front.settings.body_seconds)
    check_model(body.model, front.served)
    given = [name for name in ("prompt", "messages", "generation") if getattr(body, name) is not None]
    if len(given) != 1:
        shown = " and ".join(given) or "nothing"
        raise invalid(f"{shown} given; allowed: one of prompt, messages, generation", given[-1] if given else "prompt")
    seconds = _seconds(front, body.ttl)
    try:
        if body.generation is not None:
            saved = await _snapshot(front, body.generation, info.owner)
        else:
            tokens = await _tokens(front, body)
            front.note_prompt(info.request_id, [tokens])
            saved = await while_connected(request.receive, _read(front, tokens, info))
        handle = await front.backend.put_state(saved, seconds, info.owner)
    except Exception as error:
        raise as_api_error(error, front.admission) from None
    return json_response(_described(handle, front, created=True), 201)


async def get_state(front: Front, request: Request, state_id: str) -> Response:
    """GET /v1/states/{id}."""
    info: RequestInfo = request.scope["crsm"]
    _, handle = await _find(front, state_id, info.owner)
    return json_response(_described(handle, front, created=False))


async def fork_state(front: Front, request: Request, state_id: str) -> Response:
    """POST /v1/states/{id}/fork."""
    info: RequestInfo = request.scope["crsm"]
    body = await read_body(request, ForkRequest, front.settings.body_seconds, empty=True)
    seconds = _seconds(front, body.ttl)
    saved, _ = await _find(front, state_id, info.owner)
    try:
        handle = await front.backend.put_state(saved, seconds, info.owner)
    except Exception as error:
        raise as_api_error(error, front.admission) from None
    return json_response(_described(handle, front, created=True), 201)


async def drop_state(front: Front, request: Request, state_id: str) -> Response:
    """DELETE /v1/states/{id}."""
    info: RequestInfo = request.scope["crsm"]
    try:
        dropped = await front.backend.drop_state(handle_of(state_id), info.owner)
    except Exception as error:
        raise as_api_error(error, front.admission) from None
    if not dropped:
        raise no_state(state_id, None)
    return json_response({"id": state_id, "object": "crsm.state", "deleted": True})


async def _find(front: Front, state_id: str, owner: str) -> tuple[SavedGeneration, StateHandle]:
    try:
        return await front.backend.get_state(handle_of(state_id), owner)
    except ValueError:
        raise no_state(state_id, None) from None
    except Exception as error:
        raise as_api_error(error, front.admission) from None


def _seconds(front: Front, ttl: float | None) -> float:
    limit = front.settings.max_state_seconds
    if ttl is not None and ttl > limit:
        raise invalid(f"ttl = {ttl:g}; allowed: at most {limit:g} (max_state_seconds)", "ttl")
    return front.settings.state_seconds if ttl is None else ttl


async def _snapshot(front: Front, generation: str, owner: str) -> SavedGeneration:
    if front.admission.is_running(generation, owner):
        try:
            return await front.backend.snapshot(generation)
        except ValueError:
            pass
    raise ApiError(
        404,
        f"generation = {generation[:80]!r} is not speaking; allowed: one that is",
        param="generation",
        code="generation_not_found",
    )


async def _tokens(front: Front, body: StateRequest) -> tuple[int, ...]:
    if body.messages is not None:
        if not body.messages:
            raise invalid("messages is empty; allowed: at least one message", "messages")
        return await front.encode(front.render(body.messages), "messages", may_be_empty=False)
    prompts = prompts_of(body.prompt)
    if len(prompts) != 1:
        raise invalid(f"prompt has {len(prompts)} prompts; allowed: one", "prompt")
    return await front.encode(prompts[0], "prompt", may_be_empty=False)


async def _read(front: Front, tokens: tuple[int, ...], info: RequestInfo) -> SavedGeneration:
    """The state after a prompt; reading takes a place as a generation does."""
    name = f"state-{uuid.uuid4().hex}"
    (ticket,) = front.admission.enter([(name, 1)], info.owner)
    limit = front.settings.max_deadline
    try:
        async with asyncio.timeout(limit):
            return await read_state(front.backend, read_only_request(tokens, front.served, name))
    except TimeoutError:
        raise ApiError(408, f"the prompt was not read within {limit:g} s (max_deadline)") from None
    finally:
        front.admission.leave(ticket)


def _described(handle: StateHandle, front: Front, *, created: bool) -> dict[str, Any]:
    now = time.time()
    return {
        "id": f"{STATE_PREFIX}{handle.handle}",
        "object": "crsm.state",
        "created": int(now) if created else None,
        "expires_at": int(now + handle.seconds),
        "position": handle.position,
        "bytes": handle.num_bytes,
        "model": front.served.name,
    }
