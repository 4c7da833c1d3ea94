"""A stand-in of the hub: the part of its HTTP interface that an upload uses, served for real on a local port.

It keeps repositories in memory, checks what the hub checks (the token and its rights, that a large file's content has
the hash that it was announced with, that a commit names only large files that are there, that the card's header is
YAML), and can be told to break off in the middle of a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LARGE = ".safetensors"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """Runs from ``with`` on; ``address`` is its endpoint."""

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]) -> None:
        """
        Args:
            tokens: rights by token, ``write`` or ``read``.
        """
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        """Contents of large files by sha256; a commit refers to them."""
        self.puts: Counter[str] = Counter()
        """Whole contents received, by sha256."""
        self.requests: list[tuple[str, str]] = []
        self.authorizations: set[str | None] = set()
        self.hold_at: str | None = None
        """sha256 of a large file of which only the first half is ever read."""
        self.held = threading.Event()
        self.failing: dict[str, int] = {}
        """Statuses to answer with, by the beginning of a path."""
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.requests.append((method, path))
        if upload := re.fullmatch(r"/storage/([0-9a-f]{64})", path):  # signed addresses carry no token
            return self._store(upload[1])
        body = self._body()
        authorization = self.headers.get("Authorization")
        with self.server.lock:
            self.server.authorizations.add(authorization)
        rights = self.server.tokens.get((authorization or "").removeprefix("Bearer "))
        for prefix, status in self.server.failing.items():
            if path.startswith(prefix):
                return self._answer(status, {"error": "told to fail"})
        if rights is None:
            return self._answer(
                401,
                {"error": "Invalid credentials in Authorization header"},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        if method == "POST" and rights != "write":
            message = "You don't have the rights to create a model under this namespace"
            return self._answer(403, {"error": message}, {"X-Error-Message": message})
        for pattern, handle in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/([^/]+/[^/]+)/tree/main", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
            (r"/api/models/([^/]+/[^/]+?)(?:/revision/main)?", self._info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/verify", self._verify),
        ):
            if match := re.fullmatch(pattern, path):
                return handle(body, *match.groups())
        return self._answer(404, {"error": f"the stand-in does not know {path}"})

    # ------------------------------------------------------------------------------------------------ repositories

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        with self.server.lock:
            exists = name in self.server.repositories
            if not exists:
                self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        self._answer(409 if exists else 200, {"url": f"{self.server.address}/{name}", "name": name})

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def _info(self, body: bytes, name: str) -> None:
        if repository := self._repository(name):
            siblings = [{"rfilename": path} for path in repository.files]
            self._answer(200, {"id": name, "sha": self._head(repository), "siblings": siblings, "tags": []})

    def _tree(self, body: bytes, name: str) -> None:
        if repository := self._repository(name):
            self._answer(200, [self._entry(path, content) for path, content in repository.files.items()])

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _head(self, repository: Repository) -> str:
        return hashlib.sha1(repr(repository.commits).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------------ upload

    def _validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        header = text.split("---")[1] if text.startswith("---") else ""
        try:
            found = yaml.safe_load(header)
        except yaml.YAMLError as error:
            return self._answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        warnings = [] if isinstance(found, dict) and "license" in found else [{"message": "empty or missing yaml"}]
        self._answer(200, {"errors": [], "warnings": warnings})

    def _preupload(self, body: bytes, name: str) -> None:
        if repository := self._repository(name):
            files = [
                {
                    "path": (path := file["path"]),
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": self._oid(path, repository.files[path]) if path in repository.files else None,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})

    def _oid(self, path: str, content: bytes) -> str:
        return _sha256(content) if path.endswith(LARGE) else _blob(content)

    def _batch(self, body: bytes, name: str) -> None:
        if self._repository(name):
            objects = []
            for asked in json.loads(body)["objects"]:
                entry = dict(asked)
                if asked["oid"] not in self.server.large:
                    entry["actions"] = {
                        "upload": {"href": f"{self.server.address}/storage/{asked['oid']}"},
                        "verify": {"href": f"{self.server.address}/verify"},
                    }
                objects.append(entry)
            self._answer(
                200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}
            )

    def _store(self, oid: str) -> None:
        if self.server.hold_at == oid:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.server.held.set()
            self.rfile.read()  # until the other side gives up; what came so far is lost, as on the hub
            return
        content = self._body()
        if _sha256(content) != oid:
            return self._answer(400, {"error": "the content has another hash"})
        with self.server.lock:
            self.server.large[oid] = content
            self.server.puts[oid] += 1
        self._answer(200, {})

    def _verify(self, body: bytes) -> None:
        asked = json.loads(body)
        whole = len(self.server.large.get(asked["oid"], b"")) == asked["size"]
        self._answer(200 if whole else 404, {})

    def _commit(self, body: bytes, name: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        files, summary = dict(repository.files), ""
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            match change["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.server.large:
                        return self._answer(400, {"error": f"{value['path']} was never uploaded"})
                    files[value["path"]] = self.server.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        with self.server.lock:
            repository.files = files
            repository.commits.append(summary)
        oid = self._head(repository)
        self._answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid})

    # -------------------------------------------------------------------------------------------------------- HTTP

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, tree: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
