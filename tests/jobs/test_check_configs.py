"""Every configuration passes its check, and no typo in one of them does."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from jobs.check_configs import main, problems, shipped
from jobs.checks.command_lines import command_line_problems
from jobs.checks.ray_files import ray_requirement
from jobs.command import ROOT, invoke

SHIPPED = shipped()
YAML = [path for path in SHIPPED if path.suffix == ".yaml"]
MANIFESTS = [path for path in YAML if path.parent.name == "kubernetes"]


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def check(tmp_path):
    """Checks a text as if it were the file of that name."""
    root = tmp_path / "project"

    def call(path, text):
        copied = root / name(path)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(text, encoding="utf-8")
        if copied.name == "Dockerfile":
            (root / "scripts").mkdir(exist_ok=True)
            (root / "scripts" / "gpu_checks.sh").touch()
        return problems(copied, root)

    return call


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_every_shipped_configuration_is_without_a_mistake(path):
    assert problems(path) == []


def test_what_is_asked_for_is_there():
    names = {name(path) for path in SHIPPED}
    clusters = {f"configs/cluster/{where}" for where in ("gcp.yaml", "on_premise.yaml", "slurm.sbatch")}
    manifests = {f"configs/kubernetes/{what}.yaml" for what in ("ray_cluster", "ray_job")}
    assert names >= {"cluster.yaml", "Dockerfile", "configs/runtime_env.yaml"} | clusters | manifests


# ---------------------------------------------------------------------------------------------------------------- typos

FREE = re.compile(
    r"""
      \.labels\..* | \.nodeSelector\..* | \.annotations\..*  # anybody's names
    | ^file_mounts\. | \.available_node_types\.(generator|planner)$ | ^available_node_types\.(generator|planner)$
    | env_vars\.(?!CRSM_)                                                  # variables of other programs
    | ^tasks\.\d+\.weight$
    """,
    re.VERBOSE,
)
"""Keys that nobody can know to be wrong."""


def keys(tree, path=()):
    """Every key of nested mappings and lists, as a path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(tree, dict):
            yield (*path, key)
        yield from keys(value, (*path, key))


def renamed(tree, path):
    """A copy with a letter more in one key."""
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[f"{path[-1]}x"] = place.pop(path[-1])
    return tree


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


