"""Hooks of the documentation site (``mkdocs.yml``): pages that lie elsewhere, the reference, and the navigation.

Nothing is written twice. ``README.md``, ``CONTRIBUTING.md`` and ``CHANGELOG.md`` become pages as they are; every module
of ``crsm``, ``actors`` and ``jobs`` has a page that mkdocstrings fills from its docstrings; and a link that leads to
another file of the repository leads to its page, or to a copy of the file within the site. ``extra.groups`` of
``mkdocs.yml`` says which page stands where: a page that is named there and does not exist yet is left out, and one that
is not named comes into the last group that asks for the rest (``"*"``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that are pages of the site."""
PACKAGES = ("crsm", "actors", "jobs")
COPIES = "files"
"""Folder of the site for other files that a page links to."""

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:|//|/")


def modules(root: Path = ROOT) -> list[str]:
    """Every module that has a page, dotted: all but what is private or has no docstring."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            private = any(part.startswith("_") and part != "__init__" for part in parts)
            if not private and path.read_text(encoding="utf-8").lstrip("r").startswith('"""'):
                found.append(".".join(parts).removesuffix(".__init__"))
    return found


def reference_page(module: str, known: Iterable[str]) -> str:
    """Where a module's page lies: a package's is the index of its folder."""
    path = module.replace(".", "/")
    is_package = any(other.startswith(module + ".") for other in known)
    return f"reference/{path}/index.md" if is_package else f"reference/{path}.md"


def rewrite_links(markdown: str, source: str, page: str, known: Sequence[str]) -> tuple[str, set[str]]:
    """Links between files of the repository, as links between pages of the site.

    Args:
        markdown: the text.
        source: the file that it comes from, in the repository.
        page: its page in the site.
        known: modules with a page.

    Returns:
        The text, and the files of the repository that are to be copied into the site.
    """
    copies: set[str] = set()

    def target(match: re.Match[str]) -> str:
        link, anchor = match.group(1), match.group(2) or ""
        if _OUTSIDE.match(link):
            return match.group()
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if file in PAGES:
            place = PAGES[file]
        elif file.startswith("docs/"):
            place = file.removeprefix("docs/")
        elif file.endswith(".py") and module in known:
            place = reference_page(module, known)
        elif (ROOT / file).is_file():
            copies.add(file)
            place = f"{COPIES}/{file}"
        else:
            return match.group()  # which the strict build refuses
        return posixpath.relpath(place, posixpath.dirname(page) or ".") + anchor

    return _LINK.sub(target, markdown), copies


def navigation(groups: Sequence[Mapping[str, Sequence[str]]], pages: Iterable[str]) -> list[dict[str, Any]]:
    """The navigation: groups of the pages that exist, in their order; ``"*"`` stands for all that no group names."""
    left = set(pages)
    named = {page for group in groups for names in group.values() for page in names}
    built = []
    for group in groups:
        ((title, names),) = group.items()
        entries: list[str] = []
        for name in names:
            entries += sorted(left - named) if name == "*" else [name] if name in left else []
        if entries:
            built.append({title: entries})
    return built


def reference_navigation(known: Sequence[str]) -> list[dict[str, Any]]:
    """Reference pages by package and part: ``crsm``, its modules, and below it its packages."""
    tree: list[dict[str, Any]] = []
    for package in PACKAGES:
        parts = [module for module in known if module.split(".")[0] == package]
        entries: list[Any] = []
        folders: dict[str, list[str]] = {}
        for module in parts:
            names = module.split(".")
            is_package = any(other.startswith(module + ".") for other in known)
            if len(names) > 2 or (len(names) == 2 and is_package):
                folders.setdefault(names[1], []).append(reference_page(module, known))
            else:
                entries.append(reference_page(module, known))
        entries += [{folder: pages} for folder, pages in sorted(folders.items())]
        tree.append({package: entries})
    return tree


# --------------------------------------------------------------------------------------------------------------- mkdocs


def on_config(config: Any) -> Any:
    """The navigation, from what is there."""
    docs = Path(config.docs_dir)
    pages = {path.name for path in docs.glob("*.md")} | set(PAGES.values())
    known = modules()
    config.nav = [{"Home": "index.md"}, *navigation(config.extra["groups"], pages - {"index.md"})]
    config.nav.append({"Reference": reference_navigation(known)})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Pages and files that lie outside of ``docs``."""
    from mkdocs.structure.files import File

    known = modules()
    copies: set[str] = set()
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        copies |= rewrite_links(text, source, page, known)[1]
    for path in sorted(Path(config.docs_dir).glob("*.md")):
        copies |= rewrite_links(path.read_text(encoding="utf-8"), f"docs/{path.name}", path.name, known)[1]
    for module in known:
        title = module.rpartition(".")[2]
        content = f"---\ntitle: {title}\n---\n\n# `{module}`\n\n::: {module}\n"
        files.append(File.generated(config, reference_page(module, known), content=content))
    for file in sorted(copies):
        files.append(File.generated(config, f"{COPIES}/{file}", abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page, rewritten."""
    place = page.file.src_uri
    source = next((source for source, known in PAGES.items() if known == place), f"docs/{place}")
    return markdown if place.startswith("reference/") else rewrite_links(markdown, source, place, modules())[0]
