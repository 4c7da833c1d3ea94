"""How a stage is run on the devices there are: what :class:`crsm.config.TrainConfig` asks beside the workers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crsm.config import TrainConfig
from crsm.mamba_ssm import Layer
from crsm.model import CRSM
from crsm.training.sharding import is_sharded, shard, whole_model
from crsm.training.stage import Stage

T = TypeVar("T")


def prepare(stage: Stage, settings: TrainConfig, *, world: int, device: torch.device) -> nn.Module:
    """Puts a stage on its device and makes it what :func:`crsm.training.loop.run_stage` wants as ``module``.

    Args:
        stage: as it was made, the same on every worker.
        settings: precision, strategy, recomputation, compilation.
        world: number of workers; several must be connected by ``torch.distributed``.
        device: of this worker.

    Raises:
        ValueError: compilation is asked for and there is no compiler, or shards with a torch that has none.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives and Triton's kernels run
    stage.to(device)
    stage.precision = settings.precision
    stage.model.backbone.recompute = settings.checkpoint_activations
    if settings.compile:
        compile_layers(stage.model, device)
    if world == 1:  # one shard is the whole
        return stage
    if settings.strategy == "fsdp":
        shard(stage)
        return stage
    return DistributedDataParallel(
        stage,
        device_ids=[device.index] if device.type == "cuda" else None,
        # A worker's part of a batch may leave a part of the model unused (no judged row: no critic).
        find_unused_parameters=True,
        broadcast_buffers=False,  # no buffer changes in training
    )


def compile_layers(model: CRSM, device: torch.device) -> None:
    """Lets ``torch.compile`` fuse what lies between the kernels of each layer; one graph serves all layers.

    Raises:
        ValueError: nothing can be compiled for the device on this machine.
    """
    try:
        torch.compile(lambda x: x.sin() + 1.0)(torch.zeros(16, device=device))
    except Exception as error:  # the compiler's, Triton's, Python's: each fails in its own way
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"train.compile = True: torch.compile does not work on this machine: {reason}; "
            "allowed: False, or a C++ compiler (CXX), and Triton for a GPU"
        ) from error
    for layer in cast(Iterable[Layer], model.backbone.layers):
        layer.compile()


def finished_model(stage: Stage, rank: int) -> CRSM | None:
    """The plain model of a trained stage on the CPU, on the first worker; all workers must call it."""
    if is_sharded(stage):
        return whole_model(stage, keep=rank == 0)
    if rank != 0:
        return None
    stage.model.backbone.recompute = False
    for layer in stage.model.backbone.layers:
        layer._compiled_call_impl = None
    return stage.model.cpu()


def run_connected(work: Callable[[], T], *, rank: int, world: int, store: str | Path, patience: timedelta) -> T:
    """Does some work in one of several processes on the CPU, connected by gloo, where no launcher connects them.

    Args:
        work: makes what it needs, such as what :func:`prepare` gives, and keeps none of it.
        rank: this worker.
        world: number of workers.
        store: a file that all of them reach and that does not exist yet.
        patience: how long a worker waits for the others.

    Raises:
        RuntimeError: another worker has gone.
    """
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=patience)
    done = work()
    # A DDP module that outlives the group is its last owner: its end would join gloo's threads and hold the
    # interpreter's lock, for which one of them may wait to drop a tensor.
    gc.collect()
    dist.destroy_process_group()
    return done
