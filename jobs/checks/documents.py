"""YAML read strictly, and held against the vendored schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


def read_yaml(text: str) -> dict[str, Any]:
    documents = read_documents(text)
    if len(documents) != 1:
        raise ValueError(f"{len(documents)} documents; allowed: one")
    return documents[0]


def read_documents(text: str) -> list[dict[str, Any]]:
    """The mappings of a YAML file; a key that occurs twice is a mistake, which YAML itself passes over."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if name in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: {name} more than once")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        documents = list(yaml.load_all(text, Strict))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise ValueError("holds no mapping")
    return documents


@cache
def schema(name: str) -> dict[str, Any]:
    """One of the vendored schemas, by the name of its file."""
    path = Path(__file__).parent / "schemas" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def against(document: Any, name: str, definition: str, where: str = "") -> Iterator[str]:
    """Mistakes by a vendored schema."""
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

    known = schema(name)
    validator = Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": known["$defs"]})
    for error in sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.absolute_path))):
        place = where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        yield f"{place.lstrip('.') or definition}: {short(error.message)} ({known['source']})"


def short(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:120]} … {line[-170:]}"
