"""The notebooks are committed without outputs, pass the linter, and run from top to bottom."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crsm.config import core_count
from crsm.notebook import VARIABLE, begin

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
PICTURES = {
    "1_backbone": 2,
    "2_world_model": 2,
    "3_judgment": 2,
    "4_plan_writer": 3,
    "5_inference_and_search_trees": 6,
}
"""Pictures that a notebook draws."""
QUICK = "5_inference_and_search_trees"
"""What is run by default: it trains nothing and touches engine, search, controls and all kinds of pictures."""
SIDE = 200
"""Pixels that a picture has at least, both ways."""


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook as it is after a run at the smallest size, by a kernel of this interpreter."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    settings = {VARIABLE: "tiny", "PYTHONPATH": path, "IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    notebook = read(name)
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook: Any) -> list[np.ndarray]:
    from matplotlib.image import imread

    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [imread(io.BytesIO(base64.b64decode(picture)), format="png") for picture in found]


# ------------------------------------------------------------------------------------------------------------ as files


def test_there_are_the_five_that_the_page_lists():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(PICTURES)
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    for name in PICTURES:
        assert f"](notebooks/{name}.ipynb)" in page


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_is_valid_and_holds_nothing_of_a_run(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}, "the version of an interpreter that ran it"
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.source
    assert all(not cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_begins_with_its_purpose_and_the_same_two_lines_of_set_up(name):
    notebook = read(name)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    install, imports = code_cells(notebook)[:2]
    assert install.source == code_cells(read(QUICK))[0].source
    assert "%pip install --quiet crsm" in install.source
    assert imports.source.startswith("%matplotlib inline")
    assert "\nhere = begin()" in imports.source


@pytest.mark.parametrize("name", PICTURES)
def test_links_between_notebooks_lead_somewhere(name):
    for cell in read(name).cells:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert (FOLDER / link).exists(), link


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_linter_has_nothing_to_say(command):
    pytest.importorskip("ruff")
    arguments = [sys.executable, "-m", "ruff", *command, "--no-cache", str(FOLDER)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------- as a run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in PICTURES]
)
def test_a_notebook_runs_and_draws(name, tmp_path, monkeypatch):
    notebook = execute(name, tmp_path, monkeypatch)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    said = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    assert "Size tiny" in said and "CPU" in said
    drawn = pictures(notebook)
    assert len(drawn) == PICTURES[name]
    for picture in drawn:
        assert min(picture.shape[:2]) >= SIDE
        assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20, "an empty picture"


# ------------------------------------------------------------------------------------------------------ how they begin


@pytest.fixture
def threads(monkeypatch):
    """What the process was told to compute with, and was not."""
    asked: list[int] = []
    monkeypatch.setattr("crsm.notebook.use_threads", asked.append)
    return asked


def test_without_a_gpu_one_line_says_so_and_it_goes_on(threads, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(VARIABLE, raising=False)
    here = begin()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no GPU: everything runs on the CPU") and "Size full" in line
    assert here.device == torch.device("cpu")
    assert here.pick(full=3, tiny=1) == 3
    assert threads == [core_count()]


def test_a_gpu_is_what_stages_train_on(threads, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a large one")
    monkeypatch.setenv(VARIABLE, "tiny")
    here = begin()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("GPU: a large one") and "Size tiny" in line
    assert here.device == torch.device("cuda")
    assert here.pick(full=3, tiny=1) == 1


def test_an_unknown_size_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "huge")
    with pytest.raises(ValueError, match="CRSM_NOTEBOOK_SIZE = 'huge'; allowed: full, tiny"):
        begin()
