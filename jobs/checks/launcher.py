"""Files of Ray's cluster launcher: its own validation, and what that leaves open."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.checks.command_lines import command_line_problems
from jobs.checks.documents import against, short
from jobs.checks.ray_files import image_problems
from jobs.command import describe

_PROVIDERS: dict[str, tuple[set[str], set[str]]] = {
    "aws": (
        {"region"},
        {"availability_zone", "cache_stopped_nodes", "key_pair", "security_group", "use_internal_ips", "cloudwatch"},
    ),
    "gcp": ({"region", "availability_zone", "project_id"}, {"gcp_credentials", "use_internal_ips"}),
    "local": ({"head_ip", "worker_ips"}, {"external_head_ip", "use_internal_ips"}),
}
"""What Ray's launcher reads of ``provider``: what it needs, what it takes."""
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def launcher_problems(tree: dict[str, Any]) -> Iterator[str]:
    provider = tree.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if not isinstance(provider, dict) or kind not in _PROVIDERS:
        yield f"provider.type = {kind!r}; allowed: {', '.join(_PROVIDERS)}"
        return
    needed, taken = _PROVIDERS[kind]
    for key in sorted(set(provider) - needed - taken - {"type"}):
        yield f"provider.{key}: not read by Ray for {kind}; allowed: {', '.join(sorted(needed | taken))}"
    for key in sorted(needed - set(provider)):
        yield f"provider.{key} is missing"
    if needed - set(provider):
        return
    for where, image in _launcher_images(tree):
        yield from image_problems(where, image)
    for name, node_type in (tree.get("available_node_types") or {}).items():
        yield from _node_config(kind, f"available_node_types.{name}.node_config", node_type)
        yield from _resources(f"available_node_types.{name}.resources", node_type)
    try:
        _validate(copy.deepcopy(tree))
    except Exception as error:  # of jsonschema, click, or anything that a wrong type leads to
        path = ".".join(map(str, getattr(error, "absolute_path", ())))
        message = getattr(error, "message", None) or describe(error)
        yield f"{path + ': ' if path else ''}{short(str(message))} (Ray's validate_config)"
        return
    yield from _launcher_commands(tree)


def _launcher_images(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    places = [("docker", tree.get("docker"))]
    for name, node_type in (tree.get("available_node_types") or {}).items():
        if isinstance(node_type, dict):
            places.append((f"available_node_types.{name}.docker", node_type.get("docker")))
    for where, docker in places:
        for key in ("image", "head_image", "worker_image"):
            if isinstance(docker, dict) and key in docker:
                yield f"{where}.{key}", docker[key]


def _node_config(kind: str, where: str, node_type: Any) -> Iterator[str]:
    config = node_type.get("node_config") if isinstance(node_type, dict) else None
    if isinstance(config, dict):
        if kind == "aws":
            plain = {key: value for key, value in config.items() if key not in ("SubnetIds",)}  # Ray's own
            yield from against(plain, "aws", "RunInstances", where)
            yield from () if "InstanceType" in config else (f"{where}.InstanceType is missing",)
        if kind == "gcp":
            yield from against(config, "gcp", "Instance", where)
            yield from () if "machineType" in config else (f"{where}.machineType is missing",)


def _resources(where: str, node_type: Any) -> Iterator[str]:
    """Names that Ray gives a meaning to; a custom one is written in small letters here, so that ``Gpu`` is none."""
    known = {"CPU", "GPU", "memory", "object_store_memory"}
    found = node_type.get("resources") if isinstance(node_type, dict) else None
    for name in found if isinstance(found, dict) else ():
        if name not in known and not re.fullmatch(r"crsm-[a-z-]+", str(name)):
            yield f"{where}.{name}; allowed: {', '.join(sorted(known))}, or crsm-NAME for one of your own"


def _validate(tree: dict[str, Any]) -> None:
    """As ``ray up`` does before it talks to anybody."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    talk = logging.getLogger("ray.autoscaler._private.util")
    level = talk.level
    talk.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(tree))
    finally:
        talk.setLevel(level)


def _launcher_commands(tree: Mapping[str, Any]) -> Iterator[str]:
    for key in _COMMANDS:
        for index, line in enumerate(tree.get(key) or ()):
            for problem in command_line_problems(line):
                yield f"{key}[{index}]: {problem}"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not any("RAY_AUTH_MODE=token" in line for line in tree.get(key) or ()):
            yield f"{key} starts Ray without RAY_AUTH_MODE=token: anyone who reaches a port could run code"
