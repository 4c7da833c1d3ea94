"""Connecting, starting and leaving Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

import actors.cluster
from actors.cluster import PACKAGES, ROOT, start_ray, upload_env


def test_a_source_tree_is_uploaded_and_an_installed_package_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.cluster, "is_installed", lambda: False)
    assert upload_env() == {"py_modules": [str(ROOT / name) for name in PACKAGES]}
    monkeypatch.setattr(actors.cluster, "is_installed", lambda: True)
    assert upload_env() == {}


def test_a_submitted_job_has_its_code_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working = tmp_path / "working_dir_files" / "_ray_pkg_01"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    monkeypatch.setattr(actors.cluster, "is_installed", lambda: False)
    assert upload_env() == {}
    (working / "jobs").mkdir()
    (working / "jobs" / "pipeline.py").write_text("raise SystemExit\n")
    with pytest.raises(ValueError, match=r"jobs/pipeline\.py is imported here and not the job's own"):
        upload_env()


@pytest.mark.ray
def test_a_local_ray_is_started_left_alone_inside_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ray.is_initialized()
    monkeypatch.chdir(tmp_path)  # workers must find the packages wherever the driver was started
    path = os.environ.get("PYTHONPATH")

    @ray.remote
    def imported() -> tuple[str, str]:
        import actors.planner
        import crsm.engine

        return actors.planner.__file__, crsm.engine.__file__

    with start_ray(num_cpus=2):
        assert ray.cluster_resources()["CPU"] == 2
        assert ray.get(imported.remote()) == (str(ROOT / "actors/planner.py"), str(ROOT / "crsm/engine.py"))
        with start_ray(num_cpus=7):
            assert ray.cluster_resources()["CPU"] == 2
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert os.environ.get("PYTHONPATH") == path
