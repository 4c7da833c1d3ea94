"""What Ray's own schemas say: runtime environments and Serve's configuration; and the version that is asked for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jobs.checks.documents import short
from jobs.command import ROOT, describe


@cache
def ray_requirement() -> Any:
    """What ``pyproject.toml`` asks of Ray."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    return found


def other_ray(where: str, version: str) -> Iterator[str]:
    asked = ray_requirement().specifier
    from packaging.version import InvalidVersion, Version

    try:
        fits = Version(version) in asked
    except InvalidVersion:
        fits = False
    if not fits:
        yield f"{where} = {version!r}: another Ray than the project's; pyproject.toml allows ray{asked}"


def image_problems(where: str, image: Any) -> Iterator[str]:
    if not isinstance(image, str) or not re.fullmatch(r"[\w.\-/:@]+", image):
        yield f"{where} = {image!r}; allowed: the name of an image"
        return
    repository, _, tag = image.rpartition(":")
    if repository.endswith(("rayproject/ray", "rayproject/ray-ml")):
        yield from other_ray(where, tag.partition("-")[0])


def runtime_env_problems(tree: Mapping[str, Any], where: str = "") -> Iterator[str]:
    from ray.runtime_env import RuntimeEnv

    allowed = {field for field in RuntimeEnv.known_fields if not field.startswith("_")}
    for key in sorted(set(tree) - allowed):
        yield f"{where}{key}: no field of a runtime environment; allowed: {', '.join(sorted(allowed))}"
    if set(tree) <= allowed:
        try:
            RuntimeEnv(**tree)
        except (TypeError, ValueError) as error:
            yield f"{where}{describe(error)}"
    if not all(isinstance(pattern, str) for pattern in tree.get("excludes", ())):
        yield f"{where}excludes: allowed: patterns of .gitignore"
    yield from _unknown_variables(where, tree.get("env_vars", {}))


def _unknown_variables(where: str, names: Any) -> Iterator[str]:
    """Variables with our prefix that nothing reads."""
    for name in names if isinstance(names, Mapping) else ():
        if str(name).startswith("CRSM_") and name not in _variables():
            yield f"{where}env_vars.{name}: read by nothing; allowed: {', '.join(sorted(_variables()))}"


@cache
def _variables() -> frozenset[str]:
    sources = (path.read_text(encoding="utf-8") for name in ("crsm", "actors", "jobs") for path in _sources(name))
    return frozenset(name for text in sources for name in re.findall(r"\"(CRSM_[A-Z0-9_]*[A-Z0-9])\"", text))


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def serve_problems(tree: Mapping[str, Any], where: str = "") -> Iterator[str]:
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        deployed = ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        for mistake in error.errors():
            yield f"{where}{'.'.join(map(str, mistake['loc']))}: {short(str(mistake['msg']))}"
        return
    yield from _ignored(deployed, tree, where)
    for application in deployed.applications:
        module = application.import_path.partition(":")[0]
        if not _is_module(module):
            yield f"{where}applications.{application.name}.import_path = {application.import_path!r}: no such module"
        elif module == "actors.service":
            from importlib import import_module

            arguments = import_module("actors.service_args")
            try:
                arguments.parse_args(dict(application.args), f"{where}applications.{application.name}.args")
            except ValueError as error:
                yield describe(error)


def _ignored(model: Any, tree: Any, where: str) -> Iterator[str]:
    """Keys that Serve's schemas pass over without a word."""
    from pydantic import BaseModel

    if isinstance(model, BaseModel) and isinstance(tree, Mapping):
        for key, value in tree.items():
            if key not in type(model).model_fields:
                yield f"{where}{key}: Serve ignores it; allowed: {', '.join(sorted(type(model).model_fields))}"
            else:
                yield from _ignored(getattr(model, key), value, f"{where}{key}.")
    elif isinstance(model, list) and isinstance(tree, list):
        for index, (item, value) in enumerate(zip(model, tree, strict=False)):
            yield from _ignored(item, value, f"{where}{index}.")


def _is_module(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except ImportError:
        return False
