"""Limits, keys and defaults of the HTTP front. Imports neither torch nor Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from crsm.config import Positive, Settings

KEYS_VARIABLE = "CRSM_API_KEYS"
"""Environment variable with further keys, separated by commas."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServeSettings(Settings):
    """What a server allows. The names of the limits are those that its error messages give."""

    max_prompt_tokens: Positive = 8192
    max_tokens: Positive = 4096
    """Tokens that one choice may ask for; ``max_tokens`` of a request."""
    max_n: Positive = 16
    """Choices of one request: prompts times ``n``."""
    max_stop: Positive = 4
    """Stop strings."""
    max_stop_length: Positive = 256
    """Characters of a stop string."""
    max_body_bytes: Positive = 2**20
    max_lag: Annotated[int, Field(ge=0)] = 64
    max_simulations: Positive = 4096
    max_hypotheses: Positive = 16
    max_deadline: Seconds = 600.0
    """Seconds that a request may take; one that names no deadline has this one."""
    max_concurrent: Positive = 256
    """Generations that run or wait; one more is refused with 429."""
    body_seconds: Seconds = 30.0
    """Within which a request's body must have come."""
    state_seconds: Seconds = 600.0
    """How long a state is kept that names no time."""
    max_state_seconds: Seconds = 86400.0
    stream_interval: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """Seconds between two events of a stream at least; what was said meanwhile comes together."""
    events_per_second: Seconds = 200.0
    """Of all streams together, about: with more streams their events get rarer and larger."""
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    """Keys that are let in, beside those of ``api_key_file`` and ``CRSM_API_KEYS``; without any, everybody is."""
    api_key_file: str | None = None
    """A key a line; ``#`` begins a comment."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call; ``*``: all. Empty: no CORS."""
    log_prompts: bool = False
    """Write prompts into the log."""

    @model_validator(mode="after")
    def _fit_together(self) -> ServeSettings:
        if self.state_seconds > self.max_state_seconds:
            limit = f"max_state_seconds = {self.max_state_seconds:g}"
            raise ValueError(f"state_seconds = {self.state_seconds:g}; allowed: at most {limit}")
        if self.max_n > self.max_concurrent:
            raise ValueError(f"max_n = {self.max_n}; allowed: at most max_concurrent = {self.max_concurrent}")
        return self

    def keys(self, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
        """All keys, from the settings, the file and the environment.

        Raises:
            ValueError: the file cannot be read or holds none (a server that was to have keys must not stand open), or
                a key has characters that no header can carry.
        """
        found = [*self.api_keys]
        if self.api_key_file is not None:
            found += _keys_of_file(self.api_key_file)
        found += [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
        keys = tuple(dict.fromkeys(key for key in found if key))
        for place, key in enumerate(keys):
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ValueError(f"API key {place} has a space or unprintable characters; allowed: printable ASCII")
        return keys


def _keys_of_file(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"api_key_file = {path!r} cannot be read: {error}") from error
    keys = [line.partition("#")[0].strip() for line in text.splitlines()]
    if not any(keys):
        raise ValueError(f"api_key_file = {path!r} holds no key; allowed: at least one, a line each")
    return keys
