"""The training loop that all stages share: plain PyTorch, in one process or in several under DDP.

What a step does depends on the step's number and on the tensors it finds, and on nothing else: batches are a function
of the step, and torch's generator is seeded anew in every step (per worker). So a :class:`LoopState` of tensors and a
step is all that an exact resume needs, whatever was killed when.

Every worker takes part in every step and in every checkpoint; only the worker of rank 0 evaluates and finishes. A state
is the same whatever the number of workers that saved it, and any number of them goes on from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crsm.data.sequences import AttemptGroup, Batch
from crsm.tasks.base import keyed_bits
from crsm.training.optimizer import AverageWeights, build_optimizer, clip_gradients, learning_rate
from crsm.training.stage import Metrics, Stage, scalar

FORMAT = 1
STATE_FILE = "loop_state.safetensors"

Point = dict[str, float]
"""One point of the curve: ``step``, ``seconds`` and figures by name; evaluations are named ``valid/…``."""


# ------------------------------------------------------------------------------------------------------------ state


@dataclass(frozen=True, slots=True)
class LoopState:
    """All that a stopped run needs to go on exactly."""

    stage: str
    step: int
    """Optimizer steps done; also the position in the data and in the random numbers, which are functions of it."""
    tensors: dict[str, Tensor]
    """Trained weights and buffers, the optimizer's moments, and the averaged weights if there are any. Not copies: save
    them before the next step."""
    seconds: float = 0.0
    """Spent so far, lost work not counted."""
    train_seconds: float = 0.0
    """The part of it that optimizer steps took."""
    tokens: int = 0
    curve: list[Point] = field(default_factory=list)
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sum and count of every figure since the last point of the curve."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """The settings that decide the run's course."""

    def save(self, path: str | Path) -> None:
        """Writes one file, whole or not at all.

        Raises:
            OSError: the disk is full or the place cannot be written; what was there before is untouched.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        description = {
            "format": FORMAT,
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "tokens": self.tokens,
            "curve": self.curve,
            "window": self.window,
            "fingerprint": self.fingerprint,
        }
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        try:
            tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
            try:
                save_file(tensors, temporary, metadata={"loop": json.dumps(description)})
            except SafetensorError as error:  # the library wraps the operating system's error
                raise OSError(f"{path}: {error}") from error
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | Path, stage: str, fingerprint: Mapping[str, Any] | None = None) -> LoopState:
        """Reads what ``save`` wrote.

        Args:
            path: the file.
            stage: name of the stage that wants to go on.
            fingerprint: the settings it has now; None: they are not compared.

        Raises:
            ValueError: no such file, a truncated one, another format, stage or settings; both values are named.
        """
        path = Path(path)
        _check_length(path)
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {})["loop"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the state of a training run: {error}") from error
        if description.pop("format") != FORMAT:
            raise ValueError(f"{path}: another format; allowed: {FORMAT}")
        if description["stage"] != stage:
            raise ValueError(f"{path}: stage = {description['stage']!r}; this run is of {stage!r}")
        if fingerprint is not None:
            check_fingerprint(description["fingerprint"], fingerprint, str(path))
        return cls(tensors=tensors, **description)


def _check_length(path: Path) -> None:
    try:
        found = path.stat().st_size
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes)) if header_bytes < found else {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: {found} bytes that are not the state of a training run") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    wanted = 8 + header_bytes + max(ends, default=0)
    if found != wanted:
        raise ValueError(f"{path}: {found} bytes; its header names {wanted}")


def check_fingerprint(found: Mapping[str, Any], asked: Mapping[str, Any], source: str) -> None:
    """
    Raises:
        ValueError: the two differ; the first difference is named with both values.
    """
    left, right = dict(_flat(found)), dict(_flat(asked))
    for key in [*right, *(key for key in left if key not in right)]:
        if left.get(key) != right.get(key):
            raise ValueError(f"{source} was made with {key} = {left.get(key)!r}; the settings ask {right.get(key)!r}")


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves by dotted name."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


# ------------------------------------------------------------------------------------------------------------- loop


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a finished run of a stage leaves beside the weights, which are in the stage's model."""

    metrics: Metrics
    """The last figures of training and evaluation."""
    steps: int
    seconds: float
    tokens_per_second: float
    curve: list[Point]
    finish: dict[str, Any]
    """What ``Stage.finish`` gave."""

    def report(self) -> dict[str, Any]:
        """As it goes into a checkpoint's report."""
        own = {"steps": self.steps, "seconds": self.seconds, "tokens_per_second": self.tokens_per_second}
        curve = [{key: float(f"{value:.6g}") for key, value in point.items()} for point in self.curve]
        return {**self.metrics, **own, **self.finish, "curve": curve}


