"""The plan of a training run: what it holds, moves and computes on so many devices, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crsm.config import Config
from crsm.scaling.arithmetic import TokenCost, token_cost
from crsm.scaling.devices import GB, Device
from crsm.scaling.memory import (
    ACTIVATIONS,
    COPIES,
    FP32,
    KernelName,
    Layout,
    Ledger,
    evaluation_ledger,
    kernel_chunk,
    steady_bytes,
    step_ledger,
)
from crsm.scaling.parameters import count_parameters, layer_shape, trained_parameters
from crsm.scaling.rows import Workload, stage_1_workload, vocabulary


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device at the moment when most are held."""

    peak: int
    moment: str
    parts: dict[str, int]
    """What is held then, by kind."""

    @property
    def activations(self) -> int:
        return sum(self.parts.get(kind, 0) for kind in ACTIVATIONS)


@dataclass(frozen=True, slots=True)
class Communication:
    """Bytes that one device sends in an optimizer step, by a ring."""

    all_reduce: float
    """Of gradients in fp32, once a step."""
    all_gather: float
    """Of weights, for the forward and the backward pass of every micro-batch."""
    reduce_scatter: float
    """Of gradients in fp32, once a step."""

    @property
    def total(self) -> float:
        return self.all_reduce + self.all_gather + self.reduce_scatter


@dataclass(frozen=True, slots=True)
class Speed:
    """How long stage 1 takes at a stated utilisation."""

    flops_per_token: float
    """Forward and backward, with what is computed again."""
    tokens_per_second: float | None
    """Of all devices; None: the device's peak is not known."""
    step_seconds: float | None
    days: float | None
    tokens: float
    """Of the whole stage."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Stage 1 of a config on some devices."""

    config: Config
    """With the number of workers that the devices make."""
    device: Device
    devices: int
    kernels: KernelName
    utilisation: float
    parameters: dict[str, int]
    trained: int
    workload: Workload
    memory: Memory
    memory_kept: Memory
    """As if all activations were kept."""
    memory_checkpointed: Memory
    """As if activations were checkpointed."""
    memory_evaluated: Memory
    """Of an evaluation between two steps."""
    steady: dict[str, int]
    cost: TokenCost
    communication: Communication
    speed: Speed

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.device.room

    @property
    def fullest(self) -> Memory:
        """Of training or evaluation, whichever needs more."""
        return max(self.memory, self.memory_evaluated, key=lambda memory: memory.peak)

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be assumed."""
        own: tuple[str, ...] = ()
        if self.kernels == "cuda":
            own = ("memory: what mamba-ssm's kernels save was read from their source, not measured",)
        return (*own, *self.workload.notes)

    @property
    def state_bytes(self) -> int:
        """Of a saved state of the training: trained weights, both moments, and averaged weights if there are any."""
        copies = 4 if self.config.stage_1.optimizer.ema is not None else 3
        return copies * FP32 * self.trained

    @property
    def checkpoint_bytes(self) -> int:
        """Of the finished model in fp32."""
        return FP32 * sum(self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        train, stage = self.config.train, self.config.stage_1
        return {
            "devices": {"count": self.devices, **dataclasses.asdict(self.device), "room": self.device.room},
            "settings": {
                "strategy": train.strategy,
                "precision": train.precision,
                "checkpoint_activations": train.checkpoint_activations,
                "accumulate": stage.optimizer.accumulate,
                "batch": stage.batch,
                "steps": stage.steps,
                "kernels": self.kernels,
            },
            "parameters": {**self.parameters, "total": sum(self.parameters.values()), "trained": self.trained},
            "workload": dataclasses.asdict(self.workload),
            "bytes": {
                "steady": self.steady,
                "peak": dataclasses.asdict(self.memory) | {"activations": self.memory.activations},
                "peak_evaluation": dataclasses.asdict(self.memory_evaluated),
                "peak_activations_kept": self.memory_kept.peak,
                "peak_activations_checkpointed": self.memory_checkpointed.peak,
                "activations_kept": self.memory_kept.activations,
                "activations_checkpointed": self.memory_checkpointed.activations,
                "state": self.state_bytes,
                "checkpoint": self.checkpoint_bytes,
            },
            "communication": dataclasses.asdict(self.communication) | {"total": self.communication.total},
            "multiply_adds_per_token": dataclasses.asdict(self.cost) | {"forward": self.cost.forward},
            "speed": dataclasses.asdict(self.speed) | {"utilisation": self.utilisation},
            "fits": self.fits,
            "notes": list(self.notes),
        }


def make_plan(config: Config, devices: int, device: Device, utilisation: float = 0.4) -> Plan:
    """Plans stage 1 with one worker a device.

    Args:
        config: its ``train.workers`` and ``train.use_gpu`` give way to the devices.
        devices: how many.
        device: of which kind.
        utilisation: operations that are done, over the device's peak.

    Raises:
        ValueError: settings that cannot run, whatever the memory.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation = {utilisation}; allowed: more than 0, at most 1")
    if device.is_cpu and config.train.precision == "bf16":
        # The C++ kernels take fp32 only; what the reference keeps instead is not planned for.
        raise ValueError("train.precision = 'bf16' on a CPU; allowed: fp32 (--set train.precision=fp32)")
    config = _on(config, devices, device)
    workload = stage_1_workload(config, devices)
    return _plan(config, devices, device, utilisation, workload)


