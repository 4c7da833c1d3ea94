"""``crsm push`` against a stand-in of the hub: what arrives, what is refused, and going on after a break."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crsm.release.export import export_checkpoint
from crsm.release.hub import push_folder
from tests.fixtures import tiny_checkpoint
from tests.release.hub_server import Hub

ROOT = Path(__file__).parents[2]
TOKEN, READER = "hf_stand_in_writer", "hf_stand_in_reader"
REPOSITORY = "someone/tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "tiny"
    export_checkpoint(tiny_checkpoint(), folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "tiny"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({TOKEN: "write", READER: "read"}) as server:
        yield server


def start(hub: Hub | None, *arguments: str | Path, token: str | None = TOKEN) -> subprocess.Popen[str]:
    """The command in a process of its own: the library reads its environment once."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and key != "HUGGING_FACE_HUB_TOKEN"
    }
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.address if hub else "http://127.0.0.1:9",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": "/nonexistent",
        **({} if token is None else {"HF_TOKEN": token}),
    }
    command = [sys.executable, "-m", "crsm.cli", "push", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def push(hub: Hub | None, *arguments: str | Path, token: str | None = TOKEN) -> tuple[int, str, str]:
    """Exit status, standard output, standard error; the token is in neither."""
    out, err = (process := start(hub, *arguments, token=token)).communicate(timeout=250)
    assert not token or (token not in out and token not in err)
    return process.returncode, out, err


def error_of(err: str) -> str:
    """The last line; it is the only one of an error."""
    assert "Traceback" not in err, err
    return err.strip().splitlines()[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def test_a_new_repository_is_private_and_holds_the_folder(hub: Hub, exported: Path) -> None:
    status, out, err = push(hub, exported, REPOSITORY)
    assert status == 0, err
    assert out == f"{hub.address}/{REPOSITORY}\n"
    repository = hub.repositories[REPOSITORY]
    assert repository.private and len(repository.commits) == 1
    assert {name: content for name, content in repository.files.items() if name != ".gitattributes"} == contents(
        exported
    )
    assert hub.authorizations == {f"Bearer {TOKEN}"}
    assert sorted(hub.puts.values()) == [1, 1]

    before = dict(repository.files)
    assert push(hub, exported, REPOSITORY)[0] == 0, "the same folder again changes nothing"
    assert repository.files == before and len(repository.commits) == 1 and sorted(hub.puts.values()) == [1, 1]


def test_another_content_is_replaced_only_by_an_update(hub: Hub, folder: Path) -> None:
    assert push(hub, folder, REPOSITORY, "--public")[0] == 0
    repository = hub.repositories[REPOSITORY]
    assert not repository.private
    repository.files["model-00001-of-00002.safetensors"] = b"of an earlier export"
    repository.files["picture.png"] = b"somebody's"
    before = dict(repository.files)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Another card\n")

    status, _, err = push(hub, folder, REPOSITORY)
    assert status == 2 and error_of(err) == (
        f"error: {REPOSITORY} exists and holds another README.md and 2 more; allowed: a new repository, or --update"
    )
    assert repository.files == before and len(repository.commits) == 1

    status, _, err = push(hub, folder, REPOSITORY, "--update", "-m", "A better card")
    assert status == 0, err
    assert repository.commits[-1] == "A better card"
    kept = {".gitattributes", "picture.png"}
    assert without(repository.files, *kept) == contents(folder)
    assert kept < set(repository.files)


def test_an_upload_that_was_interrupted_goes_on_with_what_is_missing(hub: Hub, exported: Path) -> None:
    first, second = (
        hashlib.sha256((exported / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "system_2.safetensors")
    )
    hub.hold_at = second
    process = start(hub, exported, REPOSITORY)
    try:
        assert hub.held.wait(200), process.communicate()
        while not hub.puts[first]:
            assert process.poll() is None, process.communicate()
    finally:
        process.kill()  # in the middle of the second file
        process.communicate()
    assert hub.repositories[REPOSITORY].commits == [] and set(hub.large) == {first}

    hub.hold_at = None
    status, _, err = push(hub, exported, REPOSITORY)
    assert status == 0, err
    assert hub.puts == {first: 1, second: 1}
    files = hub.repositories[REPOSITORY].files
    assert without(files, ".gitattributes") == contents(exported)


@pytest.mark.parametrize(("token", "status"), [("hf_unknown", 401), (READER, 403)])
def test_a_refused_token_is_one_line(hub: Hub, exported: Path, token: str, status: int) -> None:
    code, out, err = push(hub, exported, REPOSITORY, token=token)
    assert (code, out) == (2, "")
    assert error_of(err) == (
        f"error: the hub refused the token of HF_TOKEN for {REPOSITORY} ({status}); allowed: one with write access"
    )
    assert not hub.repositories


def test_without_a_token_nothing_is_asked(hub: Hub, exported: Path) -> None:
    code, _, err = push(hub, exported, REPOSITORY, token=None)
    assert code == 2
    assert error_of(err) == "error: HF_TOKEN is not set; allowed: a token of the hub with write access"
    assert not hub.requests


def test_a_folder_that_is_no_whole_export_is_refused_before_anything_is_asked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no folder with a config\.json; allowed: what crsm export wrote"):
        push_folder(tmp_path / "empty", REPOSITORY, TOKEN)
    with open(folder / "system_2.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"system_2\.safetensors: 1000 bytes; the checkpoint names "):
        push_folder(folder, REPOSITORY, TOKEN)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "some one/tiny"])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(exported: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"repository = '{name}'"):
        push_folder(exported, name, TOKEN)


def test_a_hub_that_fails_or_is_away_is_one_line(hub: Hub, exported: Path) -> None:
    hub.failing["/api/repos/create"] = 500
    code, _, err = push(hub, exported, REPOSITORY)
    assert code == 2 and f"the hub answered 500 for {REPOSITORY}" in error_of(err)
    code, _, err = push(None, exported, REPOSITORY)
    assert code == 2 and f"upload to {REPOSITORY} broke off" in error_of(err)
