"""The paper's numbers, tables and figures from result files, and the result files from the commands that make them."""

from __future__ import annotations

import json as jsonlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import run, write_atomically
from jobs.manuscript.sources import PAPER, RESULTS, ROOT, SOURCES, Source, load, shrink

if TYPE_CHECKING:
    from jobs.manuscript.numbers import Results

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The paper: its result files, and what is generated from them. `make paper` does the rest.",
)


@app.command()
def generate(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where numbers, tables and figures go.")
    ] = PAPER / "generated",
) -> None:
    """Write numbers, tables and figures for LaTeX; name every result file that is missing, and what makes it.

    Exit status 1 if the text uses a number, table, figure or citation that does not exist, or if a measurement is typed
    in it. A missing result file is none of that: its table, figure or number says so itself.
    """
    from jobs.manuscript.pictures import PICTURES
    from jobs.manuscript.prose import faults, read_sections
    from jobs.manuscript.tables import TABLES

    sections = read_sections(PAPER)
    results = load()
    drawn = write_generated(results, output)
    for source in SOURCES.values():
        if source.name not in results:
            print(f"missing: {source.name}.json, made by: python -m jobs.paper measure {source.name}", file=sys.stderr)
            print(f"         ({source.command})", file=sys.stderr)
    bibliography = (PAPER / "references.bib").read_text(encoding="utf-8")
    from jobs.manuscript.numbers import macros

    wrong = faults(sections, bibliography, macros(), (*TABLES, *PICTURES))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        raise SystemExit(1)
    print(f"{drawn} files in {output}", file=sys.stderr)


def write_generated(results: Results, output: Path) -> int:
    """All generated files from the results that there are; their number.

    Raises:
        OSError: one cannot be written.
    """
    from crsm.evaluation.figures import save_figure
    from jobs.manuscript.numbers import macro_file
    from jobs.manuscript.pictures import PICTURES, styled
    from jobs.manuscript.tables import TABLES, placeholder, table_file

    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "numbers.tex", macro_file(results))
    for name, table in TABLES.items():
        write_atomically(output / f"{name}.tex", table_file(table, results))
    for name, picture in PICTURES.items():
        missing = [SOURCES[source] for source in picture.sources if source not in results]
        if missing:
            write_atomically(output / f"{name}.tex", placeholder(missing))
        else:
            save_figure(styled(picture, results), output / f"{name}.pdf")
            write_atomically(output / f"{name}.tex", rf"\includegraphics[width=\linewidth]{{{name}.pdf}}" + "\n")
    return 1 + len(TABLES) + 2 * len(PICTURES)


@app.command()
def measure(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="Result files; none: those missing.")
    ] = None,
    taken: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Take what the command wrote with --json before; one NAME."),
    ] = None,
) -> None:
    """Run the commands that make result files, one after the other, and keep what the paper needs of them.

    Speeds want a machine that does nothing else meanwhile.
    """
    chosen = [pick(name) for name in names or [name for name in SOURCES if not SOURCES[name].file.is_file()]]
    if taken is not None:
        if len(chosen) != 1:
            raise ValueError(f"--from {str(taken)!r} with {len(chosen)} names; allowed: one")
        keep(chosen[0], jsonlib.loads(taken.read_text(encoding="utf-8")))
        return
    for source in chosen:
        print(f"{source.name}: {source.command}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder) / "result.json"
            command = [sys.executable, *source.arguments, "--json", str(fresh)]
            status = subprocess.run(command, cwd=ROOT, check=False).returncode
            if status or not fresh.is_file():
                raise SystemExit(f"error: {source.command} ended with status {status}")
            keep(source, jsonlib.loads(fresh.read_text(encoding="utf-8")))


@app.command("list")
def list_sources() -> None:
    """Every result file: whether it is there, its commit, and the command that makes it."""
    found = load()
    for name, source in SOURCES.items():
        commit = found[name]["commit"][:7] if name in found else "missing"
        print(f"{name:26} {commit:8} {source.command}")


def pick(name: str) -> Source:
    """The result file of that name.

    Raises:
        ValueError: there is none, or it is not the paper's to make.
    """
    source = SOURCES.get(name)
    if source is None or source.path is not None:
        allowed = ", ".join(known for known, other in SOURCES.items() if other.path is None)
        raise ValueError(f"result file {name!r}; allowed: {allowed}")
    return source


def keep(source: Source, record: dict[str, Any]) -> None:
    """Writes a result file of the paper."""
    text = jsonlib.dumps(shrink(source, record), indent=1, ensure_ascii=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(source.file, text + "\n")
    print(f"{source.file.relative_to(ROOT)}: {len(text):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    run(app)
