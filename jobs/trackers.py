"""Where the curves of a training stage go, beside its report: ``train.trackers`` names TensorBoard, W&B or MLflow.

    python -m jobs.pipeline --config configs/nano.yaml --set train.trackers='[tensorboard, wandb]'

Invariants:

* a package is imported only if its tracker is asked for; one that is missing is one line before anything starts;
* a stage that goes on where it stopped goes on with the same run of W&B or MLflow: their ids lie in its folder;
* a tracker that fails is named once and left out from then on: training does not wait for it and does not end with it.

Where W&B and MLflow send their figures is theirs to say (``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_API_KEY``,
``MLFLOW_TRACKING_URI``), on every node that trains. Where nothing is said, MLflow writes ``mlflow.db`` in the run's
folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jobs.storage import StoragePath

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
"""Trackers that need an extra of the same name, and the module that it brings."""
PROJECT = "crsm"
"""What W&B calls the project, and MLflow the experiment, where their own settings name none."""
IDS_FILE = "trackers.json"

Say = Callable[[str], None]


class Tracker(Protocol):
    """Takes the figures of one stage of one run."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name, at a step."""

    def flush(self) -> None:
        """What is written in files is there when this returns."""

    def close(self) -> None:
        """All that was logged is kept when this returns."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """What is tracked."""

    run: str
    stage: str
    folder: Path
    """The run's folder, or, if that is in an object store, one of this machine in its place."""
    step: int = 0
    """From which it goes on; 0: from the beginning."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    """By tracker, of a run that goes on."""


def check_trackers(names: Sequence[str], setting: str, local: bool = True) -> None:
    """Finds out before anything starts what would fail after a minute.

    Args:
        names: the trackers.
        setting: that names them, for the message.
        local: whether the runs lie in a folder, where MLflow can write.

    Raises:
        ValueError: a package is missing, or there is nowhere to write; one line with what is allowed.
    """
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"{setting} names {name!r}, which is not installed; allowed: pip install 'crsm[{name}]'")
    if "mlflow" in names and not local and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            f"{setting} names 'mlflow' and the runs lie in an object store; allowed: MLFLOW_TRACKING_URI of a server"
        )
    if "wandb" in names and _asks_for_key():
        raise ValueError(
            f"{setting} names 'wandb', which has no API key here; allowed: wandb login, WANDB_API_KEY, or "
            "WANDB_MODE=offline"
        )


def _asks_for_key() -> bool:
    """Whether W&B would ask somebody at a terminal."""
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return False
    import wandb

    return not wandb.api.api_key


def read_ids(text: str | None, names: Sequence[str]) -> dict[str, str]:
    """The ids that a run has with its trackers, with new ones where it has none.

    Args:
        text: of :data:`IDS_FILE`; None: there is none yet.
        names: the trackers.
    """
    known: dict[str, str] = {}
    with suppress(ValueError):  # cut short: a new run is better than none
        known = dict(json.loads(text or "{}"))
    return known | {name: uuid.uuid4().hex for name in names if name == "wandb" and name not in known}


class Trackers:
    """Several at once; one that fails is left out."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Say) -> None:
        self._trackers, self._say = dict(trackers), say

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(step, figures))  # type: ignore[misc]

    def flush(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.flush)

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # each has errors of its own kinds
            del self._trackers[name]
            self._say(_lost(name, error))


def open_trackers(names: Sequence[str], tracked: Tracked, say: Say) -> tuple[Trackers, dict[str, str]]:
    """Begins to track, or goes on with the runs of ``tracked.ids``.

    Returns:
        The trackers, and the ids to be kept for the next start.
    """
    opened: dict[str, Tracker] = {}
    ids = dict(tracked.ids)
    for name in names:
        try:
            opened[name] = _KINDS[name](tracked)
        except Exception as error:  # no server, no key: training is worth more
            say(_lost(name, error))
            continue
        found = getattr(opened[name], "run_id", None)
        if found is not None:
            ids[name] = found
    return Trackers(opened, say), ids


def _lost(name: str, error: Exception) -> str:
    return f"{name} fails and is left out: {' '.join(str(error).split()) or type(error).__name__}"