def run_stage(
    stage: Stage,
    *,
    rank: int = 0,
    world: int = 1,
    module: nn.Module | None = None,
    resume: LoopState | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    on_log: Callable[[Point], None] | None = None,
    on_evaluate: Callable[[Point], None] | None = None,
    on_checkpoint: Callable[[LoopState], None] | None = None,
    save_now: Callable[[], bool] | None = None,
) -> StageResult:
    """Trains a stage to its last step; afterwards its model holds the weights to keep (the averaged ones, with EMA).

    Args:
        stage: what to train.
        rank: this worker.
        world: number of workers; they must be connected by ``torch.distributed`` if there are several.
        module: the stage wrapped for DDP; None: the stage itself.
        resume: where to go on; its tensors are copied into the stage.
        fingerprint: goes into the states.
        on_log: called with each point of the curve, on every worker.
        on_evaluate: called with the figures of an evaluation, on rank 0.
        on_checkpoint: called with the state when it is time to save, and after the last step, on every worker.
        save_now: asked in every step, on every worker: whether the state has to be saved after it. What one worker says
            holds for all.

    Raises:
        FloatingPointError: a loss or the gradient is not finite, on any worker; raised on all of them, before anything
            is updated.
        ValueError: ``resume`` does not fit the stage.
    """
    return _Loop(stage, rank, world, module or stage, dict(fingerprint or {}), resume, save_now).run(
        on_log or _ignore, on_evaluate or _ignore, on_checkpoint or _ignore
    )


def _ignore(_: object) -> None: ...


