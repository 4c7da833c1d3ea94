"""Answers as pydantic models, for ``/openapi.json`` alone: what is sent is put together by hand."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorDetails(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    error: ErrorDetails


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    """With the token that ended an answer, which its text leaves out."""
    total_tokens: int


class InjectionNote(Answer):
    """A plan that was written."""

    position: int
    token: int
    """The first that it shaped."""
    line: str
    gates: list[float | None]
    alpha: list[float | None]
    value_now: float | None
    value_planned: float | None
    lag: int
    late: int


class ChoiceNote(Answer):
    index: int
    generation: str
    finish: Literal["stop", "length", "deadline"]
    verdict: Literal["yes", "no"] | None
    injections: list[InjectionNote]
    state: str | None
    events: list[dict[str, Any]] | None = None
    """With ``crsm.events``."""
    log: list[str] | None = None
    """With ``crsm.log``."""


class CrsmNote(Answer):
    choices: list[ChoiceNote]


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Any] | None
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage
    crsm: CrsmNote


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    crsm: CrsmNote


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class State(Answer):
    id: str
    object: Literal["crsm.state"]
    created: int | None
    """Known to whoever made it."""
    expires_at: int
    position: int
    bytes: int
    model: str


class Deleted(Answer):
    id: str
    object: Literal["crsm.state"]
    deleted: bool


class PlannersNote(Answer):
    count: int
    maximum: int
    """0: the number cannot be changed."""


class Info(Answer):
    model: str
    tasks: list[str]
    layers: int
    clock: Literal["virtual", "wall"]
    defaults: dict[str, Any]
    limits: dict[str, float]
    planners: PlannersNote
    auth: bool


class ProblemNote(Answer):
    task: str
    index: int
    prompt: str
    solution: str
    preamble: str
    data: dict[str, Any]


class Checked(Answer):
    correct: bool
    solution: str


class Health(Answer):
    status: str
