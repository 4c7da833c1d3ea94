"""Trains a peer on the rows that a checkpoint saw, in one or several processes of this machine, and goes on from where
it was."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.checkpoints import load_with_settings
from jobs.command import Progress

if TYPE_CHECKING:
    from crsm.model import Checkpoint
    from crsm.training.loop import LoopState, Point, StageResult
    from jobs.peers.language_models import PeerStage

_PATIENCE = timedelta(minutes=20)
"""How long a worker waits for the others; ``torch.compile`` needs some of it."""


@dataclass(frozen=True, slots=True)
class PeerTraining:
    """What a process has to know to train its part."""

    peer: str
    checkpoint: str
    config: Path | None
    overrides: list[str] | None
    seed: int | None
    folder: Path
    """Where the state is kept."""
    workers: int = 1
    threads: int = 1
    """Of torch, in each worker."""
    compiled: bool = True


def train_peer(training: PeerTraining) -> tuple[PeerStage, StageResult]:
    """Trains to the last step. Nothing is left to do where an earlier start has come to it.

    Raises:
        ValueError: as :func:`jobs.checkpoints.load_with_settings`, and for a state of other settings.
        RuntimeError: a worker has failed or died; the last state is kept.
    """
    if training.workers > 1:
        loaded = _load(training)
        state = _state(training, loaded)
        if state is None or state.step < loaded.config.stage_1.steps:
            _train_in_processes(training)
    return _train_part(training, rank=0, world=1)


def _train_in_processes(training: PeerTraining) -> None:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as meeting:
        told = (training, f"{meeting}/store")
        try:
            start_processes(_train_connected, args=told, nprocs=training.workers, start_method="spawn")
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise RuntimeError(f"a worker of {training.peer} failed: {error}") from error


def _train_connected(rank: int, training: PeerTraining, store: str) -> None:
    from crsm.training.execution import run_connected

    def train() -> None:
        _train_part(training, rank, training.workers)

    run_connected(train, rank=rank, world=training.workers, store=store, patience=_PATIENCE)


def _train_part(training: PeerTraining, rank: int, world: int) -> tuple[PeerStage, StageResult]:
    """One worker's share of every step."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from crsm.tasks import build_tasks
    from crsm.training.loop import run_stage
    from jobs.peers.language_models import PeerStage, build_peer

    torch.set_num_threads(training.threads)
    loaded = _load(training)
    settings = loaded.config
    torch.manual_seed(settings.seed)
    peer = build_peer(training.peer, loaded.model.config.model.backbone)
    tasks = build_tasks(settings.tasks)
    stage = PeerStage(peer, settings.stage_1, settings.seed, tasks, loaded.tokenizer, training.compiled)
    resume = _state(training, loaded)
    steps, begun = settings.stage_1.steps, resume.step if resume else 0
    training.folder.mkdir(parents=True, exist_ok=True)
    with Progress(f"trains {training.peer}", steps, begun=begun) as progress:

        def log(point: Point) -> None:
            if rank == 0:
                progress.update(int(point["step"]), loss=point["loss"], tokens_per_second=point["tokens_per_second"])

        def keep(state: LoopState) -> None:
            if rank == 0:
                state.save(_state_path(training))

        result = run_stage(
            stage,
            rank=rank,
            world=world,
            module=stage if world == 1 else DistributedDataParallel(stage),
            resume=resume,
            fingerprint=_fingerprint(training, loaded),
            on_log=log,
            on_checkpoint=keep,
        )
    stage.eval()
    return stage, result


def _load(training: PeerTraining) -> Checkpoint:
    return load_with_settings(training.checkpoint, training.config, training.overrides, training.seed)


def _state_path(training: PeerTraining) -> Path:
    from crsm.training.loop import STATE_FILE

    return training.folder / STATE_FILE


def _state(training: PeerTraining, loaded: Checkpoint) -> LoopState | None:
    from crsm.training.loop import LoopState

    path = _state_path(training)
    return LoopState.load(path, "peer", _fingerprint(training, loaded)) if path.exists() else None


def _fingerprint(training: PeerTraining, loaded: Checkpoint) -> dict[str, Any]:
    settings = loaded.config
    return {
        "peer": training.peer,
        "backbone": loaded.model.config.model.backbone.model_dump(mode="json"),
        "stage_1": settings.stage_1.model_dump(mode="json"),
        "tasks": [task.model_dump(mode="json") for task in settings.tasks],
        "seed": settings.seed,
    }
