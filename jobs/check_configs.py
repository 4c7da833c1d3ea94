"""Checks every configuration of the project without a cluster, a network or an account.

=================================  ====================================================================================
``configs/*.yaml``                 the typed settings of :mod:`crsm.config`
``configs/ablate_*.yaml``          those, a sweep and its space (:mod:`jobs.ablation.settings`)
``configs/evaluate*.yaml``         those, and how benchmarks are asked (:mod:`jobs.evaluation.settings`)
``configs/tune_*.yaml``            those, and a search over a stage's settings (:mod:`jobs.ablation.tuning`)
``configs/data/*.yaml``            preparations of data (:mod:`crsm.data_config`)
``configs/runtime_env.yaml``       the fields of Ray's ``RuntimeEnv``
``configs/serve/*.yaml``           Ray Serve's ``ServeDeploySchema``
``cluster.yaml``,
``configs/cluster/*.yaml``         Ray's ``prepare_config`` and ``validate_config``, the requests of EC2 and Compute
                                   Engine, the command lines
``configs/cluster/*.sbatch``       the options of sbatch and the command lines
``configs/kubernetes/*.yaml``      KubeRay's schema, Ray's version, and the command lines and files inside
``configs/grafana/*.json``         JSON
``Dockerfile``                     instructions, what is copied, and that the project is installed by ``make setup``
=================================  ====================================================================================

What a file is follows from where it lies, so that no typo makes it something else.
"""

from __future__ import annotations

import json as jsonlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from jobs.checks.documents import read_documents, read_yaml
from jobs.command import ROOT, JsonOption, describe, run, write_result

FilesArgument = Annotated[
    list[Path] | None, typer.Argument(help="Files below the project; none: all of them.", show_default=False)
]


def main(files: FilesArgument = None, json: JsonOption = None) -> int:
    """Check settings, cluster files, manifests and the Dockerfile; exit status 1 if one has a mistake."""
    paths = [path.resolve() for path in files] if files else shipped()
    found = {str(_relative(path)): problems(path) for path in paths}
    for path, wrong in found.items():
        for line in wrong:
            print(f"{path}: {line}", file=sys.stderr)
    count = sum(map(len, found.values()))
    print(f"{len(paths)} files, {count} mistake{'' if count == 1 else 's'}", file=sys.stderr)
    write_result("check_configs", {}, 0, {"files": found}, json)
    return 1 if count else 0


def shipped(root: Path = ROOT) -> list[Path]:
    """Every file that has a check, and every one in ``configs/`` that lacks one."""
    inside = (path for path in (root / "configs").rglob("*") if path.is_file() and path.suffix != ".md")
    return [root / "Dockerfile", root / "cluster.yaml", *sorted(inside)]


def problems(path: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with a file, a line each; empty: nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return [describe(error)]
    from crsm.data_config import load_data_config
    from jobs.checks.kubernetes import manifest_problems
    from jobs.checks.launcher import launcher_problems
    from jobs.checks.ray_files import runtime_env_problems, serve_problems
    from jobs.checks.scripts import dockerfile_problems, slurm_problems

    where = _relative(path, root)
    folder, name = where.parent.as_posix(), where.name
    try:
        if name == "Dockerfile":
            return list(dockerfile_problems(text, root))
        if folder == "configs/cluster" and path.suffix == ".sbatch":
            return list(slurm_problems(text))
        if folder == "configs/grafana" and path.suffix == ".json":
            jsonlib.loads(text)
            return []
        if path.suffix == ".yaml":
            if name == "cluster.yaml" or folder == "configs/cluster":
                return list(launcher_problems(read_yaml(text)))
            if folder == "configs/kubernetes":
                return [line for document in read_documents(text) for line in manifest_problems(document)]
            if folder == "configs/serve":
                return list(serve_problems(read_yaml(text)))
            if where.as_posix() == "configs/runtime_env.yaml":
                return list(runtime_env_problems(read_yaml(text)))
            if folder == "configs/data":
                load_data_config(path)
                return []
            if folder == "configs":
                return list(_settings(path))
            if folder == "configs/grafana":
                read_yaml(text)
                return []
    except ValueError as error:
        return [describe(error)]
    return [f"no check knows this file; allowed: {', '.join(sorted(_places()))}"]


def _places() -> list[str]:
    return re.findall(r"``((?:configs/|cluster\.yaml|Dockerfile)[^`]*)``", __doc__ or "")


def _relative(path: Path, root: Path = ROOT) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def _settings(path: Path) -> Iterator[str]:
    from crsm.config import load_config, parse_config
    from jobs.ablation.settings import load_ablation
    from jobs.ablation.space import parse_space
    from jobs.ablation.tuning import load_tuning
    from jobs.evaluation.settings import load_evaluation

    if path.name.startswith("ablate_"):
        sweep = load_ablation(path)
        ranges = sweep.ablation.method != "grid"
        parse_space(sweep.ablation.space, parse_config(sweep.stated, str(path)), ranges=ranges)
    elif path.name.startswith("tune_"):
        load_tuning(path)
    elif path.name.startswith("evaluate"):
        load_evaluation(path)
    else:
        load_config(path)
    yield from ()


if __name__ == "__main__":
    run(main)
