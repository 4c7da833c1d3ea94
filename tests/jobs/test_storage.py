"""Paths in a storage: a folder and a bucket do the same, and a storage that cannot be used says so at once."""

from __future__ import annotations

import errno
import http.server
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("moto", reason="extra dev")

from jobs import object_store, storage
from jobs.command import describe
from jobs.storage import StoragePath, fetch
from tests.jobs.local_object_store import CREDENTIALS, start_object_store


@pytest.fixture(scope="module")
def store():
    with start_object_store() as store:
        yield store


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CRSM_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, store):
    if request.param == "folder":
        return StoragePath.of(tmp_path / "storage")
    name = "b" + "".join(c for c in request.node.name.lower() if c.isalnum())[:50]
    store.bucket(name)
    return StoragePath.of(store.uri(f"{name}/runs"))


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a//b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("/abs/folder", "/abs/folder"),
        ("file:///abs/folder", "/abs/folder"),
        (
            "s3://bucket/a?endpoint_override=http://h:1&region=eu",
            "s3://bucket/a?endpoint_override=http://h:1&region=eu",
        ),
        (
            "s3://bucket/a?region=eu&endpoint_override=http%3A%2F%2Fh%3A1",
            "s3://bucket/a?endpoint_override=http://h:1&region=eu",
        ),
    ],
)
def test_a_path_is_read_and_written_the_same(text, shown):
    path = StoragePath.of(text)
    assert str(path) == shown
    assert StoragePath.of(shown) == path == pickle.loads(pickle.dumps(path))


def test_names_are_joined_before_the_options():
    path = StoragePath.of("s3://bucket/runs?endpoint_override=http://h:1&region=eu") / "nano" / "stage_1"
    assert str(path) == "s3://bucket/runs/nano/stage_1?endpoint_override=http://h:1&region=eu"
    assert path.name == "stage_1" and path.parent.name == "nano"
    assert path.with_name("stage_2").path == "bucket/runs/nano/stage_2"
    assert path.local is None


def test_a_local_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert StoragePath.of("runs").local == tmp_path / "runs"
    assert StoragePath.of("~/runs").local == Path.home() / "runs"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "storage = ''; allowed: a folder"),
        ("ftp://host/a", r"storage = 'ftp://host/a'; allowed: a folder, s3://"),
        ("s3://", r"storage = 's3://'; allowed"),
        ("s3:///a/..", r"storage = 's3:///a/..'; allowed"),
        ("s3://bucket/a?regoin=eu", r"'regoin'; allowed behind the \?: endpoint_override, region, scheme"),
        ("s3://bucket/a?region=", r"'region'; allowed behind"),
        ("s3://key:secret@bucket/a", "credentials in a path; allowed: in the environment"),
    ],
)
def test_what_is_no_storage_is_refused(text, line):
    with pytest.raises(ValueError, match=line) as raised:
        StoragePath.of(text)
    assert "secret" not in str(raised.value)


