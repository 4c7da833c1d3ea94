"""Docstrings as Markdown: the few marks of reStructuredText that they use, read for the documentation site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([^`<]+)`")
_BLOCK = re.compile(r"::[ \t]*$", re.MULTILINE)
_TABLE = re.compile(r"^(?P<edge>[ \t]*=+(?:[ \t]+=+)+)[ \t]*\n.*?^(?P=edge)[ \t]*$", re.MULTILINE | re.DOTALL)


def as_markdown(text: str) -> str:
    """Roles become code, ``::`` a colon before its indented block, and simple tables tables of Markdown."""
    text = _ROLE.sub(lambda match: f"`{match.group(1)}`", text)
    text = _TABLE.sub(lambda match: _table(match.group().splitlines()), text)
    return _BLOCK.sub(":", text)


def _table(lines: list[str]) -> str:
    """A simple table: an edge of ``=`` over every column, above and below, and under the header if there is one."""
    edge, *rows, _ = lines
    starts = [match.start() for match in re.finditer("=+", edge)]
    header = next((place for place, row in enumerate(rows) if row.strip() == edge.strip()), None)
    cells = [
        [row[start:end].strip().replace("|", "\\|") for start, end in zip(starts, (*starts[1:], None), strict=True)]
        for row in rows
        if row.strip() != edge.strip()
    ]
    if header is None:
        cells.insert(0, [""] * len(starts))
    cells.insert(1, ["---"] * len(starts))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


class RolesExtension(griffe.Extension):
    """Rewrites every docstring once, when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