@pytest.mark.parametrize("path", YAML, ids=name)
def test_a_typo_in_any_key_is_found(path, check):
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    missed, tried = [], 0
    for number, document in enumerate(documents):
        # As the file is written out, so that a mistake in one place is not one in every place that shares it.
        document = yaml.load(yaml.dump(document, Dumper=NoAliases), yaml.SafeLoader)
        for key in keys(document):
            dotted = ".".join(map(str, key))
            if FREE.search(dotted):
                continue
            tried += 1
            changed = [renamed(document, key) if n == number else other for n, other in enumerate(documents)]
            if not check(path, yaml.dump_all(changed, Dumper=NoAliases, sort_keys=False)):
                missed.append(dotted)
    assert not missed
    assert tried >= 2


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_broken_file_is_found(path, check):
    text = path.read_text(encoding="utf-8")
    assert check(path, text) == []
    assert check(path, text[: len(text) // 2] + "\n\t}{'\"\n")


@pytest.mark.parametrize(
    ("path", "right", "wrong", "said"),
    [
        ("cluster.yaml", "type: aws", "type: asw", "provider.type = 'asw'; allowed: aws, gcp, local"),
        ("cluster.yaml", "MarketType: spot", "MarketType: sport", "'sport' is not one of ['spot'"),
        ("cluster.yaml", "max_workers: 20", "max_workers: many", "max_workers: 'many' is not of type 'integer'"),
        ("cluster.yaml", "head_node_type: head", "head_node_type: hed", "`head_node_type` must be one of"),
        ("cluster.yaml", "--object-manager-port", "--objekt-manager-port", "no such option of the installed Ray"),
        ("cluster.yaml", "RAY_AUTH_MODE=token ray start --head", "ray start --head", "without RAY_AUTH_MODE=token"),
        ("configs/cluster/gcp.yaml", "provisioningModel: SPOT", "provisioningModel: SPOTS", "'SPOTS' is not one of"),
        ("configs/cluster/on_premise.yaml", "head_ip:", "hed_ip:", "provider.head_ip is missing"),
        ("configs/cluster/on_premise.yaml", "ray stop", "ray stopp", "ray stopp: no such command"),
        ("configs/cluster/slurm.sbatch", "#SBATCH --nodes=2", "#SBATCH --noodes=2", "no option of sbatch"),
        ("configs/cluster/slurm.sbatch", "#SBATCH --mem", "#SBACTH --mem", "no option of sbatch"),
        ("configs/cluster/slurm.sbatch", "--min-nodes", "--minimum-nodes", "ray symmetric-run --minimum-nodes"),
        ("configs/kubernetes/ray_job.yaml", "jobs.pipeline", "jobs.pipelines", "python -m jobs.pipelines: no such job"),
        ("configs/kubernetes/ray_job.yaml", "--storage", "--store", "python -m jobs.pipeline --store: no such option"),
        ("configs/kubernetes/ray_job.yaml", "K8sJobMode", "Kubernetes", "spec.submissionMode = 'Kubernetes'; allowed"),
        ("configs/kubernetes/ray_cluster.yaml", "kind: RayCluster", "kind: RayClutser", "allowed: 'ray.io/v1' with"),
        ("configs/kubernetes/ray_cluster.yaml", "minReplicas: 0", "minReplicas: none", "is not of type 'integer'"),
        ("configs/runtime_env.yaml", "CRSM_STORAGE", "CRSM_STORE", "env_vars.CRSM_STORE: read by nothing"),
        ("configs/nano.yaml", "policy: puct", "policy: putc", "putc"),
        ("Dockerfile", "make setup EDITABLE=", "make setpu EDITABLE=", "does not install the project by `make setup"),
        ("Dockerfile", "WORKDIR", "WORKDRI", "no instruction of a Dockerfile"),
        ("Dockerfile", "AS cuda", "AS cdua", "target cuda is missing"),
        ("Dockerfile", "scripts/gpu_checks.sh", "scripts/gpu_check.sh", "scripts/gpu_check.sh: no such file"),
    ],
)
def test_a_typo_in_a_value_is_named(path, right, wrong, said, check):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert right in text
    found = check(ROOT / path, text.replace(right, wrong))
    assert any(said in line for line in found), found
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_a_manifest_for_another_ray_is_refused_in_one_line(path, check):
    text = re.sub(r'rayVersion: "[\d.]+"', 'rayVersion: "2.9.0"', path.read_text(encoding="utf-8"))
    (line,) = check(path, text)
    assert "rayVersion = '2.9.0': another Ray than the project's" in line
    assert str(ray_requirement().specifier) in line


def test_an_image_with_another_ray_is_refused(check):
    path = ROOT / "configs/kubernetes/ray_job.yaml"
    text = path.read_text(encoding="utf-8")
    assert check(path, text.replace("REGISTRY/crsm:cpu", "rayproject/ray:2.60.0-py312-cpu")) == []
    found = check(path, text.replace("REGISTRY/crsm:cpu", "rayproject/ray:2.59.0-py312-cpu"))
    assert len(found) == 2 and all("image = '2.59.0': another Ray" in line for line in found)


def test_a_key_that_occurs_twice_is_found(check):
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    (line,) = check(ROOT / "cluster.yaml", f"{text}max_workers: 3\n")
    assert line == f"line {text.count(chr(10)) + 1}: max_workers more than once"


def test_a_file_that_no_check_knows_is_a_mistake(check):
    (line,) = check(ROOT / "configs/unknown/a.yaml", "a: 1\n")
    assert line.startswith("no check knows this file; allowed: Dockerfile, cluster.yaml, configs/")


def test_the_command_names_file_and_mistake_and_fails(tmp_path, capsys):
    assert invoke(main, [str(ROOT / "cluster.yaml"), str(ROOT / "configs/runtime_env.yaml")]) == 0
    assert "2 files, 0 mistakes" in capsys.readouterr().err
    assert invoke(main, [str(tmp_path / "no.yaml")]) == 1
    assert "no.yaml: No such file or directory" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    "line",
    [
        "ray start --head --port=6379; ray stop",
        "RAY_AUTH_MODE=token ~/crsm/.venv/bin/ray start --address=$RAY_HEAD_IP:6379",
        "srun --nodes=2 ray symmetric-run --address a:1 --num-gpus=1 -- python -m jobs.pipeline --config c.yaml",
        "ray job submit --working-dir . --runtime-env e.yaml -- python -m jobs.pipeline --json -",
        "grep ray --color file && echo 'ray nonsense --option'",
    ],
)
def test_command_lines_that_are_right(line):
    assert command_line_problems(line) == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ray strat --head", "ray strat: no such command"),
        ("ray job submitt", "ray job submitt: no such command"),
        ("ray start --heed", "ray start --heed: no such option"),
        ("ray symmetric-run --address a:1 --head -- true", "ray symmetric-run --head: no such option"),
        ("ray job submit -- python -m jobs.pipeline --confg c", "python -m jobs.pipeline --confg: no such option"),
        ("if true; then", "no shell command"),
    ],
)
def test_command_lines_that_are_wrong(line, said):
    assert any(said in found for found in command_line_problems(line))


def test_schemas_name_their_source():
    from jobs.checks.documents import schema

    readme = (Path(ROOT) / "jobs/checks/schemas/README.md").read_text(encoding="utf-8")
    assert schema("kuberay")["source"] in readme
    assert schema("aws")["source"].partition("-")[2] in readme


def test_the_commands_of_the_documentation_have_no_option_that_does_not_exist():
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    commands = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    assert commands.count("ray job submit") >= 3
    assert command_line_problems(commands) == ()


def test_little_goes_up_with_a_job(tmp_path):
    """The package that Ray makes of the working directory, without what is not code."""
    import zipfile

    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    excludes = yaml.safe_load((ROOT / "configs/runtime_env.yaml").read_text(encoding="utf-8"))["excludes"]
    package = tmp_path / "package.zip"
    everything = [*get_runtime_env_default_excludes(), *excludes]
    create_package(str(ROOT), package, include_gitignore=True, excludes=everything)
    names = zipfile.ZipFile(package).namelist()
    assert package.stat().st_size < 20 << 20
    tops = {name.split("/")[0] for name in names}
    assert tops >= {"crsm", "actors", "jobs", "configs", "pyproject.toml"}
    assert not tops & {".git", ".venv", "runs", "build", "dist", "docs", "tests", ".mypy_cache", ".ruff_cache"}
    assert "crsm/assets/nano/model.safetensors" in names
    assert not any("__pycache__" in name for name in names)
