"""Normalisation of characters, repairs, and quality filters with a name each.

Pure functions of a text and the settings. The thresholds are those of Gopher (arXiv 2112.11446, appendix A1.1) where
it has one; white space, line ends and Unicode are normalised for every document, filtered or not.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from crsm.data_config import CleaningConfig

RULES = (
    "empty",
    "min_words",
    "max_words",
    "min_word_length",
    "max_word_length",
    "min_letters",
    "max_symbols",
    "max_replacement",
    "stop_words",
    "max_ellipsis_lines",
    "max_repeated_lines",
)
"""In the order in which they are asked."""

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_SYMBOLS = tuple(b"#{}<>|")
# Control characters other than tab and newline, and the byte order mark.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_LINE_ENDS = re.compile("\r\n?|\x85|\u2028|\u2029")
_TRAILING = re.compile(r"[ \t]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{4,}")
_SURROGATE = re.compile("[\ud800-\udfff]")
# UTF-8 that was read as Latin-1 or Windows-1252: a lead byte's character before one of a continuation byte.
_MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122]"
)

_LETTER = np.zeros(256, bool)
_LETTER[list(range(ord("a"), ord("z") + 1)) + list(range(ord("A"), ord("Z") + 1)) + list(range(128, 256))] = True
_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\n")] = True


def normalise(text: str, *, repair: bool = True) -> tuple[str, bool]:
    """The text in Unicode's form NFC with plain line ends, and whether its encoding had to be mended.

    Raises:
        ValueError: texts are to be repaired and ftfy is not installed.
    """
    mended = False
    if repair and not text.isascii() and _MOJIBAKE.search(text):
        better = _fix_encoding(text)
        mended, text = better != text, better
    text = _LINE_ENDS.sub("\n", text) if not text.isascii() or "\r" in text else text
    text = _CONTROL.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", _SURROGATE.sub("\ufffd", text))
    text = _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text))
    return text.strip(), mended


def broken_rule(text: str, words: list[str], config: CleaningConfig) -> str | None:
    """The first rule that a normalised text breaks; None: it is good.

    Args:
        text: of a document.
        words: of that text, case folded.
        config: the thresholds.
    """
    if not text:
        return "empty"
    count = len(words)
    if count < config.min_words:
        return "min_words"
    if config.max_words is not None and count > config.max_words:
        return "max_words"
    if count == 0:
        return None
    mean_length = sum(map(len, words)) / count
    if mean_length < config.min_word_length:
        return "min_word_length"
    if mean_length > config.max_word_length:
        return "max_word_length"
    raw = np.frombuffer(text.encode(), np.uint8)
    counts = np.bincount(raw, minlength=256)
    visible = int(counts[~_SPACE].sum())
    if int(counts[_LETTER].sum()) < config.min_letters * visible:
        return "min_letters"
    if sum(int(counts[symbol]) for symbol in _SYMBOLS) > config.max_symbols * count:
        return "max_symbols"
    if text.count("\ufffd") > config.max_replacement * len(text):
        return "max_replacement"
    if len(_STOP_WORDS.intersection(words)) < config.stop_words:
        return "stop_words"
    lines = [line for line in text.split("\n") if line]
    if sum(line.endswith(("…", "...")) for line in lines) > config.max_ellipsis_lines * len(lines):
        return "max_ellipsis_lines"
    distinct = set(lines)
    if len(distinct) < len(lines):
        total, once = sum(map(len, lines)), sum(map(len, distinct))
        if total - once > config.max_repeated_lines * total:
            return "max_repeated_lines"
    return None


def _fix_encoding(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise ValueError(
            "cleaning.repair = True needs the extra `data` (pip install 'crsm[data]'); allowed: false, or the extra"
        ) from error
    # Line by line: a text may be right in one place and wrong in another.
    return "\n".join(ftfy.fix_encoding(line) if _MOJIBAKE.search(line) else line for line in text.split("\n"))
