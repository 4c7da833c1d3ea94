r"""What must hold of the paper's text: its macros are generated, its citations exist, and no measurement is typed.

The rule for numbers: in the sections about measurements, and in the abstract, a number that is typed is a whole one of
at most ``LARGEST`` ("two tasks", "lag 3", "System 2"), or stands in ``ALLOWED``. Anything else, and everything with a
decimal point, a percent sign or a power of ten, comes as a macro of :mod:`jobs.manuscript.numbers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

LARGEST = 12
MEASURED = ("abstract", "introduction", "experiments", "limits")
"""Sections that the rule for numbers holds for."""
ALLOWED = (
    r"95\,\%",  # the level of every interval
    r"0.9^k",  # a rule of thumb that is compared with
    r"1/3",  # chance of one arm of three
    r"1/8",  # of one leaf of eight
    # Settings of measurements, and sizes of what is measured.
    r"50 tokens",
    r"20~tokens",
    r"64~trees",
    r"32~streams",
    r"1.3~billion",
)
LATEX = frozenset(
    {
        "Delta",
        "Gamma",
        "Lambda",
        "Pi",
        "Sigma",
        "Omega",
        "LaTeX",
        "Big",
        "Bigl",
        "Bigr",
        "Vert",
        "R",
        "E",
        "Roman",
        "Enc",
        "Dec",
        "Huge",
        "Large",
        "LARGE",
        "Needspace",
    }
)
"""Capital commands that are LaTeX's own, or defined in ``main.tex``."""

_REFERENCES = re.compile(
    r"\\(?:label|ref|eqref|pageref|cite[pt]?|input|includegraphics|texttt|url|href|begin|end|generated|drawn)"
    r"\*?(?:\[[^\]]*\])?\{[^}]*\}"
)
_LENGTHS = re.compile(r"\d*\.?\d+\\(?:textwidth|linewidth)|\[-?\d+pt\]|\{-?\d+pt\}")
_NUMBER = re.compile(r"(?<![A-Za-z0-9.])(?<![A-Za-z]-)\d(?:[\d.,{}]*\d)?(?:\s*\\?%|\\,\\%|\^\{?-?\d+)?")


def read_sections(folder: Path) -> dict[str, str]:
    """LaTeX of ``main.tex`` and of every section, by name."""
    files = [folder / "main.tex", *sorted((folder / "sections").glob("*.tex"))]
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def without_comments(tex: str) -> str:
    return re.sub(r"(?<!\\)%.*", "", tex)


def capital_commands(tex: str) -> set[str]:
    """Commands that begin with a capital, as all our macros do, without LaTeX's own."""
    return set(re.findall(r"\\([A-Z][A-Za-z]*)", without_comments(tex))) - LATEX


def typed_numbers(tex: str, allowed: Iterable[str] = ALLOWED) -> list[str]:
    """Numbers that look like measurements and are no macros, each with the words around it."""
    bare = _LENGTHS.sub(" ", _REFERENCES.sub(" ", without_comments(tex))).replace(r"\times", " ")
    for phrase in allowed:
        bare = bare.replace(phrase, " ")
    found = []
    for match in _NUMBER.finditer(bare):
        if not (match.group().isdecimal() and int(match.group()) <= LARGEST):
            around = bare[max(0, match.start() - 30) : match.end() + 20]
            found.append(f"{match.group()!r} in {' '.join(around.split())!r}")
    return found


def citations(tex: str) -> set[str]:
    keys = re.findall(r"\\cite[pt]?\*?(?:\[[^\]]*\])*\{([^}]*)\}", without_comments(tex))
    return {key.strip() for group in keys for key in group.split(",")}


def bibliography(bib: str) -> set[str]:
    """The keys of a BibTeX file."""
    return set(re.findall(r"^@\w+\{([^,\s]+),", bib, re.MULTILINE))


def faults(sections: Mapping[str, str], bib: str, macros: Iterable[str], generated: Iterable[str]) -> list[str]:
    """Everything that does not hold, a line each; empty: all is well.

    Args:
        sections: LaTeX by name, as of :func:`read_sections`.
        bib: the bibliography.
        macros: names that are generated.
        generated: names of tables and figures that are generated.
    """
    whole = "\n".join(sections.values())
    found = []
    for name, tex in sections.items():
        found += [f"{name}.tex: \\{command} is no generated macro" for command in capital_commands(tex) - set(macros)]
        if name in MEASURED:
            found += [f"{name}.tex: typed number {number}" for number in typed_numbers(tex)]
    cited, known = citations(whole), bibliography(bib)
    found += [f"\\cite{{{key}}} has no entry in references.bib" for key in cited - known]
    found += [f"references.bib: {key} is never cited" for key in known - cited]
    made = set(generated)
    used = set(re.findall(r"\\(?:generated|drawn)\{([^}]*)\}", without_comments(whole)))
    found += [f"{name} is no generated table or figure" for name in used - made]
    found += [f"the generated {name} is never used" for name in made - used]
    labels = set(re.findall(r"\\label\{([^}]*)\}", whole))
    refs = set(re.findall(r"\\(?:eq)?ref\{([^}]*)\}", without_comments(whole)))
    found += [f"\\ref{{{name}}} has no label" for name in refs - labels]
    return sorted(found)