def _on(config: Config, devices: int, device: Device) -> Config:
    train = config.train.model_copy(
        update={"workers": devices, "min_workers": None, "use_gpu": not device.is_cpu, "threads": 0}
    )
    sizes = config.model.backbone.model_copy(update={"vocab_size": vocabulary(config)})
    model = config.model.model_copy(update={"backbone": sizes})
    return config.model_copy(update={"train": train, "model": model})


def _plan(config: Config, devices: int, device: Device, utilisation: float, workload: Workload) -> Plan:
    kernels: KernelName = "native" if device.is_cpu else "cuda"
    train = config.train
    trained = trained_parameters(config.model)
    layout = _layout(config, devices, kernels)
    memory = _memory(config, workload, layout)
    evaluated = _evaluated(config, workload, layout)
    kept = _memory(config, workload, dataclasses.replace(layout, checkpoint=False))
    checkpointed = _memory(config, workload, dataclasses.replace(layout, checkpoint=True))
    sizes = config.model.backbone
    cost = token_cost(sizes, kernel_chunk(sizes, kernels), workload.target_share)
    return Plan(
        config=config,
        device=device,
        devices=devices,
        kernels=kernels,
        utilisation=utilisation,
        parameters=count_parameters(config.model),
        trained=trained,
        workload=workload,
        memory=memory,
        memory_kept=kept,
        memory_checkpointed=checkpointed,
        memory_evaluated=evaluated,
        steady=steady_bytes(config.model, layout) | {COPIES: memory.parts.get(COPIES, 0)},
        cost=cost,
        communication=_communication(config, devices, trained),
        speed=_speed(config, devices, device, utilisation, workload, cost, train.checkpoint_activations),
    )


def _layout(config: Config, devices: int, kernels: KernelName) -> Layout:
    train, optimizer = config.train, config.stage_1.optimizer
    return Layout(
        kernels=kernels,
        bf16=train.precision == "bf16",
        checkpoint=train.checkpoint_activations,
        sharded=train.strategy == "fsdp",
        workers=devices,
        accumulated=optimizer.accumulate > 1,
        ema=optimizer.ema is not None,
    )


def _memory(config: Config, workload: Workload, layout: Layout) -> Memory:
    return _peak(step_ledger(config.model, workload.groups, layout))


def _evaluated(config: Config, workload: Workload, layout: Layout) -> Memory:
    return _peak(evaluation_ledger(config.model, workload.evaluated, layout))


def _peak(ledger: Ledger) -> Memory:
    return Memory(ledger.peak, ledger.moment, {kind: size for kind, size in ledger.at_peak.items() if size})


def _communication(config: Config, devices: int, trained: int) -> Communication:
    """A ring of n sends (n - 1) / n of the bytes for a gather or a scatter, and twice that for an all-reduce."""
    share = (devices - 1) / devices
    if config.train.strategy == "ddp":
        return Communication(2 * share * FP32 * trained, 0.0, 0.0)
    sizes = config.model.backbone
    shape = layer_shape(sizes)
    matrices = sizes.n_layer * (shape.in_proj + shape.out_proj)
    width = 2 if config.train.precision == "bf16" else FP32
    # Layers are gathered for both passes; what belongs to none stays gathered between them.
    rest = trained - sizes.n_layer * shape.total
    gathered = 2 * (width * matrices + FP32 * sizes.n_layer * shape.small) + FP32 * rest
    times = config.stage_1.optimizer.accumulate
    return Communication(0.0, times * share * gathered, share * FP32 * trained)