class _Loop:
    """One run of a stage."""

    def __init__(
        self,
        stage: Stage,
        rank: int,
        world: int,
        module: nn.Module,
        fingerprint: dict[str, Any],
        resume: LoopState | None,
        save_now: Callable[[], bool] | None,
    ) -> None:
        self.stage, self.rank, self.world, self.module, self.fingerprint = stage, rank, world, module, fingerprint
        stage.world = world
        self.settings, self.config = stage.settings, stage.settings.optimizer
        self.trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        self.device = self.trained[0].device
        self.optimizer = build_optimizer(stage, self.config)
        self.average = None if self.config.ema is None else AverageWeights(stage, self.config.ema)
        self.step = 0
        self.seconds = self.train_seconds = 0.0
        self.tokens = 0
        self.curve: list[Point] = []
        self.window: dict[str, list[float]] = {}
        self._save_now = save_now or (lambda: False)
        self._asked_to_save = False
        """Agreed in the last step."""
        if resume is not None:
            self._restore(resume)

    def run(
        self,
        on_log: Callable[[Point], None],
        on_evaluate: Callable[[Point], None],
        on_checkpoint: Callable[[LoopState], None],
    ) -> StageResult:
        settings = self.settings
        mark = time.perf_counter()
        log_tokens, log_seconds = self.tokens, self.train_seconds
        self.stage.train()
        while self.step < settings.steps:
            self._train_step()
            self.step += 1
            now = time.perf_counter()
            self.train_seconds += now - mark
            self.seconds, mark = self.seconds + now - mark, now
            last = self.step == settings.steps
            if last or self.step % settings.log_every == 0:
                rate = (self.tokens - log_tokens) / max(1e-9, self.train_seconds - log_seconds)
                log_tokens, log_seconds = self.tokens, self.train_seconds
                on_log(self._close_window(rate))
            if not last and self.step % settings.evaluate_every == 0 and self.rank == 0:
                on_evaluate(self._evaluate())
            now = time.perf_counter()
            self.seconds, mark = self.seconds + now - mark, now
            if last or self._asked_to_save or self.step % settings.checkpoint_every == 0:
                on_checkpoint(self._state())
        finish = {}
        if self.average is not None:
            self.average.copy_to(self.stage)
        if self.rank == 0:
            on_evaluate(self._evaluate())
            self.stage.eval()
            finish = self.stage.finish()
        self.seconds += time.perf_counter() - mark
        return StageResult(
            metrics={key: value for point in self.curve[-2:] for key, value in point.items() if key not in _CLOCKS},
            steps=self.step,
            seconds=self.seconds,
            tokens_per_second=self.tokens / max(1e-9, self.train_seconds),
            curve=self.curve,
            finish=finish,
        )

    def _train_step(self) -> None:
        """One optimizer step, or a FloatingPointError and nothing changed."""
        stage, config, accumulate = self.stage, self.config, self.config.accumulate
        torch.manual_seed(int(keyed_bits(1, "loop", stage.name, stage.seed, self.step, self.rank)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, list[float]] = {}
        total = 0.0
        for micro in range(accumulate):
            batch = stage.batch(self.step, micro, self.rank, self.world)
            self.tokens += count_tokens(batch) * self.world
            with self._synchronised(micro == accumulate - 1):
                loss, metrics = self.module(batch)
                (loss / accumulate).backward()
            total += scalar(loss) / accumulate
            for name, value in metrics.items():
                figures.setdefault(name, []).append(value)
        lr = learning_rate(self.step, self.settings.steps, config)
        norm = scalar(clip_gradients([p for p in self.trained if p.grad is not None], config.clip))
        total = self._agree(total, norm, figures)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.average is not None:
            self.average.update(stage)
        means = {name: sum(values) / len(values) for name, values in figures.items()}
        for name, value in (means | {"loss": total, "gradient_norm": norm, "lr": lr}).items():
            entry = self.window.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def _agree(self, loss: float, norm: float, figures: Mapping[str, list[float]]) -> float:
        """The loss, averaged over workers; raises on all of them if anything is not finite on one. What else has to be
        the same on all of them is agreed on the way."""
        fine, save = math.isfinite(loss) and math.isfinite(norm), self._save_now()
        everywhere, mean = fine, loss
        if self.world > 1:
            own = [float(not fine), loss if fine else 0.0, float(save)]
            agreed = torch.tensor(own, dtype=torch.float64, device=self.device)
            dist.all_reduce(agreed)
            everywhere, mean, save = agreed[0].item() == 0, agreed[1].item() / self.world, agreed[2].item() > 0
        self._asked_to_save = save
        if everywhere:
            return mean
        terms = [(name, value) for name, values in figures.items() for value in values if not math.isfinite(value)]
        terms.sort(key=lambda term: term[0] == "loss")  # the sum of the others: named only if it is the only one
        if terms:
            what = f"{terms[0][0]} = {terms[0][1]}"
        elif not math.isfinite(loss):
            what = f"loss = {loss}"
        elif not math.isfinite(norm):
            what = f"gradient norm = {norm} (loss = {loss:.4g})"
        else:
            what = "a loss on another worker is not finite"
        raise FloatingPointError(
            f"{self.stage.name}, step {self.step}: {what}; nothing was updated. "
            f"Allowed: finite numbers; a lower {self.stage.name}.optimizer.lr usually helps"
        )

    def _close_window(self, tokens_per_second: float) -> Point:
        point = {"step": float(self.step), "seconds": self.seconds, "tokens_per_second": tokens_per_second}
        point |= {name: total / count for name, (total, count) in self.window.items()}
        self.window = {}
        self.curve.append(point)
        return point

    def _evaluate(self) -> Point:
        self.stage.eval()
        figures = self.stage.evaluate()
        self.stage.train()
        point = {"step": float(self.step), "seconds": self.seconds, **figures}
        self.curve.append(point)
        return point

    def _state(self) -> LoopState:
        tensors = {f"weights/{name}": tensor for name, tensor in self._named()}
        for name, parameter in self.stage.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.averages.items()}
        return LoopState(
            stage=self.stage.name,
            step=self.step,
            tensors=tensors,
            seconds=self.seconds,
            train_seconds=self.train_seconds,
            tokens=self.tokens,
            curve=list(self.curve),
            window={name: list(entry) for name, entry in self.window.items()},
            fingerprint=self.fingerprint,
        )

    def _named(self) -> list[tuple[str, Tensor]]:
        """What a stage changes: trained parameters and buffers."""
        trained = [(name, p) for name, p in self.stage.named_parameters() if p.requires_grad]
        return [*trained, *self.stage.named_buffers()]

    @torch.no_grad()
    def _restore(self, state: LoopState) -> None:
        if state.stage != self.stage.name:
            raise ValueError(f"state of stage {state.stage!r}; this run is of {self.stage.name!r}")
        if state.step > self.settings.steps:
            raise ValueError(f"state of step {state.step}; the settings ask {self.settings.steps} steps")
        tensors = dict(state.tensors)
        for name, tensor in self._named():
            tensor.copy_(_take(tensors, f"weights/{name}", tensor))
        if self.average is not None:
            for name, tensor in self.average.averages.items():
                tensor.copy_(_take(tensors, f"average/{name}", tensor))
        parameters = dict(self.stage.named_parameters())
        for key in [key for key in tensors if key.startswith("optimizer/")]:
            _, entry, name = key.split("/", 2)
            if name not in parameters:
                raise ValueError(f"state tensor {key!r} belongs to no parameter of {self.stage.name}")
            parameter = parameters[name]
            like = parameter if tensors[key].ndim else tensors[key]
            value = _take(tensors, key, like)
            # The count of steps stays on the CPU, as the optimizer keeps it.
            self.optimizer.state[parameter][entry] = value.to(parameter.device) if value.ndim else value.clone()
        if tensors:
            raise ValueError(f"state tensor {next(iter(tensors))!r} has no place in {self.stage.name}")
        self.step, self.seconds, self.train_seconds = state.step, state.seconds, state.train_seconds
        self.tokens, self.curve = state.tokens, list(state.curve)
        self.window = {name: list(entry) for name, entry in state.window.items()}


_CLOCKS = ("step", "seconds", "tokens_per_second")


def _take(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in tensors:
        raise ValueError(f"state tensor {name!r} is missing; the stage needs it with shape {tuple(like.shape)}")
    tensor = tensors.pop(name)
    if tensor.shape != like.shape:
        raise ValueError(f"state tensor {name!r} has shape {tuple(tensor.shape)}; the stage has {tuple(like.shape)}")
    return tensor


def count_tokens(batch: Any) -> int:
    """Real tokens of a batch of any stage: prompts and answers without padding; 0 for what is no text."""
    if isinstance(batch, Batch):
        return int(batch.lengths_B.sum())
    if isinstance(batch, AttemptGroup):
        return int(batch.prompt_lengths_B.sum()) + int(batch.answer_mask_BAt.sum())
    if isinstance(batch, list | tuple):
        return sum(count_tokens(part) for part in batch)
    return 0
