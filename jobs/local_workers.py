"""Trains a stage in processes of this machine, connected by gloo and without Ray: how workers are checked.

A run is a row of legs. Each is done by its own workers, which go on from the state that the last leg saved.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.runs import Work

if TYPE_CHECKING:
    from crsm.config import Config
    from crsm.training.loop import LoopState

_PATIENCE = timedelta(seconds=120)
"""How long a worker waits for the others."""
_PRELOAD = ["crsm.training.execution", "crsm.training.loop", "jobs.train_worker", "torch.optim", "torch._dynamo"]


@dataclass(frozen=True, slots=True)
class Leg:
    workers: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    until: int | None = None
    """Step after which its workers stop; None: the stage's last."""


def train(config: Config, stage: str, legs: Sequence[Leg], folder: Path) -> list[float]:
    """The loss of every step of a stage that starts from a new model.

    Args:
        config: settings; the stage's ``log_every`` must be 1.
        stage: ``stage_1``, ``stage_2`` or ``stage_4``.
        legs: who trains from where to where; what is left in ``train`` holds for all of them.
        folder: where states are kept, as ``state_STEP``; the last leg's too.
    """
    import torch.multiprocessing as mp
    from torch.multiprocessing.spawn import start_processes

    # One process imports torch; the workers are its forks. That every parameter is used is nothing to warn of.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    mp.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    begin = 0
    for number, leg in enumerate(legs):
        told = (leg, number, begin, config.model_dump(mode="json"), stage, str(folder))
        start_processes(_work, args=told, nprocs=leg.workers, start_method="forkserver")
        begin = getattr(config, stage).steps if leg.until is None else leg.until

    from crsm.training.loop import LoopState

    curve = LoopState.load(folder / f"state_{begin}", stage).curve
    return [point["loss"] for point in curve if "loss" in point]


class _Stopped(Exception):
    """A leg has ended before the stage."""


def _work(rank: int, leg: Leg, number: int, begin: int, tree: dict[str, Any], stage: str, folder: str) -> None:
    import torch

    from crsm.training.execution import run_connected

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)

    def train() -> None:
        _train(rank, leg, begin, tree, stage, folder)

    if leg.workers == 1:
        train()
    else:
        run_connected(train, rank=rank, world=leg.workers, store=f"{folder}/store_{number}", patience=_PATIENCE)


def _train(rank: int, leg: Leg, begin: int, tree: dict[str, Any], stage: str, folder: str) -> None:
    import torch

    from crsm.config import parse_config
    from crsm.training.execution import prepare
    from crsm.training.loop import LoopState, run_stage
    from jobs.train_worker import build_stage

    config = parse_config(tree, source="the settings")
    built = build_stage(Work(stage, tree, None, folder, None, {}, ""), config)
    settings = config.train.model_copy(update={"strategy": leg.strategy})
    module = prepare(built.stage, settings, world=leg.workers, device=torch.device("cpu"))
    done = begin

    def save_now() -> bool:
        nonlocal done
        done += 1
        return done == leg.until

    def save(state: LoopState) -> None:
        if rank == 0:
            state.save(f"{folder}/state_{state.step}")
        if state.step == leg.until:
            raise _Stopped

    resume = LoopState.load(f"{folder}/state_{begin}", stage) if begin else None
    with contextlib.suppress(_Stopped):
        run_stage(
            built.stage,
            rank=rank,
            world=leg.workers,
            module=module,
            resume=resume,
            on_checkpoint=save,
            save_now=save_now,
        )
