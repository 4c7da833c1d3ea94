"""The paper: its numbers come from result files, its citations exist, and what is missing says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs.command import invoke
from jobs.manuscript.numbers import at_lag, count, figure, macro_file, macros, p_value, power, share
from jobs.manuscript.pictures import PICTURES
from jobs.manuscript.prose import capital_commands, citations, faults, read_sections, typed_numbers
from jobs.manuscript.seven import PUBLISHED, numbers_kept, paired
from jobs.manuscript.sources import KINDS, PAIRED, PAPER, RESULTS, SOURCES, Source, load, shrink
from jobs.manuscript.tables import TABLES, table_file
from jobs.paper import app, write_generated

GENERATED = (*TABLES, *PICTURES)


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    return read_sections(PAPER)


@pytest.fixture(scope="module")
def bib() -> str:
    return (PAPER / "references.bib").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ the text


def test_the_text_types_no_measurement_and_names_only_what_exists(sections: dict[str, str], bib: str) -> None:
    assert faults(sections, bib, macros(), GENERATED) == []


def test_every_number_of_the_text_has_its_result_file(sections: dict[str, str]) -> None:
    results = load()
    used = capital_commands("\n".join(sections.values())) & set(macros())
    assert used
    assert not {name: macros()[name].source for name in used if macros()[name].source not in results}


@pytest.mark.parametrize(
    ("tex", "found"),
    [
        ("goes from 0.36 to 0.98", 2),
        (r"\PathStarAlone of two tasks, lag 3, System~2, Mamba-2, GSM8K", 0),
        (r"57\,\% of 200 problems", 2),
        (r"intervals of 95\,\%", 0),
        ("13{,}500 answers", 1),
        (r"$p=5\times10^{-97}$", 1),
        (r"Table~\ref{tab:12x99}, \citep{wang2023selfconsistency} % 0.98", 0),
        (r"\begin{minipage}[t]{0.57\linewidth} \vspace{9pt}", 0),
        ("twelve, 12, and 13", 1),
        ("a threshold of $-0.30$, GPT-2 and Mamba-2", 1),
    ],
)
def test_a_typed_measurement_is_found(tex: str, found: int) -> None:
    assert len(typed_numbers(tex)) == found, typed_numbers(tex)


@pytest.mark.parametrize(
    ("tex", "bibliography", "fault"),
    [
        (r"\Unheard", "", r"\Unheard is no generated macro"),
        (r"\citep{a,b}", "@misc{a,\n}", "{b} has no entry"),
        ("", "@misc{a,\n}", "a is never cited"),
        (r"\generated{nowhere}", "", "nowhere is no generated table"),
        (r"\ref{nothing}", "", "{nothing} has no label"),
        ("accuracy 0.98", "", "typed number '0.98'"),
    ],
)
def test_a_fault_of_the_text_is_named(tex: str, bibliography: str, fault: str) -> None:
    found = faults({"experiments": tex}, bibliography, {"PathStarAlone"}, ())
    assert len(found) == 1 and fault in found[0], found


def test_citations_are_read_with_their_options() -> None:
    assert citations(r"\citet[p.~3]{a} \cite{b, c} % \cite{d}") == {"a", "b", "c"}


# -------------------------------------------------------------------------------------------------------- result files


def test_every_result_file_is_known_and_says_where_it_came_from() -> None:
    files = {path.stem for path in RESULTS.glob("*.json")}
    assert files <= set(SOURCES)
    for name in files:
        record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert record["command"] == SOURCES[name].command
        assert re.fullmatch("[0-9a-f]{40}", record["commit"]), name
        assert {"cpu", "cores", "gpu", "torch"} <= set(record["machine"])
        assert record["seed"] is not None


def test_result_files_are_small_and_hold_no_path_of_a_machine() -> None:
    files = list(RESULTS.glob("*.json"))
    assert sum(path.stat().st_size for path in files) < 1_000_000
    for path in files:
        assert not re.search(r'"/\w|[ =]/(tmp|home|root|work|Users)/', path.read_text(encoding="utf-8")), path.name


def test_a_result_is_shrunk_to_what_the_paper_needs() -> None:
    source = Source("x", "python -m jobs.x --seed 1", "what", drop=("table",))
    record = {
        "job": "x",
        "commit": "c",
        "config": {"checkpoint": "/somewhere/runs/nano"},
        "seed": 1,
        "machine": {"cpu": "?"},
        "results": {"table": [1], "rows": [{"ours": 1 / 3, "samples": {"ours": [1.0, 2.0]}}, {"samples": 5.25}]},
    }
    assert shrink(source, record) == {
        "command": "python -m jobs.x --seed 1",
        "job": "x",
        "commit": "c",
        "config": {"checkpoint": "nano"},
        "seed": 1,
        "machine": {"cpu": "?"},
        "results": {"rows": [{"ours": 0.333333333}, {"samples": 5.25}]},
    }


def test_something_else_is_no_result_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"job": "x", "commit": "c"}', encoding="utf-8")
    with pytest.raises(ValueError, match="lacks machine, results, seed"):
        load([Source("x", "python -m jobs.x", "", path=path)])


def test_a_result_file_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(app, ["measure", "nonsense"]) == 2
    error = capsys.readouterr().err
    assert "'nonsense'" in error and "path_star" in error


# ----------------------------------------------------------------------------------------------------- what is written


def test_everything_is_generated_from_the_result_files(tmp_path: Path) -> None:
    results = load()
    assert write_generated(results, tmp_path) == len(list(tmp_path.iterdir()))
    for name, picture in PICTURES.items():
        assert (tmp_path / f"{name}.pdf").is_file() == all(source in results for source in picture.sources)
    numbers = (tmp_path / "numbers.tex").read_text(encoding="utf-8")
    assert set(re.findall(r"\\newcommand\{\\(\w+)\}", numbers)) == set(macros())


def test_a_table_holds_the_figures_of_its_result_file() -> None:
    results = load()
    table = table_file(TABLES["reasoning"], results)
    for lag in (0, 1, 2):
        measured = at_lag(results["path_star"]["results"], lag)
        assert share(measured["system1"]["accuracy"]) in table
        for control in measured["controls"].values():
            assert share(control["accuracy"]) in table
    assert "bit-identical" in table


def test_the_table_of_the_seven_kinds_holds_both_lags_of_each() -> None:
    results = load()
    lines = [line for line in table_file(TABLES["seven"], results).splitlines() if line.count("&") == 8]
    rows = lines[-(len(KINDS) + 2) :]
    for kind, row in zip(KINDS, rows, strict=False):
        cells = [cell.strip(" \\") for cell in row.split("&")]
        measured = [at_lag(results[f"seven_{kind}"]["results"], lag) for lag in (1, 2)]
        assert cells[2] == share(measured[0]["system1"]["accuracy"])
        assert [cells[3], cells[6]] == [share(found["system2"]["accuracy"]) for found in measured]
        assert [cells[4], cells[7]] == [p_value(found["mcnemar_p"]) for found in measured]
    assert rows[-2].count("--") == 3, "20,000 problems at lag 2 only"


def test_the_seven_kinds_were_measured_with_one_checkpoint_and_the_world_model_that_the_text_names() -> None:
    results = load()
    names = [name for name in SOURCES if name.startswith(("seven_", "paired_", "latent_"))]
    assert len({results[name]["results"]["checkpoint"]["weights"] for name in names}) == 1
    for name in names:
        kind = "latent" if name.startswith("latent_") else "exact"
        assert results[name]["config"]["model"]["world_model"]["kind"] == kind, name


def test_at_equal_compute_the_samples_cost_at_least_as_much_as_the_plan() -> None:
    results = load()
    table = table_file(TABLES["equal_compute"], results)
    for kind in PAIRED:
        found = results[f"paired_{kind}"]["results"]
        for simulations in (8, 16, 32, 64):
            row = paired(found, simulations)
            assert row["times_the_cost"] >= 1
            assert f"${row['difference']:+.3f}$ & {p_value(row['mcnemar_p'])}" in table
        with pytest.raises(KeyError, match="no pair of 9 simulations"):
            paired(found, 9)


def test_every_published_figure_names_its_paper(bib: str) -> None:
    for name, words in PUBLISHED:
        assert name in SOURCES
        assert citations(words) and all(f"{{{key}," in bib for key in citations(words))


def test_an_imagined_position_keeps_what_its_token_adds_and_a_state_all_of_it() -> None:
    backbone = {"d_model": 8, "n_layer": 3, "d_state": 16, "headdim": 4, "expand": 2, "d_conv": 4}
    # One layer: 4 heads of 4 by 16; a window of 3 by 16 + 2 · 16 channels; decays, dt · x and B; a stream.
    window, state, record, stream = 3 * 48, 4 * 4 * 16, 4 + 16 + 16, 8
    kept = numbers_kept({"model": {"backbone": backbone}})
    assert kept == (3 * (window + record + stream), 3 * (window + state))


def test_a_missing_result_file_says_so_and_names_its_command(tmp_path: Path) -> None:
    files = write_generated({}, tmp_path)
    assert files == len(list(tmp_path.iterdir())) + len(PICTURES), "no picture is drawn of nothing"
    for name, sources in ((name, made.sources) for made_ in (TABLES, PICTURES) for name, made in made_.items()):
        text = (tmp_path / f"{name}.tex").read_text(encoding="utf-8")
        for source in sources:
            assert "measure " + source.replace("_", r"\_") in text
    assert macro_file({}).count(r"\missing{") == len(macros())


def test_the_build_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = load()
    results.pop("transport", None)
    monkeypatch.setattr("jobs.paper.load", lambda: results)
    assert invoke(app, ["generate", "--output", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert "missing: transport.json, made by: python -m jobs.paper measure transport" in error
    assert SOURCES["transport"].command in error
    assert r"measure transport" in (tmp_path / "transport.tex").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (share(0.9876), "0.988"),
        (count(13500), "13{,}500"),
        (figure(0.0421), "0.0421"),
        (figure(38.0), "38.0"),
        (figure(15677.1), "15{,}677"),
        (figure(None), "--"),
        (figure(float("nan")), "--"),
        (power(4.68e-97), r"$5\times10^{-97}$"),
        (figure(0.0002584, 2), r"$3\times10^{-4}$"),
        (p_value(1.0), "1.0"),
        (p_value(0.0), r"$<\!10^{-300}$"),
        (p_value(7.45e-9), r"$7\times10^{-9}$"),
    ],
)
def test_figures_are_written_for_latex(written: str, expected: str) -> None:
    assert written == expected