class TensorBoard:
    """Event files in ``tensorboard/<stage>``."""

    def __init__(self, tracked: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(tracked.folder / "tensorboard" / tracked.stage), purge_step=tracked.step + 1
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, of the group ``<run>``."""

    def __init__(self, tracked: Tracked) -> None:
        import wandb

        self.run_id = tracked.ids["wandb"]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run_id,
            resume="allow",
            name=f"{tracked.run}/{tracked.stage}",
            group=tracked.run,
            job_type=tracked.stage,
            config=dict(tracked.settings),
            dir=str(tracked.folder),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def flush(self) -> None:
        pass  # another process writes

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, ``<run>/<stage>``."""

    def __init__(self, tracked: Tracked) -> None:
        quiet_mlflow()
        from mlflow import MlflowClient
        from mlflow.entities import RunStatus

        self._client: Any = MlflowClient(tracking_uri=mlflow_uri(tracked.folder))
        known = tracked.ids.get("mlflow")
        if known is not None:
            self._client.update_run(known, status=RunStatus.to_string(RunStatus.RUNNING))
            self.run_id = known
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run = self._client.create_run(experiment, run_name=f"{tracked.run}/{tracked.stage}")
        self.run_id = str(run.info.run_id)
        for key, value in flat(tracked.settings).items():
            self._client.log_param(self.run_id, key, value)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(name), float(value), now, step) for name, value in figures.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


_KINDS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def mlflow_uri(folder: Path) -> str:
    """Where MLflow writes: ``MLFLOW_TRACKING_URI``, or a file in a folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"


def quiet_mlflow() -> None:
    """To be called before MLflow is imported: it tries for minutes by itself, and says much."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def _mlflow_name(name: str) -> str:
    return name.replace("@", " at ")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


class StageTrackers:
    """The trackers of one start of a stage, and Ray's own metrics, which are always told."""

    def __init__(self, names: Sequence[str], place: StoragePath, settings: Mapping[str, Any], step: int, say: Say):
        """
        Args:
            names: the trackers.
            place: the stage's folder.
            settings: that the trackers show.
            step: from which the stage goes on.
            say: told of a tracker that fails.
        """
        from actors.metrics import Counts

        self._counts, self._stage = Counts(place.parent.name), place.name
        self._run = place.parent
        # A curve grows, and nothing can be added to an object: it is written here and put there now and then.
        self._scratch = Path(tempfile.mkdtemp(prefix="crsm-curves-")) if self._run.local is None else None
        kept = place / IDS_FILE
        known = read_ids(kept.read_text() if kept.is_file() else None, names)
        folder = self._run.local or self._scratch
        assert folder is not None
        tracked = Tracked(self._run.name, place.name, folder, step, settings, known)
        self._trackers, ids = open_trackers(names, tracked, say)
        if ids:
            kept.write_text(json.dumps(ids) + "\n")

    def log(self, point: Mapping[str, float]) -> None:
        """The figures of ``point["step"]``."""
        step = int(point["step"])
        self._trackers.log(step, {name: value for name, value in point.items() if name != "step"})
        for name, metric in _METRICS.items():
            if name in point:
                self._counts.set(metric, point[name], stage=self._stage)

    def keep(self) -> None:
        """Puts what was written where the run lies."""
        if self._scratch is not None:
            self._trackers.flush()
            self._run.upload(self._scratch)

    def close(self) -> None:
        self._trackers.close()
        if self._scratch is not None:
            self._run.upload(self._scratch)
            shutil.rmtree(self._scratch, ignore_errors=True)


_METRICS = {
    "step": "crsm_train_step",
    "loss": "crsm_train_loss",
    "lr": "crsm_train_learning_rate",
    "tokens_per_second": "crsm_train_tokens_per_second",
}


@contextmanager
def trackers_folder(names: Sequence[str], folder: StoragePath) -> Iterator[Path]:
    """A folder of this machine for what trackers write; it lies in ``folder`` afterwards."""
    if folder.local is not None or not names:
        yield folder.local or Path()
        return
    with tempfile.TemporaryDirectory(prefix="crsm-trackers-", ignore_cleanup_errors=True) as scratch:
        try:
            yield Path(scratch)
        finally:
            folder.upload(Path(scratch))


def tune_callbacks(names: Sequence[str], sweep: str, folder: Path) -> list[Any]:
    """What Ray Tune tells of every trial to W&B or MLflow, each trial a run of its own.

    Args:
        names: the trackers.
        sweep: its name: the group of W&B, the experiment of MLflow.
        folder: of this machine, for what trackers write.
    """
    callbacks: list[Any] = []
    for name in names:
        if name == "wandb":
            from ray.air.integrations.wandb import WandbLoggerCallback

            callbacks.append(
                WandbLoggerCallback(
                    project=os.environ.get("WANDB_PROJECT", PROJECT), group=sweep, excludes=["tally"], dir=str(folder)
                )
            )
        elif name == "mlflow":
            quiet_mlflow()
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks.append(MLflowLoggerCallback(tracking_uri=mlflow_uri(folder), experiment_name=sweep))
    return callbacks
