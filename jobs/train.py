"""Runs a training stage on Ray Train: the driver's side. The workers' side is :mod:`jobs.train_worker`.

:mod:`jobs.runs` says what a run is, how it goes on, and what it leaves where.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jobs import train_worker
from jobs.command import commit
from jobs.runs import (
    MARKER,
    STAGES,
    Outcome,
    Work,
    check_source,
    fingerprint,
    read_report,
    resolve,
    run_folder,
    within_reach,
)
from jobs.storage import StoragePath
from jobs.trackers import check_trackers
from jobs.train_progress import failure_callback, start_board, watched

if TYPE_CHECKING:
    from ray.train import UserCallback

    from crsm.config import Config

_MAX_FAILED_STARTS, _START_TIMEOUT = 3, 180
"""Times that workers may fail to start, and seconds until they have a place: a node may have to be started for them.
Ray Train's own default tries for ever."""
_MAX_FAILED_ELASTIC_STARTS, _ELASTIC_START_TIMEOUT = 100, 15
"""Elastic workers are started where there is room already; that a node is gone is known up to 20 s late."""


def train_stage(
    stage: str,
    config: Config,
    input_checkpoint: str | Path | StoragePath | None,
    storage_path: str | Path,
    run_name: str,
    *,
    rollouts: StoragePath | None = None,
    folder_name: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> Outcome:
    """Trains one stage to its end, going on where an earlier start stopped.

    Args:
        stage: ``stage_1`` to ``stage_4``.
        config: all settings.
        input_checkpoint: what the stage starts from; None only for stage 1, which then makes a new model.
        storage_path: where runs lie.
        run_name: this run.
        rollouts: the data of stage 3.
        folder_name: the stage's folder inside the run; None: its name.
        callbacks: of Ray Train, in its controller.

    Raises:
        ValueError: the input does not fit, the run was begun with other settings, or the cluster is too small.
        FloatingPointError: training left the finite numbers.
        OSError: the storage is full or cannot be written.
    """
    if stage not in STAGES:
        raise ValueError(f"stage = {stage!r}; allowed: {', '.join(STAGES)}")
    check_source(stage, config, input_checkpoint)
    folder = run_folder(storage_path, run_name) / (folder_name or stage)
    source = None if input_checkpoint is None else resolve(input_checkpoint)
    work = Work(
        stage=stage,
        config=config.model_dump(mode="json"),
        input_checkpoint=None if source is None else str(source),
        folder=str(folder),
        rollouts=None if rollouts is None else str(rollouts),
        fingerprint=fingerprint(stage, config, source, rollouts),
        commit=commit(),
    )
    check_trackers(config.train.trackers, "train.trackers", folder.local is not None)
    folder.check_writable()
    begun = folder / "run.json"
    if begun.is_file():
        from crsm.training.loop import check_fingerprint

        try:
            check_fingerprint(json.loads(begun.read_text()), work.fingerprint, folder.where)
        except ValueError as error:
            raise ValueError(f"{error}; allowed: the same settings, another --name, or --fresh") from error
    else:
        begun.write_text(json.dumps(work.fingerprint, indent=1, ensure_ascii=False) + "\n")
    if not (work.output / MARKER).is_file():
        _require_workers(work, config)
        if source is not None:
            work = dataclasses.replace(work, input_checkpoint=str(within_reach(source, folder)))
        with cluster():
            _fit(work, config, callbacks)
        if not (work.output / MARKER).is_file():
            raise RuntimeError(f"{stage} ended without a checkpoint at {work.output}")
        return Outcome(stage, work.output, read_report(work), had_finished=False)
    return Outcome(stage, work.output, read_report(work), had_finished=True)


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """A Ray session: the one that is there, the cluster that ``RAY_ADDRESS`` names, or a new one on this machine.

    What was not started here is left running. What a stage has to say comes through :mod:`jobs.train_progress`, and
    what goes wrong as an exception; Ray's own processes write their logs where Ray keeps them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train moves its workers to a folder of its own; relative paths in the settings mean the folder of the command.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how late the end of a stage is noticed
    from actors.cluster import start_ray

    with start_ray():
        yield


def require_resources(need: Mapping[str, float], what: str) -> None:
    """:func:`actors.cluster.require_resources`, for jobs that import no Ray before they have parsed."""
    from actors.cluster import require_resources as require

    require(need, what)


def _require_workers(work: Work, config: Config) -> None:
    settings = config.train
    least = float(settings.workers if settings.min_workers is None else settings.min_workers)
    need = {"CPU": least} | ({"GPU": least} if settings.use_gpu else {})
    which = f"train.workers = {settings.workers}"
    if settings.min_workers is not None:
        which = f"train.min_workers = {settings.min_workers}"
    require_resources(need, f"{work.stage} with {which}")


def _fit(work: Work, config: Config, callbacks: Sequence[UserCallback]) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    settings = config.train
    _require_workers(work, config)
    path, filesystem = work.place.parent.for_ray()
    board = start_board()
    elastic = settings.min_workers is not None and settings.min_workers < settings.workers
    starts, timeout = (
        (_MAX_FAILED_ELASTIC_STARTS, _ELASTIC_START_TIMEOUT) if elastic else (_MAX_FAILED_STARTS, _START_TIMEOUT)
    )
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(timeout))
    trainer = TorchTrainer(
        train_worker.train,
        train_loop_config={"work": dataclasses.asdict(work), "board": board},
        scaling_config=ScalingConfig(
            num_workers=(settings.min_workers, settings.workers) if elastic else settings.workers,
            use_gpu=settings.use_gpu,
            elastic_resize_monitor_interval_s=settings.resize_seconds,
        ),
        run_config=RunConfig(
            name=work.place.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.max_failures, controller_failure_limit=starts),
            callbacks=[failure_callback(board, settings.max_failures), *callbacks],
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    steps = int(work.config[work.stage]["steps"])
    workers = f"{settings.min_workers} to {settings.workers} workers" if elastic else _workers(settings.workers)
    with watched(board, work.stage, steps, workers, work.place), _own_interrupt():
        try:
            failure = trainer.fit().return_value
        except TrainingFailedError as error:
            _raise_cause(error)
    if failure:
        raise {"FloatingPointError": FloatingPointError, "ValueError": ValueError}[failure["kind"]](failure["message"])


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _raise_cause(error: Exception) -> NoReturn:
    """Raises what went wrong in a worker as what it is, where the user or the machine can do something about it."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, OSError) and failure.errno is not None:
            raise OSError(failure.errno, failure.strerror, failure.filename) from error
        for kind in (OSError, ValueError, FloatingPointError):
            if isinstance(failure, kind):
                raise kind(str(failure)) from error
    raise error


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ray Train takes over Ctrl-C, keeps it, and leaves with status 0; here it stays an interruption."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def one_line_failure() -> Iterator[None]:
    """Training that left the finite numbers is one line and status 1, not a traceback."""
    try:
        yield
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None
