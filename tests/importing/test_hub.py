"""Models of the hub, against a server on this machine that answers as the hub does."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from crsm.importing import import_checkpoint, locate_source, locate_tokenizer
from tests.importing.sources import random_model, save_hugging_face, save_mamba_ssm, tokenizer_json

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(BaseHTTPRequestHandler):
    """``root`` holds ``<organisation>/<model>/<file>``."""

    root = None
    asked: list

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def _answer(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and (folder := self.root.joinpath(*parts[2:4])).is_dir():
            files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            body = json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": files}).encode()
            return self._send(body, {"content-type": "application/json"})
        if parts[2:3] == ["resolve"] and (file := self.root.joinpath(*parts[:2], parts[4])).is_file():
            if self.command == "GET":
                self.asked.append(f"{parts[1]}/{parts[4]}@{parts[3]}")
            body = file.read_bytes()
            return self._send(body, {"etag": f'"{hashlib.sha1(body).hexdigest()}"', "x-repo-commit": COMMIT})
        self._send(b"{}", {"x-error-code": "RepoNotFound"}, status=404)

    def _send(self, body, headers, status=200):
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def public(tmp_path, monkeypatch):
    """The folder of the hub's models, and what was downloaded from it."""
    handler = type("OneHub", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with contextlib.closing(server.socket):
        yield tmp_path / "hub", handler.asked
        server.shutdown()
        thread.join()


def test_a_public_name_of_mamba_ssm_comes_with_gpt_neoxs_tokenizer(public):
    root, asked = public
    folder = save_mamba_ssm(random_model(tie_word_embeddings=True), root / "state-spaces" / "mamba2-tiny")
    (folder / "tokenizer.json").unlink()
    (folder / "README.md").write_text("not needed")
    (root / "EleutherAI" / "gpt-neox-20b").mkdir(parents=True)
    (root / "EleutherAI" / "gpt-neox-20b" / "tokenizer.json").write_text(tokenizer_json())
    found = locate_source("state-spaces/mamba2-tiny")
    tokenizer = locate_tokenizer(None, "state-spaces/mamba2-tiny", found)
    assert import_checkpoint(found, tokenizer, name="tiny").report["import"]["layout"] == "mamba-ssm"
    assert asked == [
        f"mamba2-tiny/config.json@{COMMIT}",
        f"mamba2-tiny/pytorch_model.bin@{COMMIT}",
        f"gpt-neox-20b/tokenizer.json@{COMMIT}",
    ]


def test_shards_are_fetched_and_what_is_not_read_is_not(public):
    root, asked = public
    folder = save_hugging_face(random_model(), root / "someone" / "mamba2-hf", max_shard_size="40KB")
    (folder / "pytorch_model.bin").write_bytes(b"the same again")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    found = locate_source("someone/mamba2-hf", revision="v1")
    import_checkpoint(found, locate_tokenizer(None, "someone/mamba2-hf", found), name="hf")
    names = ["config.json", "model.safetensors.index.json", *shards, "tokenizer.json"]
    assert asked == [f"mamba2-hf/{name}@{COMMIT}" for name in names]
    assert len(shards) > 1


def test_what_the_hub_does_not_have_is_named(public):
    root, _ = public
    with pytest.raises(ValueError, match="'state-spaces/mamba2-9b' is no folder here, and cannot be fetched from the"):
        locate_source("state-spaces/mamba2-9b")
    folder = save_mamba_ssm(random_model(), root / "state-spaces" / "mamba2-tiny")
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder here"):
        locate_tokenizer("nobody/nothing", "anything", folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"mamba2-tiny on the hub has no weights; allowed: model\.safetensors, "):
        locate_source("state-spaces/mamba2-tiny")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"mamba2-tiny on the hub has no config\.json; allowed"):
        locate_source("state-spaces/mamba2-tiny")


def test_without_the_extra_a_name_is_refused_with_the_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs the extra `hub` \(pip install 'crsm\[hub\]'\); allowed: a folder"):
        locate_source("state-spaces/mamba2-130m")
