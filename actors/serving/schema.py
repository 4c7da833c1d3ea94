"""Requests and answers as pydantic models: what is checked, and what ``/openapi.json`` says.

An unknown field is an error. Fields of OpenAI's API that cannot be honoured are known, and take only the value that
asks for nothing. What may be asked for at most is the server's to say (:mod:`actors.serving.settings`), not the form's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from actors.serving.fields import Prompt, SaveState, Stop, Text, only


class Body(BaseModel):
    """Base of everything that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class CrsmOptions(Body):
    """How System 2 takes part, and what is told of it. What is missing is as the served model's settings have it, or as
    in the state that the request goes on from."""

    lag: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Tokens between the request of a plan and its target."""
    injection_rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    channel: Literal["state", "policy", "both", "off"] | None = None
    """How a plan reaches System 1; ``off``: no plan is asked for."""
    simulations: Count | None = None
    """Budget of one plan."""
    hypotheses: Count | None = None
    """Futures that are planned for."""
    plan_every: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Ask at every n-th position."""
    pace: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Tokens per second at most."""
    deadline: Above0 | None = None
    """Seconds after which the answer ends, whatever was said by then."""
    events: bool | None = None
    """Tell what happens to the plans."""
    trees: bool | None = None
    """With the search trees."""
    log: bool | None = None
    """Give the lines of an event log, which ``crsm replay`` reads."""
    state: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Go on from a state; the prompt is what is new."""
    save_state: SaveState = None
    """Keep the state when the answer is over: true, or for so many seconds."""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: only(None, False) = None  # type: ignore[valid-type]


class Asked(Body):
    """What completions and chat completions have in common."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """0: off."""
    n: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Choice ``i`` draws with ``seed + i``."""
    stop: Stop = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    """Ignored."""
    metadata: Any = None
    """Ignored."""
    presence_penalty: only(None, 0) = None  # type: ignore[valid-type]
    frequency_penalty: only(None, 0) = None  # type: ignore[valid-type]
    logit_bias: only(None, {}) = None  # type: ignore[valid-type]
    crsm: CrsmOptions | None = None


class CompletionRequest(Asked):
    prompt: Prompt
    """Text or token ids, one or several; empty only with ``crsm.state``, to let an answer that is not over go on."""
    echo: bool | None = None
    """Begin the text with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    """Give the log-probability of what was said; alternatives are not known."""
    best_of: Count | None = None
    """``n``, or nothing."""
    suffix: only(None, "") = None  # type: ignore[valid-type]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Any = None
    """Ignored."""
    refusal: only(None, "") = None  # type: ignore[valid-type]
    annotations: only(None, []) = None  # type: ignore[valid-type]
    audio: only(None) = None  # type: ignore[valid-type]
    function_call: only(None) = None  # type: ignore[valid-type]
    tool_calls: only(None, []) = None  # type: ignore[valid-type]


class ChatRequest(Asked):
    messages: list[ChatMessage]
    """With ``crsm.state`` only what is new."""
    max_completion_tokens: Count | None = None
    """The same as ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: only(None, 0) = None  # type: ignore[valid-type]
    audio: only(None) = None  # type: ignore[valid-type]
    function_call: only(None, "none", "auto") = None  # type: ignore[valid-type]
    functions: only(None, []) = None  # type: ignore[valid-type]
    modalities: only(None, ["text"]) = None  # type: ignore[valid-type]
    parallel_tool_calls: Any = None
    """Ignored: there are no tools."""
    prediction: only(None) = None  # type: ignore[valid-type]
    reasoning_effort: only(None) = None  # type: ignore[valid-type]
    response_format: only(None, {"type": "text"}) = None  # type: ignore[valid-type]
    service_tier: only(None, "auto", "default") = None  # type: ignore[valid-type]
    store: only(None, False) = None  # type: ignore[valid-type]
    tool_choice: only(None, "none", "auto") = None  # type: ignore[valid-type]
    tools: only(None, []) = None  # type: ignore[valid-type]
    verbosity: only(None) = None  # type: ignore[valid-type]
    web_search_options: only(None) = None  # type: ignore[valid-type]


class StateRequest(Body):
    """One of ``prompt``, ``messages`` and ``generation``."""

    model: Text
    prompt: Prompt | None = None
    messages: list[ChatMessage] | None = None
    generation: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """One that is speaking, as ``crsm.choices[].generation`` or the id of a stream and its index name it."""
    ttl: Above0 | None = None
    """Seconds to keep it."""


class ForkRequest(Body):
    ttl: Above0 | None = None


class CheckRequest(Body):
    task: Text
    index: Annotated[int, Field(ge=0, lt=2**31)]
    text: Text


class PlannersRequest(Body):
    count: Annotated[int, Field(ge=0, lt=2**31)]
