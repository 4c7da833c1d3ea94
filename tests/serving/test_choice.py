"""One choice: tokens to text, whatever bundles they come in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.serving.backend import GenerationFailed
from actors.serving.choice import Choice, Details, Said
from actors.serving.event_json import EventJson
from crsm.data.tokenizer import Tokenizer
from crsm.types import Token
from tests.serving.fakes import LABELS, TOKENIZER, YES, FakeBackend

BYTES = Tokenizer.train_bpe(["aäa 水"], 270)


def a_choice(tokenizer: Tokenizer = TOKENIZER, **changes: Any) -> Choice:
    return Choice(0, "g", tokenizer, EventJson(FakeBackend().model), **changes)


def tokens_of(ids: Sequence[int], last: str = "length") -> list[Token]:
    return [
        Token("g", 10 + place, token, -0.5, place + 1 == len(ids), last if place + 1 == len(ids) else None)
        for place, token in enumerate(ids)
    ]


def all_of(choice: Choice, tokens: Sequence[Token], cuts: Sequence[int]) -> tuple[str, list[Any], list[Said]]:
    """Text and tokens of everything that is handed out when the tokens come in bundles."""
    said = []
    edges = [0, *sorted(cuts), len(tokens)]
    for start, end in itertools.pairwise(edges):
        choice.feed(tokens[start:end])
        said.append(choice.take())
    return "".join(each.text for each in said), [token for each in said for token in each.tokens], said


def test_the_token_that_ends_an_answer_is_left_out_of_the_text_and_counted() -> None:
    for token, verdict in ((YES, "yes"), (TOKENIZER.verdict_id(False), "no"), (TOKENIZER.eos_id, None)):
        choice = a_choice()
        choice.feed(tokens_of([LABELS[3], LABELS[1], token], "stop"))
        assert choice.take().text == "3 1"
        assert (choice.finish, choice.finish_reason, choice.verdict, len(choice.said)) == ("stop", "stop", verdict, 3)


def test_a_verdict_that_does_not_end_the_answer_is_text() -> None:
    choice = a_choice()
    choice.feed(tokens_of([LABELS[3], YES, LABELS[1]]))
    assert (choice.take().text, choice.finish, choice.verdict) == ("3 yes 1", "length", None)


@given(
    ids=st.lists(st.integers(4, BYTES.vocab_size - 1), min_size=1, max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=6),
    stops=st.lists(st.text("aä 水", min_size=1, max_size=3), max_size=3),
)
def test_bundles_change_neither_text_nor_tokens(ids: list[int], cuts: list[int], stops: list[str]) -> None:
    tokens, details = tokens_of(ids), Details(logprobs=True)
    cuts = [min(cut, len(ids)) for cut in cuts]
    at_once, by_bundle = (a_choice(BYTES, stop=stops, details=details) for _ in range(2))
    whole, whole_tokens, _ = all_of(at_once, tokens, [])
    text, told, said = all_of(by_bundle, tokens, cuts)
    assert (text, told, by_bundle.said) == (whole, whole_tokens, at_once.said)
    assert BYTES.decode(ids).startswith(whole) and not any(stop in whole for stop in stops)
    if not at_once.stopped_by_text:
        assert whole == BYTES.decode(ids) and [token.token for token in told] == ids
    # No token is told before its text, and its text is where it says.
    came, tokens_told = "", []
    for each in said:
        came += each.text
        tokens_told += each.tokens
        assert all(token.offset + len(token.text) <= len(came) for token in tokens_told)
    assert all(came[token.offset :].startswith(token.text) for token in tokens_told)


def test_a_stop_string_ends_the_choice_within_a_token() -> None:
    choice = a_choice(stop=["2 3"], details=Details(logprobs=True))
    choice.feed(tokens_of([LABELS[place] for place in (1, 2, 3, 4)]))
    said = choice.take()
    assert (said.text, choice.finish, choice.stopped_by_text) == ("1 ", "stop", True)
    assert [(token.text, token.offset) for token in said.tokens] == [("1", 0), (" ", 1)]
    assert len(choice.said) == 3, "the token that completed the stop string is the last that counts"
    choice.feed(tokens_of(LABELS))
    assert choice.take() == Said("")


def test_text_that_is_held_back_is_said_at_the_end() -> None:
    choice = a_choice(stop=["2 7"])
    choice.feed(tokens_of([LABELS[1], LABELS[2]], "length")[:1])
    assert choice.take().text == "1"
    choice.feed(tokens_of([LABELS[1], LABELS[2]], "length")[1:])
    assert choice.take().text == " 2"


def test_an_answer_that_goes_on_keeps_the_space_before_its_first_word() -> None:
    choice = a_choice(before=(LABELS[0],))
    choice.feed(tokens_of([LABELS[1]]))
    assert choice.take().text == " 1"


def test_the_echo_comes_first_and_counts_in_the_offsets() -> None:
    choice = a_choice(before=(LABELS[0],), echo="0", details=Details(logprobs=True))
    choice.feed(tokens_of([LABELS[1]]))
    said = choice.take()
    assert said.text == "0 1" and [token.offset for token in said.tokens] == [1]


def test_when_its_time_is_over_what_was_said_is_the_answer() -> None:
    choice = a_choice(stop=["1 2 3"])
    choice.feed(tokens_of([LABELS[1], LABELS[2], LABELS[3]])[:2])
    choice.expire()
    assert (choice.take().text, choice.finish, choice.finish_reason) == ("1 2", "deadline", "length")


def test_a_generation_that_somebody_else_cancelled_has_failed() -> None:
    with pytest.raises(GenerationFailed, match="was cancelled by the server"):
        a_choice().feed([Token("g", 3, -1, 0.0, True, "cancelled")])
