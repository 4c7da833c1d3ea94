"""The documentation site: links and anchors lead somewhere, every page has its place, and docstrings read well."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(name: str) -> ModuleType:
    """A script by its path: ``scripts`` is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("site_hooks")
KNOWN = hooks.modules()


def groups() -> list[dict[str, list[str]]]:
    # Without the tags that only mkdocs knows.
    found: list[dict[str, list[str]]] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["extra"][
        "groups"
    ]
    return found


def anchors(path: Path) -> set[str]:
    """The anchors that headings get, there and on code hosts: lower case, without marks, a dash for a space."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#{1,6} +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_anchor_is_a_heading(document: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not link.startswith(("http:", "https:")):
            target = (document.parent / link) if link else document
            assert anchor in anchors(target), f"{link}#{anchor}"


def test_every_page_stands_in_the_navigation_once() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"contributing.md", "changelog.md"}
    entries = [page for group in hooks.navigation(groups(), pages) for names in group.values() for page in names]
    assert sorted(entries) == sorted(pages)


def test_a_page_may_be_missing_or_new() -> None:
    groups = [{"First": ["a.md", "missing.md", "*"]}, {"Second": ["b.md"]}, {"None": ["gone.md"]}]
    built = hooks.navigation(groups, {"a.md", "b.md", "new.md", "newer.md"})
    assert built == [{"First": ["a.md", "new.md", "newer.md"]}, {"Second": ["b.md"]}]


def test_every_module_with_a_docstring_has_a_reference_page() -> None:
    assert {
        "crsm.engine",
        "crsm.search",
        "crsm.search.tree",
        "actors.pool",
        "jobs.train",
        "jobs.manuscript.prose",
    } <= set(KNOWN)
    assert hooks.reference_page("crsm.search", KNOWN) == "reference/crsm/search/index.md"
    assert hooks.reference_page("crsm.search.tree", KNOWN) == "reference/crsm/search/tree.md"
    pages = [hooks.reference_page(module, KNOWN) for module in KNOWN]
    assert len(set(pages)) == len(pages)
    listed = re.findall(r"'(reference/[^']+)'", str(hooks.reference_navigation(KNOWN)))
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        ("docs/actors.md#states", "README.md", "index.md", "actors.md#states"),
        ("CONTRIBUTING.md", "README.md", "index.md", "contributing.md"),
        ("../README.md", "docs/actors.md", "actors.md", "index.md"),
        ("concepts.md", "docs/actors.md", "actors.md", "concepts.md"),
        ("../crsm/engine.py", "docs/actors.md", "actors.md", "reference/crsm/engine.md"),
        ("LICENSE", "README.md", "index.md", "files/LICENSE"),
        ("../configs/nano.yaml", "docs/training.md", "training.md", "files/configs/nano.yaml"),
        ("https://example.org/x.md", "README.md", "index.md", "https://example.org/x.md"),
        ("nowhere.txt", "README.md", "index.md", "nowhere.txt"),
    ],
)
def test_a_link_between_files_becomes_one_between_pages(link: str, source: str, page: str, expected: str) -> None:
    text, copies = hooks.rewrite_links(f"See [it]({link}).", source, page, KNOWN)
    assert text == f"See [it]({expected})."
    assert copies == ({expected.removeprefix("files/")} if expected.startswith("files/") else set())


def test_marks_of_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    as_markdown = load("griffe_roles").as_markdown
    assert as_markdown("See :meth:`Engine.step` and :func:`~crsm.injection.inject`.") == (
        "See `Engine.step` and `crsm.injection.inject`."
    )
    assert as_markdown("As in::\n\n    x = 1\n") == "As in:\n\n    x = 1\n"
    table = "====  =====\n``a``  one | two\n``b``  three\n====  ====="
    assert as_markdown("=====  =====\n``a``  one\n``b``  two\n=====  =====") == (
        "|  |  |\n| --- | --- |\n| ``a`` | one |\n| ``b`` | two |"
    )
    assert "\\|" in as_markdown(table)


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_asks_nobody_else(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "crsm" / "engine" / "index.html").is_file()
    pattern = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+"')
    for page in tmp_path.rglob("*.html"):
        assert not pattern.search(page.read_text(encoding="utf-8")), page
