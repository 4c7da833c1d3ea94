"""A conversation as the text of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from crsm.data.tokenizer import Tokenizer
from crsm.tasks.base import EOS

Render = Callable[[Sequence[Mapping[str, str]]], str]
"""Messages (``role``, ``content``) to text. Raises ``ValueError`` for those that the template refuses."""


def make_renderer(template: str | None, tokenizer: Tokenizer) -> Render:
    """The renderer of a Jinja template as Hugging Face writes them, run in a sandbox.

    None: what was said in turn, the assistant's words included, with a space between (a closed vocabulary has no words
    for roles) or, in open text, a line each.

    Raises:
        ValueError: the template is not a Jinja template.
    """
    if template is None:
        separator = " " if tokenizer.kind == "closed" else "\n"
        return lambda messages: separator.join(message["content"] for message in messages)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"chat_template is not a Jinja template: {error}") from error

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        settings: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "", "eos_token": EOS}
        try:
            return compiled.render(messages=list(messages), **settings)
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, OverflowError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    return render


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
