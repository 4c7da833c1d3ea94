"""A submitted job: where it is, what code it is, and that no other code is run in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from actors.job_environment import as_no_submitted_job, check_imported_code, code_version, working_directory
from actors.reachability import _explain, _version_problem, check_address


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A working directory where Ray puts it."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    (folder / "crsm").mkdir(parents=True)
    (folder / "crsm" / "model.py").write_text("a = 1\n")
    return folder


def test_the_working_directory_is_known_by_its_place(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    assert working_directory() == copy
    monkeypatch.chdir(tmp_path)
    assert working_directory() is None


def test_an_editable_install_may_serve_while_it_is_the_same_code(copy: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    (node / "crsm").mkdir(parents=True)
    installed = node / "crsm" / "model.py"
    for text in ("a = 1\n", "a = 2\n"):
        installed.write_text(text)
        if text == "a = 1\n":
            check_imported_code(node, copy, ("crsm",))
        else:
            with pytest.raises(ValueError, match=r"model\.py is imported here and not the job's own crsm/model\.py"):
                check_imported_code(node, copy, ("crsm",))
    installed.unlink()
    with pytest.raises(ValueError, match=r"allowed: make setup EDITABLE="):
        check_imported_code(node, copy, ("crsm",))
    check_imported_code(copy, copy, ("crsm",))
    check_imported_code(node, None, ("crsm",))


@pytest.mark.parametrize(
    ("job", "version"),
    [
        ({}, None),
        ({"metadata": {"commit": "abc"}, "runtime_env": {"working_dir": "gcs://_ray_pkg_12ef.zip"}}, "abc"),
        ({"metadata": {}, "runtime_env": {"working_dir": "gcs://_ray_pkg_12ef.zip"}}, "package 12ef"),
        ({"runtime_env": {"working_dir": "s3://bucket/code.zip"}}, None),
    ],
)
def test_the_code_of_a_job_is_named_by_its_commit_or_else_by_its_package(
    job: dict, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert code_version() == version


def test_a_cluster_of_its_own_is_not_told_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"commit": "abc"}}')
    with as_no_submitted_job():
        assert code_version() is None
    assert code_version() == "abc"
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    with as_no_submitted_job():
        pass
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ


@pytest.mark.parametrize("address", ["auto", "ray://host:10001"])
def test_addresses_that_ray_itself_looks_up_are_left_to_it(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "is that of the dashboard"),
        ("127.0.0.1", "allowed: HOST:PORT of the head"),
        ("127.0.0.1:6379:1", "allowed: HOST:PORT of the head"),
        ("127.0.0.1:1", "no Ray cluster answers there"),
    ],
)
def test_an_address_of_no_cluster_is_one_line(address: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        check_address(address)
    assert "\n" not in str(raised.value)


def test_what_is_unknown_is_passed_on_in_one_line() -> None:
    assert _explain("INTERNAL", "a\nb") == "INTERNAL: a b"


def test_a_cluster_of_another_version_is_one_line_before_it_is_joined() -> None:
    import platform

    import ray

    own = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    assert _version_problem(own) is None and _version_problem({}) is None
    said = _version_problem(own | {"ray_version": "2.9.0"})
    assert said is not None and said.startswith(
        f"the cluster runs Ray 2.9.0 and Python {platform.python_version()}, this"
    )
    assert said.endswith("allowed: the same versions")