def test_the_endpoint_of_the_environment_goes_along_with_the_path(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:1")
    monkeypatch.setenv("AWS_REGION", "eu-7")
    assert str(StoragePath.of("s3://b1/a")) == "s3://b1/a?endpoint_override=http://h:1&region=eu-7"
    assert str(StoragePath.of("gs://b1/a")) == "gs://b1/a"


# ----------------------------------------------------------------------------------------------------- files, folders


def test_a_file_is_read_as_it_was_written(place):
    file = place / "a" / "run.json"
    assert not file.exists() and not file.is_file() and not place.exists()
    with pytest.raises(FileNotFoundError) as raised:
        file.read_text()
    assert raised.value.filename == file.where and raised.value.errno == errno.ENOENT
    for text in ("first", "second, as it is: ë\n"):
        file.write_text(text)
        assert file.read_text() == text and file.is_file()
    assert (place / "a").exists() and not (place / "a").is_file()
    assert [path.name for path in place.iterdir()] == ["a"]
    assert (place / "a").iterdir() == [file] and (place / "none").iterdir() == []


def test_a_folder_appears_whole_its_marker_last(place, tmp_path, monkeypatch):
    source = tmp_path / "made"
    (source / "sub").mkdir(parents=True)
    for name in ("aaa.json", "weights", "sub/zzz"):
        (source / name).write_text(name)
    order = []
    put = StoragePath._put

    def noted(self, path):
        order.append(path.name)
        put(self, path)

    monkeypatch.setattr(StoragePath, "_put", noted)
    target = place / "checkpoint"
    target.upload(source, last="aaa.json")
    assert order == ["zzz", "weights", "aaa.json"]
    with pytest.raises(ValueError, match="last = 'none'"):
        target.upload(source, last="none")
    target.download(tmp_path / "back")
    assert {path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*")} == {
        "aaa.json",
        "weights",
        "sub",
        "sub/zzz",
    }
    assert (tmp_path / "back" / "sub" / "zzz").read_text() == "sub/zzz"


def test_a_large_file_is_copied_in_parts(place, tmp_path):
    source = tmp_path / "large"
    source.write_bytes(os.urandom(1 << 20) * 20)
    (place / "large").upload(source)
    (place / "large").download(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_download_of_nothing_leaves_nothing(place, tmp_path):
    with pytest.raises(FileNotFoundError):
        (place / "none").download(tmp_path / "x" / "back")
    assert list((tmp_path / "x").iterdir()) == []


def test_what_is_put_aside_is_kept(place):
    folder = place / "stage_1"
    assert folder.put_aside() is None
    for content in ("first", "second"):
        (folder / "sub" / "file").write_text(content)
        (folder / "run.json").write_text(content)
        folder.put_aside()
        assert not folder.exists()
    assert (place / "stage_1.old-1" / "sub" / "file").read_text() == "first"
    assert (place / "stage_1.old-2" / "run.json").read_text() == "second"
    assert [path.name for path in place.iterdir()] == ["stage_1.old-1", "stage_1.old-2"]


def test_files_are_moved_and_deleted(place, tmp_path):
    (place / "a").write_text("a")
    (place / "a").move(place / "sub" / "b")
    assert (place / "sub" / "b").read_text() == "a" and not (place / "a").exists()
    (place / "sub").delete()
    (place / "sub").delete()
    assert not (place / "sub" / "b").exists()
    with pytest.raises(ValueError, match="allowed: a path in the same storage"):
        place.move(StoragePath.of("gs://b1/a"))


def test_a_storage_that_can_be_written_is_left_as_it_was(place):
    place.check_writable()
    assert place.iterdir() == []


def test_ray_gets_the_same_place(place):
    path, filesystem = place.for_ray()
    (place / "a").write_text("a")
    if place.local is not None:
        assert filesystem is None and Path(path) == place.local
    else:
        assert filesystem.open_input_stream(f"{path}/a").read() == b"a"


# ---------------------------------------------------------------------------------------------------- copies of a node


def fetch_text(place):
    return (fetch(place, "config.json") / "config.json").read_text()


def test_a_local_folder_is_fetched_where_it_is(tmp_path):
    assert fetch(StoragePath.of(tmp_path), "none") == tmp_path


def test_a_copy_is_made_once_and_anew_when_the_marker_differs(store, tmp_path, monkeypatch):
    store.bucket("fetched")
    folder = StoragePath.of(store.uri("fetched/checkpoint"))
    with pytest.raises(FileNotFoundError):
        fetch(folder, "config.json")
    (folder / "weights").write_text("w")
    (folder / "config.json").write_text("1")
    downloads = []
    download = StoragePath.download
    monkeypatch.setattr(StoragePath, "download", lambda self, to: (downloads.append(1), download(self, to))[1])
    first = fetch(folder, "config.json")
    assert fetch(folder, "config.json") == first and len(downloads) == 1
    assert (first / "weights").read_text() == "w" and first.name == "checkpoint"
    (folder / "config.json").write_text("2")
    assert fetch_text(folder) == "2" and len(downloads) == 2
    (folder / "lines.jsonl").write_text("x")
    assert fetch(folder / "lines.jsonl").read_text() == "x"


def test_copies_that_nobody_used_are_removed(store, tmp_path):
    store.bucket("unused")
    first, second = (StoragePath.of(store.uri(f"unused/{name}")) for name in "ab")
    for path in (first, second):
        path.write_text(path.name)
    old = fetch(first)
    os.utime(old.parent, (0, 0))
    assert fetch(second).read_text() == "b"
    assert not old.exists() and fetch(first).read_text() == "a"


def test_processes_share_one_copy(store):
    store.bucket("shared")
    folder = StoragePath.of(store.uri("shared/checkpoint"))
    (folder / "config.json").write_text("whole")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(fetch_text, [folder] * 2) == ["whole"] * 2
    entries = [path for path in (storage.scratch() / "fetched").iterdir() if path.is_dir()]
    assert len(entries) == 1


# ----------------------------------------------------------------------------------------------------------- refusals


def refusal(path):
    with pytest.raises(OSError) as raised:
        StoragePath.of(path).check_writable()
    line = describe(raised.value)
    assert "\n" not in line
    return line


def test_a_bucket_that_is_not_there_is_named(store):
    assert refusal(store.uri("nobucket/runs")) == "s3://nobucket/runs: the storage cannot be written: no such bucket"


def test_a_server_that_is_not_there_is_named():
    line = refusal("s3://bucket/runs?endpoint_override=http://127.0.0.1:1")
    assert line == "s3://bucket/runs: the storage cannot be written: no server answers"


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that answers every request with one error of S3."""

    code = ""

    def refuse(self):
        body = f"<Error><Code>{self.code}</Code><Message>No.</Message></Error>".encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = do_GET = refuse

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("InvalidAccessKeyId", "the credentials are refused"),
        ("SignatureDoesNotMatch", "the credentials are refused"),
        ("AccessDenied", "the credentials may not do this"),
        ("ExpiredToken", "the credentials have expired"),
    ],
)
def test_credentials_that_are_refused_are_one_line(code, words):
    handler = type("Handler", (Refusing,), {"code": code})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = refusal(f"s3://bucket/runs?endpoint_override=http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert line == f"s3://bucket/runs: the storage cannot be written: {words}"


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 0.2)
    held = threading.Event()
    monkeypatch.setattr(StoragePath, "write_bytes", lambda self, data: held.wait(20))
    assert refusal("s3://bucket/runs").endswith("no answer within 0.2 s")
    held.set()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert "the storage cannot be written: Not a directory" in refusal(str(tmp_path / "file" / "runs"))


def test_unknown_errors_keep_their_words():
    assert object_store.reason(OSError("odd\n thing")) == (errno.EIO, "odd thing")
    assert object_store.reason(OSError(errno.ENOSPC, "No space left on device")) == (
        errno.ENOSPC,
        "No space left on device",
    )


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = StoragePath.of(tmp_path / "file")
    file.write_text("before")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.write_text("after")
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_the_module_imports_neither_ray_nor_pyarrow():
    import subprocess
    import sys

    code = "import sys, jobs.storage; print({'ray', 'pyarrow', 'torch'} & set(sys.modules))"
    started = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "set()\n", time.monotonic() - started
