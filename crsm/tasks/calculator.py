"""A calculator for the marks of worked solutions, ``<<48/2=24>>``: it parses, it never evaluates text as code.

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor  = ("+" | "-") factor | "(" sum ")" | number

There are no powers, and expressions are short, so that any text is done with at once. Values are exact fractions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPRESSION = 200
"""Characters of an expression; what is longer has no value."""
_MAX_DEPTH = 40

# ASCII digits only; a comma only between a digit and three more. A percent sign is part of a number.
_TOKEN = re.compile(r"\s*(?:(\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\$?\.[0-9]+)(%?)|([-+*/()]))")
_MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")


@dataclass(frozen=True, slots=True)
class Mark:
    """One calculation that a text claims."""

    expression: str
    claimed: str
    value: Fraction | None
    """What the expression comes to; None: it is no expression."""

    @property
    def correct(self) -> bool:
        """Whether the claim is the value, rounded to the places that the claim is written with."""
        claimed = evaluate(self.claimed)
        if self.value is None or claimed is None:
            return False
        places = len(self.claimed.strip().rstrip("%").partition(".")[2])
        return claimed == self.value or (places > 0 and abs(claimed - self.value) <= Fraction(1, 2 * 10**places))


def evaluate(expression: str) -> Fraction | None:
    """The value of an expression; None: it is none, divides by zero, or is too long."""
    if len(expression) > MAX_EXPRESSION:
        return None
    tokens: list[str | Fraction] = []
    place, end = 0, len(expression.rstrip())
    while place < end:
        match = _TOKEN.match(expression, place)
        if match is None:
            return None
        number, percent, sign = match.groups()
        if sign:
            tokens.append(sign)
        else:
            value = Fraction(number.replace(",", "").replace("$", "").rstrip("."))
            tokens.append(value / 100 if percent else value)
        place = match.end()
    parser = _Parser(tokens)
    try:
        total = parser.sum(0)
    except (ValueError, ZeroDivisionError):
        return None
    return total if parser.place == len(tokens) else None


def marks_of(text: str) -> list[Mark]:
    """Every ``<<expression=value>>`` of a text, in order."""
    return [Mark(expression, claimed, evaluate(expression)) for expression, claimed in _MARK.findall(text)]


def marks_are_true(text: str) -> bool:
    """Whether a text makes no false or unreadable claim; one without marks makes none."""
    opened = text.count("<<")
    marks = marks_of(text)
    return opened == len(marks) and all(mark.correct for mark in marks)


class _Parser:
    def __init__(self, tokens: list[str | Fraction]) -> None:
        self._tokens = tokens
        self.place = 0

    def sum(self, depth: int) -> Fraction:
        total = self._product(depth)
        while (sign := self._take("+", "-")) is not None:
            other = self._product(depth)
            total = total + other if sign == "+" else total - other
        return total

    def _product(self, depth: int) -> Fraction:
        total = self._factor(depth)
        while (sign := self._take("*", "/")) is not None:
            other = self._factor(depth)
            total = total * other if sign == "*" else total / other
        return total

    def _factor(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH or self.place == len(self._tokens):
            raise ValueError("no factor")
        if (sign := self._take("+", "-")) is not None:
            value = self._factor(depth + 1)
            return value if sign == "+" else -value
        if self._take("("):
            value = self.sum(depth + 1)
            if not self._take(")"):
                raise ValueError("an open parenthesis")
            return value
        token = self._tokens[self.place]
        if isinstance(token, str):
            raise ValueError(f"{token!r} is no factor")
        self.place += 1
        return token

    def _take(self, *signs: str) -> str | None:
        token = self._tokens[self.place] if self.place < len(self._tokens) else None
        if isinstance(token, str) and token in signs:
            self.place += 1
            return token
        return None
