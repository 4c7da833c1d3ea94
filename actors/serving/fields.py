"""Types of request fields that pydantic's own would check less clearly, each with its JSON schema."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator, WithJsonSchema

MAX_TOKEN_ID = 2**31 - 1


def only(*values: Any) -> Any:
    """The type of a field of OpenAI's that cannot be honoured: only these values, which ask for nothing."""

    def check(value: Any) -> Any:
        if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            return value
        raise ValueError(f"allowed: {' or '.join(_shown(allowed) for allowed in values)} (not supported)")

    return Annotated[Any, PlainValidator(check), WithJsonSchema({"enum": list(values)})]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _check_prompt(value: Any) -> Any:
    if isinstance(value, str):
        return text(value)
    if not isinstance(value, list):
        raise ValueError("allowed: a string, token ids, or a list of either")
    if all(isinstance(item, str) for item in value):
        return [text(item) for item in value]
    if all(isinstance(item, list) for item in value):
        return [_token_ids(item) for item in value]
    return _token_ids(value)


def text(value: str) -> str:
    """A string that has an UTF-8 form."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair; allowed: Unicode text") from None
    return value


def _token_ids(values: list[Any]) -> list[int]:
    for place, value in enumerate(values):
        if type(value) is not int or not 0 <= value <= MAX_TOKEN_ID:
            raise ValueError(f"item {place} is {str(value)[:40]!r}; allowed: token ids, or only strings")
    return values


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("allowed: a string or a list of strings")
    if any(not stop for stop in stops):
        raise ValueError("allowed: strings that are not empty")
    return [text(stop) for stop in stops]


def _check_save(value: Any) -> bool | float:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and 0 < value < math.inf:
        return float(min(value, 1e18))
    raise ValueError("allowed: true, or seconds above 0")


_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}}
_TEXTS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}

Text = Annotated[str, AfterValidator(text)]
Prompt = Annotated[
    Any,
    PlainValidator(_check_prompt),
    WithJsonSchema({"anyOf": [{"type": "string"}, _IDS, _TEXTS, {"type": "array", "items": _IDS}]}),
]
Stop = Annotated[
    Any,
    PlainValidator(lambda value: None if value is None else _check_stop(value)),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}},
                {"type": "null"},
            ]
        }
    ),
]
SaveState = Annotated[
    Any,
    PlainValidator(lambda value: None if value is None else _check_save(value)),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}),
]


def short(value: Any, length: int = 40) -> str:
    """A value as an error message quotes it."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**length:
        return "a very large number"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    shown = _shown(value[: length + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= length + 2 else f"{shown[:length]}…"


def field_name(loc: tuple[int | str, ...]) -> str:
    """``("crsm", "lag")`` as ``crsm.lag``, ``("messages", 0, "role")`` as ``messages[0].role``."""
    return "".join(_steps(loc))[:200]


def _steps(loc: tuple[int | str, ...]) -> Iterator[str]:
    for place, step in enumerate(loc):
        if isinstance(step, int):
            yield f"[{step}]"
        else:
            yield step if place == 0 else f".{step}"
