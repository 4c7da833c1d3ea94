"""The schema of the server, with its limits in it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from actors.serving.front import Front
from actors.serving.schema import (
    ChatRequest,
    CheckRequest,
    CompletionRequest,
    ForkRequest,
    PlannersRequest,
    StateRequest,
)

_BODIES = (ChatRequest, CheckRequest, CompletionRequest, ForkRequest, PlannersRequest, StateRequest)
_LIMITS = (
    ("CrsmOptions", "lag", "max_lag"),
    ("CrsmOptions", "simulations", "max_simulations"),
    ("CrsmOptions", "hypotheses", "max_hypotheses"),
    ("CrsmOptions", "deadline", "max_deadline"),
    ("CompletionRequest", "n", "max_n"),
    ("CompletionRequest", "max_tokens", "max_tokens"),
    ("ChatRequest", "n", "max_n"),
    ("ChatRequest", "max_tokens", "max_tokens"),
    ("ChatRequest", "max_completion_tokens", "max_tokens"),
    ("StateRequest", "ttl", "max_state_seconds"),
    ("ForkRequest", "ttl", "max_state_seconds"),
)
_REFERENCE = "#/components/schemas/{model}"


def body_of(model: type, *, required: bool = True) -> dict[str, Any]:
    """What a route says of the body that it reads itself."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def build_schema(app: FastAPI, front: Front, *, auth: bool) -> dict[str, Any]:
    """The OpenAPI document."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    bodies = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REFERENCE)[1]["$defs"]
    for schema, field, limit in _LIMITS:
        for choice in bodies[schema]["properties"][field].get("anyOf", ()):
            if choice.get("type") in ("integer", "number"):
                choice["maximum"] = getattr(front.settings, limit)
    for schema in ("CompletionRequest", "ChatRequest", "StateRequest"):
        bodies[schema]["properties"]["model"] = {"type": "string", "enum": [front.served.name]}
    tasks = [task.label for task in front.served.config.tasks]
    document["paths"]["/v1/crsm/problems/{task}"]["get"]["parameters"][0]["schema"]["enum"] = tasks
    bodies["CheckRequest"]["properties"]["task"] = {"type": "string", "enum": tasks}
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= bodies
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for path, item in document["paths"].items():
        for operation in item.values():
            operation["responses"].pop("422", None)  # bad input is 400, in OpenAI's form
            if auth and path.startswith("/v1"):
                operation["security"] = [{"key": []}]
    if auth:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