def _speed(
    config: Config,
    devices: int,
    device: Device,
    utilisation: float,
    workload: Workload,
    cost: TokenCost,
    recomputed: bool,
) -> Speed:
    flops, tokens = cost.train_flops(recomputed), config.stage_1.steps * workload.step_tokens
    peak = device.flops(config.train.precision)
    if peak is None:
        return Speed(flops, None, None, None, tokens)
    rate = devices * utilisation * peak / flops
    return Speed(flops, rate, workload.step_tokens / rate, tokens / rate / 86400, tokens)


# ------------------------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes with which a plan fits."""

    changes: tuple[str, ...]
    """As arguments of ``--set``."""
    peak: int


def remedies(plan: Plan) -> list[Remedy]:
    """Ways to make a plan fit, the least change of every kind first: a smaller evaluation, smaller micro-batches,
    checkpointed activations, FSDP; two of them, and all, where one is not enough. Empty: nothing of it helps."""
    found: list[Remedy] = []
    enough: list[set[str]] = []
    for changes in _candidates(plan.config, plan.devices):
        keys = {change.partition("=")[0] for change in changes}
        if any(fewer <= keys for fewer in enough):
            continue
        config = plan.config
        for change in changes:
            config = _changed(config, change)
        fitted = _evaluated_by_less(config, plan)
        if fitted is not None:
            found.append(Remedy((*changes, *fitted[0]), fitted[1]))
            enough.append(keys)
    return found


def _evaluated_by_less(config: Config, plan: Plan) -> tuple[tuple[str, ...], int] | None:
    """With fewer problems of an evaluation where that is what does not fit: the change and the peak, None if training
    itself does not fit or no number of problems does."""
    layout, room = _layout(config, plan.devices, plan.kernels), plan.device.room
    workload = stage_1_workload(config, plan.devices)
    training = _memory(config, workload, layout).peak
    if training > room:
        return None
    problems = config.stage_1.evaluate_problems
    changes: tuple[str, ...] = ()
    while (evaluation := _evaluated(config, workload, layout).peak) > room:
        problems //= 2
        if problems < len(config.tasks):
            return None
        config = config.model_copy(
            update={"stage_1": config.stage_1.model_copy(update={"evaluate_problems": problems})}
        )
        workload = stage_1_workload(config, plan.devices)
        changes = (f"stage_1.evaluate_problems={problems}",)
    return changes, max(training, evaluation)


def refusal(plan: Plan) -> str:
    """Why a plan cannot be, and what would fit, in one line."""
    need, room = plan.fullest.peak / GB, plan.device.room / GB
    line = (
        f"{plan.config.name} needs {need:.1f} GB on each of {plan.devices} {plan.device.name}, "
        f"which have {room:.1f} GB for it ({plan.fullest.moment})"
    )
    ways = remedies(plan)
    if not ways:
        return f"{line}; neither smaller micro-batches nor checkpoint_activations, fsdp or evaluate_problems help"
    options = [f"--set {' --set '.join(way.changes)} ({way.peak / GB:.1f} GB)" for way in ways]
    return f"{line}; allowed: {', or '.join(options)}"


_CHECKPOINT = "train.checkpoint_activations=true"
_SHARD = "train.strategy=fsdp"


def _candidates(config: Config, devices: int) -> Iterator[tuple[str, ...]]:
    smaller = [f"stage_1.optimizer.accumulate={times}" for times in _finer(config, devices)]
    checkpoint = [] if config.train.checkpoint_activations else [_CHECKPOINT]
    shard = [] if config.train.strategy == "fsdp" or devices == 1 else [_SHARD]
    yield ()
    for change in smaller:
        yield (change,)
    for change in checkpoint:
        yield (change,)
    for change in shard:
        yield (change,)
    for first in checkpoint:
        for change in smaller:
            yield (first, change)
    for first in shard:
        for change in (*smaller, *checkpoint):
            yield (first, change)
    if checkpoint and shard:
        for change in smaller:
            yield (*shard, *checkpoint, change)


def _finer(config: Config, devices: int) -> list[int]:
    """More micro-batches of whole rows: doublings, down to one row a worker."""
    batch, now = config.stage_1.batch, config.stage_1.optimizer.accumulate
    found = []
    times = 2 * now
    while batch // times >= devices:
        if batch % times == 0:
            found.append(times)
        times *= 2
    return found


def _changed(config: Config, change: str) -> Config:
    key, _, value = change.partition("=")
    if key == "stage_1.optimizer.accumulate":
        optimizer = config.stage_1.optimizer.model_copy(update={"accumulate": int(value)})
        return config.model_copy(update={"stage_1": config.stage_1.model_copy(update={"optimizer": optimizer})})
    update = {"checkpoint_activations": True} if change == _CHECKPOINT else {"strategy": "fsdp"}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})
