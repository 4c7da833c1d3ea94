"""From a request's body to generations: pure, and the one place that knows the server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from actors.serving.backend import ServedModel
from actors.serving.errors import ApiError, invalid
from actors.serving.fields import short
from actors.serving.schema import Asked, ChatMessage, ChatRequest, CompletionRequest, CrsmOptions
from actors.serving.settings import ServeSettings
from crsm.config import DeliberationConfig, SamplingConfig
from crsm.data.tokenizer import Tokenizer
from crsm.generation import GenerationRequest
from crsm.saved_generation import SavedGeneration
from crsm.types import Channel

SEEDS = 2**63


def check_model(name: str, served: ServedModel) -> None:
    """
    Raises:
        ApiError: 404, another model than the served one.
    """
    if name != served.name:
        raise ApiError(
            404,
            f"model = {name[:80]!r} does not exist; allowed: {served.name!r}",
            param="model",
            code="model_not_found",
        )


def check_limits(body: Asked, prompts: int, settings: ServeSettings) -> None:
    """
    Raises:
        ApiError: 400, naming the field, its value and the limit.
    """
    choices = prompts * (body.n or 1)
    if choices > settings.max_n:
        count = "n =" if prompts == 1 else f"prompts × n = {prompts} ×"
        _refuse("n", f"{count} {body.n or 1}", 1, settings.max_n, "max_n")
    options = body.crsm or CrsmOptions()
    limits: tuple[tuple[str, float | None, float, str], ...] = (
        ("max_tokens", body.max_tokens, settings.max_tokens, "max_tokens"),
        ("crsm.lag", options.lag, settings.max_lag, "max_lag"),
        ("crsm.simulations", options.simulations, settings.max_simulations, "max_simulations"),
        ("crsm.hypotheses", options.hypotheses, settings.max_hypotheses, "max_hypotheses"),
        ("crsm.deadline", options.deadline, settings.max_deadline, "max_deadline"),
        ("crsm.save_state", options.save_state, settings.max_state_seconds, "max_state_seconds"),
    )
    if isinstance(body, ChatRequest):
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            raise invalid(
                f"max_tokens = {body.max_tokens} and max_completion_tokens = {body.max_completion_tokens}; "
                "allowed: one of them",
                "max_tokens",
            )
        limits += (("max_completion_tokens", body.max_completion_tokens, settings.max_tokens, "max_tokens"),)
    for field, value, limit, name in limits:
        if value is not None and value > limit:
            _refuse(field, f"{field} = {short(value)}", 0 if field == "crsm.lag" else None, limit, name)
    stops = body.stop or ()
    if len(stops) > settings.max_stop:
        raise invalid(f"stop = {len(stops)} strings; allowed: at most {settings.max_stop} (max_stop)", "stop")
    if any(len(stop) > settings.max_stop_length for stop in stops):
        raise invalid(f"stop: allowed: at most {settings.max_stop_length} characters (max_stop_length)", "stop")
    if body.stream_options is not None and not body.stream:
        raise invalid('stream_options without stream; allowed: with "stream": true', "stream_options")
    if isinstance(body, CompletionRequest):
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise invalid(f"best_of = {body.best_of}; allowed: n = {body.n or 1} (not supported)", "best_of")
        if body.echo and body.logprobs is not None:
            raise invalid("echo with logprobs; allowed: one of them (a prompt's are not known)", "logprobs")
    if (options.trees or False) and not options.events:
        raise invalid('crsm.trees without crsm.events; allowed: with "events": true', "crsm.trees")


def _refuse(field: str, shown: str, low: int | None, limit: float, name: str) -> NoReturn:
    allowed = f"at most {limit:g}" if low is None else f"{low} to {limit:g}"
    raise invalid(f"{shown}; allowed: {allowed} ({name})", field)


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The single prompts of the field ``prompt``."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return prompt
    return [prompt]


def encode_prompt(
    prompt: str | Sequence[int], tokenizer: Tokenizer, settings: ServeSettings, field: str, *, may_be_empty: bool
) -> tuple[int, ...]:
    """One prompt's tokens.

    Raises:
        ApiError: 400, it is empty or too long, or holds what the vocabulary does not.
    """
    limit = settings.max_prompt_tokens
    if isinstance(prompt, str):
        if may_be_empty and not prompt.strip():
            return ()
        try:
            tokens = tuple(tokenizer.encode(prompt))
        except ValueError as error:
            raise invalid(f"{field}: {error}", field) from None
    else:
        tokens = tuple(prompt)
        if not tokens and not may_be_empty:
            raise invalid(f"{field} is empty; allowed: at least one token", field)
        vocab = tokenizer.vocab_size
        for place, token in enumerate(tokens):
            if not 0 <= token < vocab:
                raise invalid(f"{field}[{place}] = {token}; allowed: 0 to {vocab - 1}", f"{field}[{place}]")
    if len(tokens) > limit:
        raise invalid(f"{field} has {len(tokens)} tokens; allowed: at most {limit} (max_prompt_tokens)", field)
    return tokens


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages as a template reads them."""
    return [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in messages
    ]


