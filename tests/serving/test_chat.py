"""Conversations as prompts."""

from __future__ import annotations

import pytest

from actors.serving.chat import make_renderer
from crsm.data.tokenizer import Tokenizer
from tests.serving.fakes import TOKENIZER

MESSAGES = [
    {"role": "user", "content": "1 2"},
    {"role": "assistant", "content": "the path"},
    {"role": "user", "content": "3"},
]


def test_a_closed_vocabulary_says_everything_in_turn() -> None:
    assert make_renderer(None, TOKENIZER)(MESSAGES) == "1 2 the path 3"


def test_open_text_has_a_line_for_each() -> None:
    assert make_renderer(None, Tokenizer.train_bpe(["some text"], 300))(MESSAGES) == "1 2\nthe path\n3"


def test_a_template_is_rendered_as_hugging_face_does() -> None:
    template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert make_renderer(template, TOKENIZER)(MESSAGES[:2]) == "<user>1 2<eos><assistant>the path<eos><assistant>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_an_error_in_words(template: str) -> None:
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        make_renderer(template, TOKENIZER)(MESSAGES)


def test_a_broken_template_is_found_at_the_beginning() -> None:
    with pytest.raises(ValueError, match="not a Jinja template"):
        make_renderer("{% for %}", TOKENIZER)
