"""Where runs and results lie: a folder of this machine or of a network file system, or an object store.

A :class:`StoragePath` is a value, the same on every machine; what it does is the same for a folder and for a bucket:

* a file is written whole or not at all (a folder: a temporary file and a rename; a bucket: one put);
* a folder that was uploaded *appears whole*: one of its files is written last, and who finds that file finds the rest;
* nothing waits for ever: connections and attempts are bounded, and :func:`StoragePath.check_writable` answers within
  ``object_store.PATIENCE``, in one line;
* a local path is used where it is and never copied.

Object stores are those of pyarrow: ``s3://bucket/prefix`` and ``gs://bucket/prefix``. A server that speaks S3 is named
by ``AWS_ENDPOINT_URL``, or in the path, where it stays with the path on every machine:
``s3://bucket/prefix?endpoint_override=http://host:9000&region=eu-1``. Credentials are those of the machine (its
environment, ``~/.aws``, its role); they are never part of a path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import posixpath
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jobs import object_store

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")

_CHUNK = 16 << 20
_UNUSED = 24 * 3600.0
"""Seconds after which a downloaded copy that nobody used is removed."""


@dataclass(frozen=True, slots=True)
class StoragePath:
    """A file or folder in a storage."""

    path: str
    """Of a folder of this machine: absolute. Of a bucket: ``bucket/prefix``."""
    scheme: str = ""
    """``s3`` or ``gs``; empty: a folder of this machine."""
    query: str = ""
    """Options of the server, as they stand behind the ``?``."""

    @classmethod
    def of(cls, place: str | Path | StoragePath) -> StoragePath:
        """What a user wrote; a relative path lies below the present folder.

        Raises:
            ValueError: no path of a folder and none of a known object store, or options that are not known.
        """
        if isinstance(place, StoragePath):
            return place
        text = os.fspath(place)
        if isinstance(place, Path) or "://" not in text:
            if not text:
                raise ValueError("storage = ''; allowed: a folder, or s3://… or gs://…")
            return cls(str(Path(text).expanduser().resolve()))
        scheme, _, rest = text.partition("://")
        path, _, query = rest.partition("?")
        if scheme == "file" and path.startswith("/") and not query:
            return cls(str(Path(path).resolve()))
        path = posixpath.normpath(path).strip("/") if path.strip("/") else ""
        if scheme not in object_store.SCHEMES or not path or path.startswith("."):
            raise ValueError(f"storage = {text!r}; allowed: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
        if "@" in path.split("/", 1)[0]:
            raise ValueError(f"storage = {scheme}://…: credentials in a path; allowed: in the environment")
        return cls(path, scheme, object_store.normal_query(scheme, query, text))

    # ---------------------------------------------------------------- names

    def __str__(self) -> str:
        return self.where + (f"?{self.query}" if self.query else "")

    @property
    def where(self) -> str:
        """As a person reads it: without the options."""
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> StoragePath:
        return replace(self, path=posixpath.dirname(self.path))

    @property
    def local(self) -> Path | None:
        """The path, if it is one of this machine or of a file system that is mounted here."""
        return None if self.scheme else Path(self.path)

    def __truediv__(self, name: str) -> StoragePath:
        return replace(self, path=posixpath.join(self.path, name))

    def with_name(self, name: str) -> StoragePath:
        return self.parent / name

    # ---------------------------------------------------------------- what is there

    def is_file(self) -> bool:
        if not self.scheme:
            return os.path.isfile(self.path)
        with self._named_errors():
            return bool(self._info().is_file)

    def exists(self) -> bool:
        """Whether there is such a file, or such a folder: in an object store, anything that lies in it."""
        if not self.scheme:
            return os.path.exists(self.path)
        from pyarrow.fs import FileType

        with self._named_errors():
            return bool(self._info().type != FileType.NotFound)

    def iterdir(self) -> list[StoragePath]:
        """What lies directly in a folder, by name; nothing if there is no such folder."""
        if not self.scheme:
            names = os.listdir(self.path) if os.path.isdir(self.path) else []
        else:
            with self._named_errors():
                names = [posixpath.basename(info.path) for info in self._infos(recursive=False)]
        return [self / name for name in sorted(names)]

    # ---------------------------------------------------------------- files

    def read_bytes(self) -> bytes:
        """
        Raises:
            OSError: naming the path; a FileNotFoundError if there is no such file.
        """
        if not self.scheme:
            return Path(self.path).read_bytes()
        with self._named_errors(), self._filesystem().open_input_stream(self.path) as file:
            return bytes(file.read())

    def read_text(self) -> str:
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, data: bytes) -> None:
        """Writes a file, whole or not at all; folders on the way are made.

        Raises:
            OSError: naming the path.
        """
        if self.scheme:
            with self._named_errors(), self._filesystem().open_output_stream(self.path) as file:
                file.write(data)
            return
        with self._named_errors(), _replaced(Path(self.path)) as temporary, open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode("utf-8"))

    # ---------------------------------------------------------------- folders

    def upload(self, source: Path, last: str | None = None) -> None:
        """Copies a local file or folder here; what lay here of the same name is replaced, other files stay.

        Args:
            source: the file or folder.
            last: the file of a folder that is written after all others; who finds it here finds the rest.

        Raises:
            OSError: naming the path.
        """
        if source.is_file():
            self._put(source)
            return
        files = sorted(path for path in source.rglob("*") if path.is_file())
        marker = None if last is None else source / last
        if marker is not None and marker not in files:
            raise ValueError(f"last = {last!r}; allowed: a file in {source}")
        for path in files:
            if path != marker:
                (self / path.relative_to(source).as_posix())._put(path)
        if marker is not None and last is not None:
            (self / last)._put(marker)

    def download(self, target: Path) -> None:
        """Copies this file or folder to a local path, where it appears whole.

        Raises:
            OSError: naming the path; a FileNotFoundError if there is nothing.
        """
        with self._named_errors(), _replaced(target) as temporary:
            if not self.scheme:
                if os.path.isdir(self.path):
                    temporary.unlink()
                    shutil.copytree(self.path, temporary)
                else:
                    shutil.copyfile(self.path, temporary)
                return
            from pyarrow.fs import FileType, LocalFileSystem, copy_files

            kind = self._info().type
            if kind == FileType.NotFound:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if kind == FileType.Directory:
                temporary.unlink()
                temporary.mkdir()
            copy_files(self.path, str(temporary), self._filesystem(), LocalFileSystem(), chunk_size=_CHUNK)

    def move(self, target: StoragePath) -> None:
        """Renames a file or folder. In an object store it is copied by the server, then deleted: what was there stays
        whole until the copy is.

        Raises:
            ValueError: the other path lies in another storage.
            OSError: naming the path.
        """
        if (self.scheme, self.query) != (target.scheme, target.query):
            raise ValueError(f"{self} cannot be moved to {target}; allowed: a path in the same storage")
        with self._named_errors():
            if not self.scheme:
                Path(target.path).parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.path, target.path)
                return
            filesystem = self._filesystem()
            if self._info().is_file:
                filesystem.move(self.path, target.path)
                return
            files = [info.path for info in self._infos(recursive=True) if info.is_file]
            for path in files:
                filesystem.copy_file(path, target.path + path.removeprefix(self.path))
            # What says that a run is there goes first: an end half-way leaves no run that looks whole.
            for path in sorted(files, key=lambda path: path.count("/")):
                filesystem.delete_file(path)
            self.delete()

    def delete(self) -> None:
        """Deletes a file, or a folder with all that is in it; nothing happens if there is none."""
        with self._named_errors():
            if not self.scheme:
                if os.path.isdir(self.path):
                    shutil.rmtree(self.path)
                else:
                    Path(self.path).unlink(missing_ok=True)
                return
            info = self._info()
            if info.is_file:
                self._filesystem().delete_file(self.path)
            elif self.exists():
                self._filesystem().delete_dir(self.path)

    def put_aside(self) -> StoragePath | None:
        """Moves what is there to the first free ``<name>.old-N``; None: there was nothing."""
        if not self.exists():
            return None
        taken = {path.name for path in self.parent.iterdir()}
        free = next(n for n in range(1, 1 << 20) if f"{self.name}.old-{n}" not in taken)
        target = self.with_name(f"{self.name}.old-{free}")
        self.move(target)
        return target

    # ---------------------------------------------------------------- whether it can be used

    def check_writable(self) -> None:
        """Makes the folder and writes into it, now and not after an hour.

        Raises:
            OSError: naming the path and the reason.
        """
        if not self.scheme:
            try:
                os.makedirs(self.path, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.path):
                    pass
            except OSError as error:
                raise OSError(error.errno, f"the storage cannot be written: {error.strerror}", self.path) from error
            return
        probe = self / f".probe-{uuid.uuid4().hex}"

        def try_it() -> None:
            probe.write_bytes(b"")
            probe.delete()

        try:
            _within(object_store.PATIENCE, try_it)
        except OSError as error:
            what = f"the storage cannot be written: {error.strerror}"
            raise OSError(error.errno, what, self.where) from error

    def for_ray(self) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """``storage_path`` and ``storage_filesystem`` as Ray Train and Ray Tune want them."""
        return self.path, self._filesystem() if self.scheme else None

    # ---------------------------------------------------------------- pyarrow

    def _filesystem(self) -> pyarrow.fs.FileSystem:
        return object_store.connect(self.scheme, self.query, self.path.split("/", 1)[0])

    def _info(self) -> pyarrow.fs.FileInfo:
        return self._filesystem().get_file_info(self.path)

    def _infos(self, recursive: bool) -> list[pyarrow.fs.FileInfo]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.path, allow_not_found=True, recursive=recursive)
        return list(self._filesystem().get_file_info(selector))

    def _put(self, source: Path) -> None:
        with self._named_errors():
            if not self.scheme:
                with _replaced(Path(self.path)) as temporary:
                    shutil.copyfile(source, temporary)
                return
            from pyarrow.fs import LocalFileSystem, copy_files

            # Not in threads: https://github.com/apache/arrow/issues/32372
            options: dict[str, Any] = {"chunk_size": _CHUNK, "use_threads": False}
            copy_files(str(source), self.path, LocalFileSystem(), self._filesystem(), **options)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of the storage name the path, and say in a few words what pyarrow says in many."""
        try:
            yield
        except OSError as error:
            if not self.scheme and error.filename is not None:
                raise
            reason = error.strerror if error.errno is not None and error.filename is not None else None
            number, text = object_store.reason(error)
            raise type(error)(number, reason or text, self.where) from error


