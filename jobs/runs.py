"""The folder of a training run, and what a stage finds and leaves in it.

A *run* is a folder, ``<storage>/<name>``; a stage's part of it is ``<storage>/<name>/<stage>``:

    run.json             the settings that decide the stage's course
    checkpoint_*/        states of the loop, kept by Ray Train
    checkpoint/          the finished CRSM checkpoint; it appears whole, as the stage's last act
    progress.jsonl       what the worker said, for whoever watches
    ../tensorboard/<stage>/

In a job that was submitted with a working directory, which Ray deletes when the job has ended, a relative storage lies
below the folder that ``CRSM_STORAGE`` names, and is refused where that is not set.

The same storage and name go on where they stopped: a finished stage gives its result at once, a stopped one resumes
from its last state, and one that was made with other settings is refused; ``--fresh`` puts what is there of a stage
aside first. The storage must be a folder that every node sees.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.job_environment import working_directory

if TYPE_CHECKING:
    from crsm.config import Config

STAGES = ("stage_1", "stage_2", "stage_3", "stage_4")

NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the run; the settings' name if not given. A run goes on."),
]
StorageOption = Annotated[
    Path | None,
    typer.Option("--storage", metavar="DIR", help="Where runs lie; train.storage_path if not given."),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="DIR", help="Where to start; the previous stage of the run if not given."),
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh/--resume", help="Put aside what this run has of the stage and start anew, or go on where it stopped."
    ),
]

STORAGE_VARIABLE = "CRSM_STORAGE"
"""The folder below which runs of submitted jobs lie."""

PROGRESS_FILE = "progress.jsonl"

_UNWATCHED = ("log_every", "evaluate_every", "checkpoint_every")
"""Settings of a stage that do not change its course."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished stage."""

    stage: str
    checkpoint: Path
    report: dict[str, Any]
    """This stage's part of the checkpoint's report."""
    had_finished: bool
    """Nothing was trained: an earlier start had finished it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker is told."""

    stage: str
    config: dict[str, Any]
    input_checkpoint: str | None
    folder: str
    rollouts: str | None
    fingerprint: dict[str, Any]
    commit: str

    @property
    def output(self) -> Path:
        return Path(self.folder) / "checkpoint"


def run_folder(storage: str | Path, name: str) -> Path:
    """The folder of a run.

    Raises:
        ValueError: the name is not that of a folder, or the storage is not a folder's path.
    """
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"name = {name!r}; allowed: the name of one folder")
    if "://" in str(storage):
        raise ValueError(f"storage = {str(storage)!r}; allowed: a folder that every node sees")
    path = Path(storage).expanduser()
    if not path.is_absolute() and working_directory() is not None:
        place = os.environ.get(STORAGE_VARIABLE)
        if not place:
            raise ValueError(
                f"storage = {str(storage)!r} in the working directory of a submitted job, which is deleted with it; "
                f"allowed: an absolute path, or {STORAGE_VARIABLE} in the runtime environment"
            )
        path = Path(place).expanduser() / path
    return path.resolve() / name


def check_writable(folder: Path) -> None:
    """Makes a folder and writes into it, now and not after an hour.

    Raises:
        OSError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"the storage cannot be written: {error.strerror}", str(folder)) from error


def locate(settings: Config, storage: Path | None, name: str | None) -> tuple[Path, str]:
    """Storage and name of a run from the options of a job, or else from the settings."""
    return storage or Path(settings.train.storage_path), name or settings.name


def previous_checkpoint(stage: str, storage: str | Path, name: str) -> Path:
    """The checkpoint of the nearest earlier stage of the same run.

    Raises:
        ValueError: there is none.
    """
    before = STAGES[: STAGES.index(stage)]
    paths = [run_folder(storage, name) / earlier / "checkpoint" for earlier in reversed(before)]
    for path in paths:
        if (path / "config.json").is_file():
            return path
    raise ValueError(
        f"no checkpoint of {' or '.join(reversed(before))} in {run_folder(storage, name)}; allowed: run one of them "
        "first, or --checkpoint DIR for another one"
    )


def put_aside(folder: Path) -> None:
    """Moves what a stage left, and its curves, to the first free ``<stage>.old-N``."""
    if not folder.exists():
        return
    free = next(n for n in range(1, 1 << 20) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    folder.rename(folder.with_name(f"{folder.name}.old-{free}"))
    curves = folder.parent / "tensorboard" / folder.name
    if curves.exists():
        curves.rename(curves.with_name(f"{folder.name}.old-{free}"))


def resolve(checkpoint: str | Path) -> Path:
    from crsm.model import resolve_checkpoint

    return resolve_checkpoint(checkpoint).resolve()


def read_report(work: Work) -> dict[str, Any]:
    description = json.loads((work.output / "config.json").read_text(encoding="utf-8"))
    return dict(description["report"][work.stage])


def plain_settings(config: Config, sections: Collection[str]) -> dict[str, Any]:
    """Some sections of the settings as JSON knows them."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name in sections}


def weights_hash(checkpoint: str | Path) -> str:
    """Start of the sha256 of a checkpoint's weights, as its ``config.json`` names it."""
    description = json.loads((resolve(checkpoint) / "config.json").read_text(encoding="utf-8"))
    return str(description["files"]["model.safetensors"]["sha256"][:16])


def fingerprint(stage: str, config: Config, source: Path | None, rollouts: Path | None) -> dict[str, Any]:
    """The settings and data that decide a stage's course, as plain data."""
    sections = {"seed", "model", "tokenizer", "tasks", stage}
    if stage in ("stage_3", "stage_4"):
        sections |= {"search", "deliberation", "sampling"}
    tree = plain_settings(config, sections)
    tree[stage] = {name: value for name, value in tree[stage].items() if name not in _UNWATCHED}
    if stage == "stage_1":
        tree |= data_identity(config)
    if source is not None:
        tree["input checkpoint"] = weights_hash(source)
    if rollouts is not None:
        with open(rollouts, "rb") as file:
            tree["roll-outs"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return dict(json.loads(json.dumps(tree)))


def data_identity(config: Config) -> dict[str, str]:
    """What the settings name by a path: the tokens of shards, the entries of a tokenizer."""
    found = {}
    if config.stage_1.text is not None:
        from crsm.data.shards import open_shards

        # Sizes only: workers compare the hashes.
        found["text shards"] = open_shards(config.stage_1.text.shards, verify=False).identity[:16]
    if config.tokenizer.path is not None:
        from crsm.data.tokenizer import Tokenizer

        found["tokenizer file"] = Tokenizer.adopt(config.tokenizer.path).fingerprint[:16]
    return found


def describe_outcome(outcome: Outcome) -> str:
    """A finished stage in one line."""
    report = outcome.report
    how = "had finished" if outcome.had_finished else "finished"
    loss = report.get("loss")
    figures = "" if loss is None else f", loss {loss:.4g}"
    return (
        f"{outcome.stage} {how}: {report['steps']} steps in {report['seconds']:.0f} s{figures}, "
        f"{report['tokens_per_second']:,.0f} tokens/s -> {outcome.checkpoint}"
    )
