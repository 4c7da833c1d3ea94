"""A request's body: bytes to a checked model, or an error that names the field."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from actors.serving.errors import ApiError, ClientGone, invalid
from actors.serving.fields import field_name, short

B = TypeVar("B", bound=BaseModel)


async def read_body(request: Request, model: type[B], seconds: float, *, empty: bool = False) -> B:
    """The body of a request.

    Args:
        request: whose body is not read yet.
        model: what it must be.
        seconds: within which it must have come.
        empty: no body at all is an empty object.

    Raises:
        ApiError: 415 another content type, 408 too slow, 400 anything that is not such an object.
        ClientGone: the client went away.
    """
    try:
        async with asyncio.timeout(seconds):
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    if not body and empty:
        return model.model_validate({})
    check_content_type(request.headers.get("content-type", ""))
    return check_body(parse_json(body), model)


def check_content_type(value: str) -> None:
    """Only JSON in UTF-8 is read."""
    kind, *parameters = (part.strip().lower() for part in value.split(";"))
    charsets = [part.partition("=")[2].strip('" ') for part in parameters if part.startswith("charset=")]
    if kind != "application/json" or any(charset not in ("utf-8", "utf8") for charset in charsets):
        raise ApiError(415, f"content-type = {short(value)}; allowed: application/json in UTF-8")


def parse_json(body: bytes) -> Any:
    """The value that a body holds."""
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start}); allowed: JSON in UTF-8") from None
    except RecursionError:
        raise invalid("the body is nested too deeply; allowed: the fields of this request") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None


def check_body(value: Any, model: type[B]) -> B:
    """The value as a model."""
    if not isinstance(value, dict):
        raise invalid(f"the body is {short(value)}; allowed: an object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _first_error(error, model) from None
    except (RecursionError, OverflowError):
        raise invalid("the body holds a value out of all range; allowed: the fields of this request") from None


def _first_error(error: ValidationError, model: type[BaseModel]) -> ApiError:
    details = error.errors(include_url=False)
    # An unknown field is what the others are often about.
    first = next((each for each in details if each["type"] == "extra_forbidden"), details[0])
    field = field_name(first["loc"])
    return invalid(f"{field} {_complaint(first, model)}" if field else _complaint(first, model), field or None)


def _complaint(error: ErrorDetails, model: type[BaseModel]) -> str:
    kind, message = error["type"], error["msg"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        fields = f"; allowed: {', '.join(model.model_fields)}" if len(error["loc"]) == 1 else ""
        return f"is not a field of this request{fields}"
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    if kind != "value_error":
        message = f"allowed: {message}"
    return f"= {short(error['input'])}; {message}" if message.startswith("allowed: ") else f": {message}"
