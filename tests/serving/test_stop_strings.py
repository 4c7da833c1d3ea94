"""Stop strings: what comes in pieces is cut where the whole text would be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=7), min_size=1, max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The oracle: what a search of the whole text keeps."""
    found = [(start + len(stop), start) for stop in stops for start in range(len(text)) if text.startswith(stop, start)]
    return (text[: min(found)[1]], True) if found else (text, False)


@settings(max_examples=500)
@given(pieces=st.lists(LETTERS, max_size=12), stops=STOPS)
def test_text_in_pieces_ends_where_the_whole_text_does(pieces: list[str], stops: list[str]) -> None:
    cutter = StopStrings(stops)
    released = came = ""
    for piece in pieces:
        released += cutter.push(piece)
        came += piece
        assert cut("".join(pieces), stops)[0].startswith(released), "what follows a stop string has been let through"
        held = "" if cutter.stopped else came[len(released) :]
        assert not held or any(stop.startswith(held) for stop in stops), "more is held back than has to be"
    stopped = cutter.stopped
    released += cutter.flush()
    assert (released, stopped) == cut("".join(pieces), stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    cutter = StopStrings(["END", "\n\n"])
    assert [cutter.push(piece) for piece in ("on E", "N", "d\n", "x")] == ["on ", "", "ENd", "\nx"]
    assert not cutter.stopped


def test_the_stop_string_that_is_complete_first_counts() -> None:
    cutter = StopStrings(["abcd", "bc"])
    assert (cutter.push("abc"), cutter.stopped, cutter.push("d"), cutter.flush()) == ("a", True, "", "")


def test_without_stop_strings_everything_is_let_through() -> None:
    assert StopStrings([]).push("text") == "text"