def generation_requests(
    body: Asked,
    prompts: Sequence[tuple[int, ...]],
    served: ServedModel,
    settings: ServeSettings,
    saved: SavedGeneration | None,
    completion_id: str,
) -> list[GenerationRequest]:
    """The generations that a checked request asks for, ``n`` for every prompt, prompt by prompt.

    What a request does not say is as in the state that it goes on from, or as the served model's settings have it.

    Raises:
        ApiError: 400, there is nothing to go on from.
    """
    options = body.crsm or CrsmOptions()
    if saved is not None and saved.finished and not all(prompts):
        raise invalid("the prompt is empty, and the turn of crsm.state is over; allowed: a prompt", "prompt")
    sampling = _sampling(body, served, settings, saved)
    first = GenerationRequest(
        (),
        sampling,
        _deliberation(options, served, saved),
        _or(options.simulations, saved.simulations if saved else served.config.search.simulations),
        pace=_or(options.pace, saved.pace if saved else None),
        start=saved,
        keep=bool(options.save_state),
        watch=bool(options.events or options.log),
        trees=bool(options.trees),
    )
    count = body.n or 1
    return [
        replace(
            first,
            prompt=prompt,
            sampling=sampling.model_copy(
                update={
                    "seed": (sampling.seed + index) % SEEDS,
                    # An answer that goes on counts what it has said.
                    "max_tokens": sampling.max_tokens + (saved.generated if saved and not prompt else 0),
                }
            ),
            # Choices that all went on with the saved random numbers would all be the same.
            reseed=saved is not None and (body.seed is not None or index > 0),
            generation_id=f"{completion_id}-{index}",
        )
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(count))
    ]


def _sampling(
    body: Asked, served: ServedModel, settings: ServeSettings, saved: SavedGeneration | None
) -> SamplingConfig:
    base = saved.sampling if saved else served.config.sampling
    wanted = body.max_tokens
    if isinstance(body, ChatRequest):
        wanted = wanted or body.max_completion_tokens
    changes: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": None if body.seed is None else body.seed % SEEDS,
        "max_tokens": wanted or min(served.config.sampling.max_tokens, settings.max_tokens),
    }
    return base.model_copy(update={name: value for name, value in changes.items() if value is not None})


def _deliberation(options: CrsmOptions, served: ServedModel, saved: SavedGeneration | None) -> DeliberationConfig:
    base = saved.deliberation if saved else served.config.deliberation
    changes: dict[str, Any] = {
        "lag": options.lag,
        "injection_rate": options.injection_rate,
        "hypotheses": options.hypotheses,
        "plan_every": options.plan_every,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.channel is not None:
        off = options.channel == "off"
        changes |= {
            "channel": Channel(options.channel),
            "max_plans": 0 if off else served.config.deliberation.max_plans,
        }
    return base.model_copy(update=changes)


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def read_only_request(tokens: tuple[int, ...], served: ServedModel, name: str, start: Any = None) -> GenerationRequest:
    """A generation that consumes a prompt for the state after it."""
    config = served.config
    return GenerationRequest(
        tokens,
        start.sampling if start else config.sampling,
        start.deliberation if start else config.deliberation,
        start.simulations if start else config.search.simulations,
        name,
        start=start,
        read_only=True,
    )
