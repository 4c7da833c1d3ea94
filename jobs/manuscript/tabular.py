"""LaTeX of a table from its cells."""

from __future__ import annotations

from collections.abc import Sequence

_RULE = r"\midrule"


def rule() -> str:
    """A line across the table."""
    return _RULE


def tabular(columns: str, lines: Sequence[Sequence[str] | str], *, tight: bool = False, long: bool = False) -> str:
    """A table in the style of ``booktabs``.

    Args:
        columns: LaTeX's column specification, without the space at both ends.
        lines: rows of cells, or LaTeX that stands between rows.
        tight: less space between the columns.
        long: one that may break over pages.
    """
    environment = "longtable" if long else "tabular"
    body = [line if isinstance(line, str) else " & ".join(line) + r" \\" for line in lines]
    begin = rf"\begin{{{environment}}}{{@{{}}{columns}@{{}}}}"
    whole = "\n".join([begin, r"\toprule", *body, r"\bottomrule", rf"\end{{{environment}}}", ""])
    return "{\\setlength{\\tabcolsep}{4pt}%\n" + whole.rstrip() + "}\n" if tight else whole
