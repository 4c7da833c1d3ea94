"""Imports go in one direction, ``crsm`` never needs Ray, and what a command line imports is cheap."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"config", "data_config", "description", "overrides", "settings", "task_config", "training_config", "types"},
    {"devices", "kernels", "native", "threads", "wire"},
    {"mamba_ssm", "fusion", "critic", "latent_dynamics", "plan_writer"},
    {"search", "injection", "gate", "delta_buffer"},
    {"model"},
    {"decoding", "importing", "placement"},
    {"reasoning"},
    {
        "computation_value",
        "generation",
        "latency",
        "pace",
        "planners",
        "prompts",
        "sampling",
        "saved_generation",
        "slots",
        "steering",
        "step_graphs",
    },
    {"event_log", "metrics", "plan_events"},
    {"deliberation"},
    {"parking", "turns"},
    {"engine"},
    {"training", "evaluation", "release", "notebook", "scaling"},
    {"commands"},
    {"cli"},
)
"""A part of ``crsm`` imports from its own layer and from those above it in this list."""
BESIDE = {"tasks", "data"}
"""Known to every layer but the first two; know only each other and the first."""
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

COMMANDS = {ROOT / "crsm" / "cli.py", *(ROOT / "crsm" / "commands").glob("*.py")}

FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in ("crsm", "actors", "jobs")}


def imports(path):
    """(line, absolute name, at module level) of everything that a file imports, functions and type checking too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (prefix, node.module)))
            # `from crsm import x` names a part, `from crsm.x import y` may; the longer name says no less.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield node.lineno, name, id(node) not in lazy


def part(name):
    """``crsm.search.tree`` → ``search``; None for the package itself (its version) and for anything else."""
    parts = name.split(".")
    if parts[0] != "crsm" or len(parts) < 2:
        return None
    source = ROOT / "crsm" / parts[1]
    return parts[1] if source.is_dir() or source.with_suffix(".py").is_file() else None


def part_of(path):
    return None if path == ROOT / "crsm" / "__init__.py" else path.relative_to(ROOT / "crsm").with_suffix("").parts[0]


def allowed(importer, imported):
    if imported in (None, importer):
        return True
    if importer is None:
        return False
    if importer in BESIDE:
        return imported in BESIDE or RANK[imported] == 0
    if imported in BESIDE:
        return RANK[importer] >= 2
    return RANK[imported] <= RANK[importer]


def unknown_parts():
    return {part_of(path) for path in FILES["crsm"]} - {None} - set(RANK) - BESIDE


def test_every_part_of_the_library_has_a_layer():
    assert not unknown_parts(), "name the layer of the new part in the table above"


def test_the_library_imports_in_one_direction():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES["crsm"]
        for line, name, _ in imports(path)
        if not {part_of(path), part(name)} & unknown_parts() and not allowed(part_of(path), part(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_never_imports_ray():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES["crsm"]
        for line, name, _ in imports(path)
        if name.split(".")[0] == "ray"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_points_back_from_library_to_actors_to_jobs():
    above = {"crsm": {"actors", "jobs"}, "actors": {"jobs"}, "jobs": set()}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package, files in FILES.items()
        for path in files
        for line, name, at_module_level in imports(path)
        if name.split(".")[0] in above[package]
        # The command `crsm` starts jobs and actors, from inside its functions.
        and (at_module_level or path not in COMMANDS)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("engine", "model", True),
        ("model", "engine", False),
        ("search", "mamba_ssm", True),
        ("search", "injection", True),
        ("kernels", "mamba_ssm", False),
        ("tasks", "config", True),
        ("data", "tasks", True),
        ("tasks", "model", False),
        ("model", "data", True),
        ("config", "types", True),
        ("config", "tasks", False),
        ("kernels", "data", False),
        (None, "config", False),
        ("config", None, True),
    ],
)
def test_the_rule_itself(importer, imported, expected):
    assert allowed(importer, imported) is expected


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_settings_need_neither_torch_nor_ray():
    assert run_python("import crsm, crsm.config, sys; print({'torch', 'ray'} & set(sys.modules))") == "set()"


def test_the_whole_library_works_without_ray_installed():
    code = """
import importlib, pkgutil, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay())
import crsm
for module in pkgutil.walk_packages(crsm.__path__, "crsm."):
    if module.name != "crsm.tasks.gym_scorer":  # the child process of the extra `gym`
        importlib.import_module(module.name)
print("ray" in sys.modules, crsm.__version__)
"""
    assert run_python(code).startswith("False ")
