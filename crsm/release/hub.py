"""``crsm push``: an exported folder on the Hugging Face hub, by the hub's own library.

What is uploaded is checked first. A file that is there already is not sent again, so the same call goes on where an
earlier one was interrupted. A repository that holds anything else than this folder is changed only if that was asked
for. The token goes into requests and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from crsm.description import EXPORTED, check_files

ITS_OWN = ".gitattributes"
"""The hub makes it with the repository."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Left over from an earlier export they would be loaded; an update removes them."""


def push_folder(
    folder: str | Path,
    repository: str,
    token: str,
    *,
    update: bool = False,
    public: bool = False,
    message: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Uploads a folder that :mod:`crsm.release.export` wrote; returns the repository's address.

    Args:
        folder: the export.
        repository: ``owner/name``; made, if there is none.
        token: with the right to write there.
        update: whether other content of an existing repository may be replaced.
        public: of a new repository.
        message: of the commit.
        say: is told what happens.

    Raises:
        ValueError: the folder is no whole export, the token is missing or refused, the name is none, or the repository
            holds something else.
        OSError: the hub cannot be reached or broke off; what it has is kept for the next call.
    """
    folder = Path(folder)
    files = check_export(folder)
    if not token:
        raise ValueError("HF_TOKEN is not set; allowed: a token of the hub with write access")
    if repository.count("/") != 1:
        raise ValueError(f"repository = {repository!r}; allowed: OWNER/NAME")
    api = HfApi(token=token)
    try:
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        there = {
            entry.path: entry for entry in api.list_repo_tree(repository, recursive=True) if hasattr(entry, "blob_id")
        }
        changed = sorted(name for name in there if name != ITS_OWN and not _is_same(there[name], folder / name))
        if changed and not update:
            raise ValueError(
                f"{repository} exists and holds another {changed[0]}"
                f"{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}; allowed: a new repository, or --update"
            )
        say(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes, to {repository}")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message or f"Upload {folder.resolve().name}",
            delete_patterns=list(WEIGHTS) if update else None,
        )
    except HFValidationError as error:
        raise ValueError(f"repository = {repository!r}: {_line(error, token)}") from None
    except ValueError:
        raise
    except Exception as error:  # the library lets through what its transport raises, whatever that is
        raise _described(error, repository, token) from None
    return address


def check_export(folder: Path) -> list[Path]:
    """The files of an exported folder.

    Raises:
        ValueError: it is none, or a file of it is missing, cut short or altered.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no folder with a config.json; allowed: what crsm export wrote")
    if (folder / EXPORTED).is_file():
        check_files(folder)
    elif not any(folder.glob("*.safetensors")) or not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder}: no exported weights and tokenizer; allowed: what crsm export wrote")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_same(entry: Any, path: Path) -> bool:
    """Whether a file of the repository is this one."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return bool(blob == entry.blob_id)


def _described(error: BaseException, repository: str, token: str) -> Exception:
    """What went wrong, for a person, and nothing of the token."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            if status in (401, 403):
                return ValueError(
                    f"the hub refused the token of HF_TOKEN for {repository} ({status}); allowed: one with write access"
                )
            return OSError(
                f"the hub answered {status} for {repository}: {_line(cause, token)}; the same command goes on"
            )
    last = list(_causes(error))[-1]
    return OSError(f"upload to {repository} broke off: {_line(last, token)}; the same command goes on")


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException, token: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(token, "…") if token else text
