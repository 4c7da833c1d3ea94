"""Normalisation changes what is not text, the filters say which rule a document breaks, and good text passes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.data.cleaning import RULES, broken_rule, normalise
from crsm.data.word_hashes import split_words
from crsm.data_config import CleaningConfig
from tests.data.corpora import prose

GOOD = prose(0, words=200)


def rule_of(text, **thresholds):
    return broken_rule(text, split_words(text), CleaningConfig(**thresholds))


def test_lines_ends_control_characters_and_blank_lines_are_made_plain():
    assert normalise("one\r\ntwo\rthree\x00 \t\n\n\n\n\nfour \n")[0] == "one\ntwo\nthree\n\n\nfour"


def test_characters_are_composed_and_lone_surrogates_replaced():
    assert normalise("e\u0301 \ud800")[0] == "\u00e9 \ufffd"


def test_text_in_the_wrong_encoding_is_mended_line_by_line():
    right = "Ça va très bien — déjà vu"
    assert normalise(right) == (right, False)
    wrong = "l'été: “quoted”".encode().decode("windows-1252", errors="replace")
    assert normalise(f"plain\n{'schön'.encode().decode('latin-1')}") == ("plain\nschön", True)
    assert normalise(f"plain\n{'schön'.encode().decode('latin-1')}", repair=False)[1] is False
    assert normalise(wrong)[0] != ""


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_normalising_twice_is_normalising_once(text):
    once = normalise(text, repair=False)[0]
    assert normalise(once, repair=False)[0] == once


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("empty", ""),
        ("min_words", "too short"),
        ("min_word_length", "a b c d e f g h " * 5),
        ("max_word_length", "incomprehensibilities " * 30),
        ("min_letters", "the of 1234567 890123 4567890 " * 20),
        ("max_symbols", GOOD.replace(" ", " # ")),
        ("max_replacement", GOOD.replace("a", "\ufffd", 20)),
        (
            "stop_words",
            " ".join(
                word for word in GOOD.split() if word.lower().strip(".") not in {"the", "of", "and", "to", "that"}
            ),
        ),
        ("max_ellipsis_lines", "\n".join(line + "…" for line in GOOD.split(". "))),
        ("max_repeated_lines", "\n".join([GOOD.split("\n\n")[0]] * 3)),
    ],
)
def test_each_rule_catches_what_it_is_for(rule, text):
    assert rule in RULES
    assert rule_of(text) == rule


def test_good_text_passes_and_rules_can_be_switched_off():
    assert rule_of(GOOD) is None
    assert rule_of(GOOD, max_words=50) == "max_words"
    assert rule_of("one two", min_words=0, stop_words=0) is None
