"""Manifests of KubeRay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.checks.command_lines import command_line_problems
from jobs.checks.documents import against, read_yaml
from jobs.checks.ray_files import image_problems, other_ray, runtime_env_problems, serve_problems

_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def manifest_problems(tree: dict[str, Any]) -> Iterator[str]:
    kinds = ("RayCluster", "RayJob", "RayService")
    if tree.get("apiVersion") != "ray.io/v1" or tree.get("kind") not in kinds:
        yield (
            f"apiVersion, kind = {tree.get('apiVersion')!r}, {tree.get('kind')!r}; "
            f"allowed: 'ray.io/v1' with {', '.join(kinds)}"
        )
        return
    yield from against(tree, "kuberay", tree["kind"])
    yield from _metadata(tree)
    spec = tree.get("spec")
    if not isinstance(spec, dict):
        yield "spec is missing"
        return
    if (mode := spec.get("submissionMode", "K8sJobMode")) not in _SUBMISSION_MODES:
        yield f"spec.submissionMode = {mode!r}; allowed: {', '.join(_SUBMISSION_MODES)}"
    key = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}[tree["kind"]]
    cluster, where = (spec.get(key), f"spec.{key}") if key else (spec, "spec")
    if not isinstance(cluster, dict):
        yield f"{where} is missing"
        return
    if "rayVersion" in cluster:
        yield from other_ray(f"{where}.rayVersion", str(cluster["rayVersion"]))
    else:
        yield f"{where}.rayVersion is missing"
    for place, container in _containers(cluster, where):
        yield from image_problems(f"{place}.image", container.get("image"))
        yield from _resource_problems(f"{place}.resources", container.get("resources"))
    yield from _start_parameters(cluster, where)
    yield from _embedded(spec)


def _metadata(tree: Mapping[str, Any]) -> Iterator[str]:
    """Kubernetes' own part, which the schema of a custom resource leaves open."""
    metadata = tree.get("metadata")
    allowed = {"name", "namespace", "labels", "annotations"}
    if not isinstance(metadata, dict) or not re.fullmatch(
        r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?", str(metadata.get("name"))
    ):
        yield "metadata.name; allowed: small letters, digits and -, up to 48"
        return
    for key in sorted(set(metadata) - allowed):
        yield f"metadata.{key}; allowed: {', '.join(sorted(allowed))}"


def _groups(cluster: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(head := cluster.get("headGroupSpec"), dict):
        yield f"{where}.headGroupSpec", head
    workers = cluster.get("workerGroupSpecs")
    for index, group in enumerate(workers if isinstance(workers, list) else ()):
        if isinstance(group, dict):
            yield f"{where}.workerGroupSpecs[{index}]", group


def _containers(cluster: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, group in _groups(cluster, where):
        try:
            containers = list(group["template"]["spec"]["containers"])
        except (KeyError, TypeError):
            continue  # the schema says so
        for index, container in enumerate(containers):
            if isinstance(container, dict):
                yield f"{place}.template.spec.containers[{index}]", container


_RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu", "amd.com/gpu", "google.com/tpu"}


def _resource_problems(where: str, resources: Any) -> Iterator[str]:
    for kind in ("requests", "limits"):
        named = resources.get(kind) if isinstance(resources, dict) else None
        for name in sorted(set(named) - _RESOURCES) if isinstance(named, dict) else ():
            yield f"{where}.{kind}.{name}; allowed: {', '.join(sorted(_RESOURCES))}"


def _start_parameters(cluster: Mapping[str, Any], where: str) -> Iterator[str]:
    """``rayStartParams`` are options of ``ray start``."""
    for place, group in _groups(cluster, where):
        parameters = group.get("rayStartParams")
        for name in parameters if isinstance(parameters, dict) else ():
            for problem in command_line_problems(f"ray start --{name}=1"):
                yield f"{place}.rayStartParams: {problem}"


def _embedded(spec: Mapping[str, Any]) -> Iterator[str]:
    """Files and command lines that a manifest holds as text."""
    if isinstance(entrypoint := spec.get("entrypoint"), str):
        yield from (f"spec.entrypoint: {problem}" for problem in command_line_problems(entrypoint))
    if isinstance(text := spec.get("runtimeEnvYAML"), str):
        yield from runtime_env_problems(read_yaml(text), "spec.runtimeEnvYAML: ")
    if isinstance(text := spec.get("serveConfigV2"), str):
        yield from serve_problems(read_yaml(text), "spec.serveConfigV2: ")
