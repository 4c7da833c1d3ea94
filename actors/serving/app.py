"""The application: routes, in OpenAI's form, over a backend that is handed in.

A shim: what a request means is decided in :mod:`actors.serving.requests`, what is said in
:mod:`actors.serving.choice`; here they meet a URL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from actors.serving import answers
from actors.serving.access import Access
from actors.serving.auth import Authentication, Keys
from actors.serving.backend import Backend
from actors.serving.bodies import read_body
from actors.serving.completions import complete, complete_chat
from actors.serving.errors import ApiError, json_response
from actors.serving.fields import field_name
from actors.serving.front import Front
from actors.serving.limits import BodyLimit
from actors.serving.openapi import body_of, build_schema
from actors.serving.problems import Problems
from actors.serving.requests import check_model
from actors.serving.run import as_api_error
from actors.serving.schema import (
    ChatRequest,
    CheckRequest,
    CompletionRequest,
    ForkRequest,
    PlannersRequest,
    StateRequest,
)
from actors.serving.settings import ServeSettings
from actors.serving.states import drop_state, fork_state, get_state, make_state
from actors.serving.telemetry import NO_TELEMETRY, Telemetry
from crsm import __version__

PAGE = Path(__file__).parent / "page"
_ERRORS = {
    400: "a field is wrong; it is named",
    401: "the API key is missing or not known",
    404: "there is no such thing",
    408: "it took too long",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "too many generations; see Retry-After",
    500: "the server failed",
    503: "not ready, shutting down, or the generator is gone",
}
_BODY = (400, 401, 408, 413, 415, 500)
_GENERATE = (*_BODY, 404, 429, 503)


def build_app(backend: Backend, settings: ServeSettings, telemetry: Telemetry = NO_TELEMETRY) -> FastAPI:
    """The application over a backend.

    ``app.state.draining = True`` turns new generations away with 503, and lets those go on that run;
    ``app.state.front`` knows how many they are (``len(front.admission)``).

    Raises:
        ValueError: the keys cannot be read.
    """
    app = FastAPI(
        title="CRSM",
        version=__version__,
        description="A language model that thinks while it speaks, in the form of OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.draining = False
    front = app.state.front = Front(backend, settings, telemetry, lambda: bool(app.state.draining))
    keys = Keys(settings.keys())
    app.openapi = lambda: build_schema(app, front, auth=bool(keys))  # type: ignore[method-assign]
    _add_generation(app, front)
    _add_states(app, front)
    _add_information(app, front, keys)
    _add_page(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    # The last one is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Authentication, keys=keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Access, telemetry=telemetry)
    return app


def _documented(model: type, *statuses: int, ok: int = 200) -> dict[str, Any]:
    """What a route says of its answers."""
    errors = {status: {"model": answers.Error, "description": _ERRORS[status]} for status in statuses}
    return {"responses": {ok: {"model": model, "description": "the answer"}, **errors}, "status_code": ok}


def _streamed(documented: dict[str, Any]) -> dict[str, Any]:
    documented["responses"][200]["content"] = {
        "text/event-stream": {"schema": {"type": "string"}, "example": "data: {…}\n\ndata: [DONE]\n\n"}
    }
    return documented


def _add_generation(app: FastAPI, front: Front) -> None:
    @app.post(
        "/v1/completions",
        openapi_extra=body_of(CompletionRequest),
        **_streamed(_documented(answers.Completion, *_GENERATE)),
    )
    async def completions(request: Request) -> Response:
        return await complete(front, request)

    @app.post(
        "/v1/chat/completions",
        openapi_extra=body_of(ChatRequest),
        **_streamed(_documented(answers.ChatCompletion, *_GENERATE)),
    )
    async def chat_completions(request: Request) -> Response:
        return await complete_chat(front, request)

    def described() -> dict[str, Any]:
        served = front.served
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "crsm"}

    @app.get("/v1/models", **_documented(answers.ModelList, 401, 500))
    async def models() -> Response:
        return json_response({"object": "list", "data": [described()]})

    # A name may hold slashes, as a repository's does.
    @app.get("/v1/models/{model:path}", **_documented(answers.Model, 401, 404, 500))
    async def model(model: str) -> Response:
        check_model(model, front.served)
        return json_response(described())


def _add_states(app: FastAPI, front: Front) -> None:
    @app.post("/v1/states", openapi_extra=body_of(StateRequest), **_documented(answers.State, *_GENERATE, ok=201))
    async def make(request: Request) -> Response:
        return await make_state(front, request)

    @app.get("/v1/states/{state_id}", **_documented(answers.State, 401, 404, 500, 503))
    async def get(request: Request, state_id: str) -> Response:
        return await get_state(front, request, state_id)

    @app.post(
        "/v1/states/{state_id}/fork",
        openapi_extra=body_of(ForkRequest, required=False),
        **_documented(answers.State, *_BODY, 404, 503, ok=201),
    )
    async def fork(request: Request, state_id: str) -> Response:
        return await fork_state(front, request, state_id)

    @app.delete("/v1/states/{state_id}", **_documented(answers.Deleted, 401, 404, 500, 503))
    async def drop(request: Request, state_id: str) -> Response:
        return await drop_state(front, request, state_id)


def _add_information(app: FastAPI, front: Front, keys: Keys) -> None:
    problems, backend, settings = Problems(front), front.backend, front.settings

    async def planner_count() -> dict[str, int]:
        try:
            planners = await backend.planners()
        except Exception as error:
            raise as_api_error(error, front.admission) from None
        return {"count": planners.count, "maximum": planners.maximum}

    @app.get("/v1/crsm/info", **_documented(answers.Info, 401, 500, 503))
    async def info() -> Response:
        config = front.served.config
        deliberation, limits = config.deliberation, settings.model_dump(exclude={"api_keys", "api_key_file"})
        return json_response(
            {
                "model": front.served.name,
                "tasks": [task.label for task in config.tasks],
                "layers": config.model.backbone.n_layer,
                "clock": config.engine.clock,
                "defaults": {
                    "lag": deliberation.lag,
                    "injection_rate": deliberation.injection_rate,
                    "channel": deliberation.channel.value,
                    "simulations": config.search.simulations,
                    "hypotheses": deliberation.hypotheses,
                    "pace": config.engine.pace,
                    "max_tokens": min(config.sampling.max_tokens, settings.max_tokens),
                    "temperature": config.sampling.temperature,
                },
                "limits": {name: limit for name, limit in limits.items() if name.startswith("max_")},
                "planners": await planner_count(),
                "auth": bool(keys),
            }
        )

    @app.get("/v1/crsm/problems/{task}", **_documented(answers.ProblemNote, 400, 401, 404, 500))
    async def problem(task: str, index: Annotated[int, Query(ge=0, lt=2**31)] = 0) -> Response:
        return json_response(await problems.problem(task, index))

    @app.post("/v1/crsm/check", openapi_extra=body_of(CheckRequest), **_documented(answers.Checked, *_BODY, 404))
    async def check(request: Request) -> Response:
        body = await read_body(request, CheckRequest, settings.body_seconds)
        return json_response(await problems.check(body.task, body.index, body.text))

    @app.get("/v1/crsm/planners", **_documented(answers.PlannersNote, 401, 500, 503))
    async def get_planners() -> Response:
        return json_response(await planner_count())

    @app.put(
        "/v1/crsm/planners", openapi_extra=body_of(PlannersRequest), **_documented(answers.PlannersNote, *_BODY, 503)
    )
    async def put_planners(request: Request) -> Response:
        body = await read_body(request, PlannersRequest, settings.body_seconds)
        try:
            planners = await backend.set_planners(body.count)
        except ValueError as error:
            raise ApiError(400, str(error), param="count") from None
        except Exception as error:
            raise as_api_error(error, front.admission) from None
        return json_response({"count": planners.count, "maximum": planners.maximum})

    @app.get("/healthz", **_documented(answers.Health))
    async def healthz() -> Response:
        return json_response({"status": "alive"})

    @app.get("/readyz", **_documented(answers.Health, 503))
    async def readyz() -> Response:
        if front.is_draining():
            raise ApiError(503, "the server is shutting down")
        if not await backend.is_ready():
            raise ApiError(503, "the generator is not ready")
        return json_response({"status": "ready"})


class _FreshFiles(StaticFiles):
    """Files that a browser asks after every time: modules of two versions would not understand each other."""

    def file_response(self, *arguments: Any, **named: Any) -> Response:
        response = super().file_response(*arguments, **named)
        response.headers["cache-control"] = "no-cache"
        return response


def _add_page(app: FastAPI) -> None:
    if not (PAGE / "index.html").is_file():
        return

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    # The page names its files relative to the root.
    @app.get("/page/", include_in_schema=False)
    @app.get("/page/index.html", include_in_schema=False)
    async def page_itself() -> Response:
        return RedirectResponse("../")

    app.mount("/page", _FreshFiles(directory=PAGE), name="page")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path", 405: f"{request.method} is not allowed here"}.get(
        error.status_code, str(error.detail)
    )
    return ApiError(error.status_code, what, headers=error.headers).response()


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = field_name(first["loc"][1:])
    return ApiError(400, f"{field}: {first['msg']}", param=field).response()
