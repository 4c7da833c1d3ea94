"""Settings of a server: limits that fit together, and keys from everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors.serving.settings import ServeSettings


def test_keys_come_from_settings_file_and_environment_each_once(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-key  # Ann\n\nshared\n")
    settings = ServeSettings(api_keys=("own", "shared"), api_key_file=str(file))
    assert settings.keys({"CRSM_API_KEYS": " env ,,own"}) == ("own", "shared", "file-key", "env")
    assert ServeSettings().keys({}) == ServeSettings().keys({"CRSM_API_KEYS": " "}) == ()


def test_a_key_file_without_a_key_is_an_error_not_an_open_server(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(ValueError, match="holds no key"):
        ServeSettings(api_key_file=str(file)).keys({})
    with pytest.raises(ValueError, match="cannot be read"):
        ServeSettings(api_key_file=str(tmp_path / "none")).keys({})


@pytest.mark.parametrize("key", ["a b", "ключ", "a\tb"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="API key 0 has a space or unprintable") as refused:
        ServeSettings(api_keys=(key,)).keys({})
    assert key not in str(refused.value)


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(ServeSettings(api_keys=("secret",)))


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="max_n = 9; allowed: at most max_concurrent = 8"):
        ServeSettings(max_n=9, max_concurrent=8)
    with pytest.raises(ValueError, match="state_seconds = 600; allowed: at most max_state_seconds = 60"):
        ServeSettings(max_state_seconds=60)
    with pytest.raises(ValueError, match="stream_interval"):
        ServeSettings(stream_interval=float("nan"))


def test_settings_need_neither_torch_nor_ray() -> None:
    code = "import sys, actors.serving.settings; print({'torch', 'ray'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "set()"


def test_the_front_works_without_ray_installed() -> None:
    code = """
import importlib, pkgutil, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay())
import actors.serving
for module in pkgutil.walk_packages(actors.serving.__path__, "actors.serving."):
    importlib.import_module(module.name)
print("ray" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.strip() == "False", run.stderr
