"""The folder of a training run, and what a stage finds and leaves in it.

A *run* is a folder, ``<storage>/<name>``; a stage's part of it is ``<storage>/<name>/<stage>``:

    run.json             the settings that decide the stage's course
    checkpoint_*/        states of the loop, kept by Ray Train
    checkpoint/          the finished CRSM checkpoint; it appears whole, as the stage's last act
    progress.jsonl       what the workers said
    ../tensorboard/<stage>/

The storage is a folder that every node sees, or a prefix in an object store (:mod:`jobs.storage`). Of the latter, nodes
copy what a stage starts from once into their scratch folder; an input that lies on the driver's disk goes there first.

In a job that was submitted with a working directory, which Ray deletes when the job has ended, a relative storage lies
below the place that ``CRSM_STORAGE`` names, and is refused where that is not set.

The same storage and name go on where they stopped: a finished stage gives its result at once, a stopped one resumes
from its last state, and one that was made with other settings is refused; ``--fresh`` puts what is there of a stage
aside first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.job_environment import working_directory
from jobs.storage import StoragePath, fetch

if TYPE_CHECKING:
    from crsm.config import Config

STAGES = ("stage_1", "stage_2", "stage_3", "stage_4")

NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the run; the settings' name if not given. A run goes on."),
]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="PLACE", help="Where runs lie: a folder, s3://… or gs://…; train.storage_path."),
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
"""The place below which runs of submitted jobs lie."""

MARKER = "config.json"
"""The file of a checkpoint that is written last."""

_UNWATCHED = ("log_every", "evaluate_every", "checkpoint_every")
"""Settings of a stage that do not change its course."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished stage."""

    stage: str
    checkpoint: StoragePath
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
    def place(self) -> StoragePath:
        return StoragePath.of(self.folder)

    @property
    def output(self) -> StoragePath:
        return self.place / "checkpoint"


def run_folder(storage: str | Path | StoragePath, name: str) -> StoragePath:
    """The folder of a run.

    Raises:
        ValueError: the name is not that of a folder, or the storage is no place.
    """
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"name = {name!r}; allowed: the name of one folder")
    return storage_root(storage) / name


def storage_root(storage: str | Path | StoragePath) -> StoragePath:
    """The place that ``--storage`` or a setting names.

    Raises:
        ValueError: it is none, or one that would be deleted with the job.
    """
    if isinstance(storage, StoragePath) or "://" in os.fspath(storage):
        return StoragePath.of(storage)
    path = Path(storage).expanduser()
    if path.is_absolute() or working_directory() is None:
        return StoragePath.of(path)
    place = os.environ.get(STORAGE_VARIABLE)
    if not place:
        raise ValueError(
            f"storage = {str(storage)!r} in the working directory of a submitted job, which is deleted with it; "
            f"allowed: an absolute path, s3://… or gs://…, or {STORAGE_VARIABLE} in the runtime environment"
        )
    return StoragePath.of(place) / path.as_posix()


def locate(settings: Config, storage: str | Path | None, name: str | None) -> tuple[str, str]:
    """Storage and name of a run from the options of a job, or else from the settings."""
    return str(storage or settings.train.storage_path), name or settings.name


def previous_checkpoint(stage: str, storage: str | Path, name: str) -> StoragePath:
    """The checkpoint of the nearest earlier stage of the same run.

    Raises:
        ValueError: there is none.
    """
    before = STAGES[: STAGES.index(stage)]
    paths = [run_folder(storage, name) / earlier / "checkpoint" for earlier in reversed(before)]
    for path in paths:
        if (path / MARKER).is_file():
            return path
    raise ValueError(
        f"no checkpoint of {' or '.join(reversed(before))} in {run_folder(storage, name).where}; allowed: run one of "
        "them first, or --checkpoint DIR for another one"
    )


def put_aside(folder: str | Path | StoragePath) -> None:
    """Moves what a stage left, and its curves, to the first free ``<stage>.old-N``."""
    folder = StoragePath.of(folder)
    aside = folder.put_aside()
    curves = folder.parent / "tensorboard" / folder.name
    if aside is not None and curves.exists():
        curves.move(curves.with_name(aside.name))


def resolve(checkpoint: str | Path | StoragePath) -> StoragePath:
    """The place of a checkpoint that is there: a folder, one in a storage, or the name of a shipped one.

    Raises:
        ValueError: there is none.
        OSError: the storage cannot be read.
    """
    from crsm.model import resolve_checkpoint

    place = StoragePath.of(checkpoint) if isinstance(checkpoint, StoragePath) or "://" in str(checkpoint) else None
    if place is None or place.local is not None:
        return StoragePath.of(resolve_checkpoint(str(checkpoint)).resolve())
    if not (place / MARKER).is_file():
        raise ValueError(f"checkpoint = {str(checkpoint)!r}: no {MARKER} there; allowed: a checkpoint's folder")
    return place


def local_copy(checkpoint: str | Path | StoragePath) -> Path:
    """The folder of a checkpoint on this machine; see :func:`jobs.storage.fetch`."""
    return fetch(resolve(checkpoint), MARKER)


def within_reach(source: StoragePath, folder: StoragePath) -> StoragePath:
    """Where the workers of a stage find what it starts from: the source, or its copy in the stage's part of an object
    store, if the source lies on this machine's disk."""
    if source.local is None or folder.local is not None:
        return source
    copy = folder / "input" / weights_hash(source)
    if not (copy / MARKER).is_file():
        copy.upload(source.local, last=MARKER)
    return copy


def read_description(checkpoint: StoragePath) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return dict(json.loads((checkpoint / MARKER).read_text()))


def read_report(work: Work) -> dict[str, Any]:
    return dict(read_description(work.output)["report"][work.stage])


def localised(config: Config) -> Config:
    """The settings with paths in an object store replaced by their copies on this machine."""
    tasks = tuple(
        task.model_copy(update={"attempts_path": str(fetch(StoragePath.of(path)))})
        if (path := getattr(task, "attempts_path", None)) and "://" in path
        else task
        for task in config.tasks
    )
    return config.model_copy(update={"tasks": tasks})


def plain_settings(config: Config, sections: Collection[str]) -> dict[str, Any]:
    """Some sections of the settings as JSON knows them."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name in sections}


def weights_hash(checkpoint: str | Path | StoragePath) -> str:
    """Start of the sha256 of a checkpoint's weights, as its ``config.json`` names it."""
    return str(read_description(resolve(checkpoint))["files"]["model.safetensors"]["sha256"][:16])


def fingerprint(stage: str, config: Config, source: StoragePath | None, rollouts: StoragePath | None) -> dict[str, Any]:
    """The settings and data that decide a stage's course, as plain data."""
    sections = {"seed", "model", "tokenizer", "tasks", stage}
    if stage in ("stage_3", "stage_4"):
        sections |= {"search", "deliberation", "sampling"}
    tree = plain_settings(config, sections)
    if config.train.precision != "fp32":
        tree["train.precision"] = config.train.precision
    tree[stage] = {name: value for name, value in tree[stage].items() if name not in _UNWATCHED}
    if stage == "stage_1":
        tree |= data_identity(config)
    if source is not None:
        tree["input checkpoint"] = weights_hash(source)
    if rollouts is not None:
        tree["roll-outs"] = hashlib.sha256(rollouts.read_bytes()).hexdigest()[:16]
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
        f"{report['tokens_per_second']:,.0f} tokens/s -> {outcome.checkpoint.where}"
    )