# ------------------------------------------------------------------------------------------------------------- scratch


def fetch(place: StoragePath, marker: str | None = None) -> Path:
    """A local path with what lies at ``place``: the place itself, or a copy that all processes of this machine share.

    Args:
        place: a file, or a folder that is not changed any more.
        marker: the file that says what a folder holds; another content is another folder.

    Raises:
        OSError: naming the path; a FileNotFoundError if there is nothing.
    """
    if place.local is not None:
        return place.local
    if marker is None:
        with place._named_errors():
            info = place._info()
        version = f"{info.size} {info.mtime_ns}".encode()
    else:
        version = (place / marker).read_bytes()
    key = hashlib.sha256(str(place).encode() + b"\0" + version).hexdigest()[:32]
    base = scratch() / "fetched"
    base.mkdir(parents=True, exist_ok=True)
    entry = base / key
    with open(base / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait for it
        if not entry.exists():
            place.download(entry / place.name)
        os.utime(entry)
    _remove_unused(base, keep=entry)
    return entry / place.name


def scratch() -> Path:
    """The folder of this user for copies on this machine: ``CRSM_SCRATCH``, or one among the temporary files."""
    path = Path(os.environ.get("CRSM_SCRATCH") or Path(tempfile.gettempdir()) / f"crsm-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _remove_unused(base: Path, keep: Path) -> None:
    for entry in base.iterdir():
        with contextlib.suppress(OSError):
            if entry.is_dir() and entry != keep and time.time() - entry.stat().st_mtime > _UNUSED:
                shutil.rmtree(entry)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call, or a TimeoutError; the call is left to itself then."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="storage", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s")
    return outcome[0]


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place when the block is left without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        if temporary.is_file():
            mask = os.umask(0o077)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
