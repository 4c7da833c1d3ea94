"""What the README tells a reader to do works."""

import re
from pathlib import Path

import pytest

from crsm.model import ASSETS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.skipif(not (ASSETS / "nano" / "config.json").is_file(), reason="the checkpoint nano is not shipped yet")
def test_the_library_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.split()[0] == "the"
    assert "← planned" in out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_commands_to_modules(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for module in re.findall(r"python -m (jobs(?:\.\w+)+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).is_file(), config


def test_the_documents_name_every_reason_and_control():
    from crsm.evaluation.comparison import CONTROLS
    from crsm.types import Reason

    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    for name in (*CONTROLS, *(reason.value for reason in Reason)):
        assert f"`{name}`" in text, name
