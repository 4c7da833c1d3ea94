"""The training loop that all stages share: plain PyTorch, in one process or in several, under DDP or sharded.

What a step does depends on the step's number and on the tensors it finds, and on nothing else: batches are a function
of the step, and torch's generator is seeded anew in every step (per worker). So a :class:`LoopState` of tensors and a
step is all that an exact resume needs, whatever was killed when.

Every worker takes part in every step and in every checkpoint; only the worker of rank 0 evaluates and finishes, unless
weights are sharded: then all do, since none has them all. A state is the same whatever the number of workers that saved
it and whether they shared the weights, and any number of them goes on from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crsm.data.sequences import AttemptGroup, Batch
from crsm.tasks.base import keyed_bits
from crsm.training.optimizer import AverageWeights, build_optimizer, clip_gradients, learning_rate
from crsm.training.precision import autocast
from crsm.training.sharding import clip_shards, divided_like, gather, is_sharded, release, synchronised
from crsm.training.stage import Metrics, Stage, scalar
from crsm.training.state import STATE_FILE, LoopState, Point, check_fingerprint, take_tensor

__all__ = ["STATE_FILE", "LoopState", "Point", "StageResult", "check_fingerprint", "count_tokens", "run_stage"]


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
    """Trains a stage to its last step; afterwards its model holds the weights to keep (the averaged ones, with EMA), or
    this worker's shards of them.

    Args:
        stage: what to train.
        rank: this worker.
        world: number of workers; they must be connected by ``torch.distributed`` if there are several.
        module: what :func:`crsm.training.execution.prepare` gave for it; None: the stage itself.
        resume: where to go on; its tensors are copied into the stage.
        fingerprint: goes into the states.
        on_log: called with each point of the curve, on every worker.
        on_evaluate: called with the figures of an evaluation, on rank 0.
        on_checkpoint: called with the state when it is time to save, and after the last step, on every worker. Where
            weights are sharded, only the state of rank 0 has tensors.
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
        self.sharded = is_sharded(module)
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
            if not last and self.step % settings.evaluate_every == 0 and self._evaluates:
                self._evaluate(on_evaluate)
            now = time.perf_counter()
            self.seconds, mark = self.seconds + now - mark, now
            if last or self._asked_to_save or self.step % settings.checkpoint_every == 0:
                on_checkpoint(self._state())
        finish = {}
        if self.average is not None:
            self.average.copy_to(self.stage)
        if self._evaluates:
            self._evaluate(on_evaluate)
            finish = self._without_training(self.stage.finish)
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
            with synchronised(self.module, micro == accumulate - 1):
                with autocast(stage.precision, self.device):
                    loss, metrics = self.module(batch)
                (loss / accumulate).backward()
            total += scalar(loss) / accumulate
            for name, value in metrics.items():
                figures.setdefault(name, []).append(value)
        lr = learning_rate(self.step, self.settings.steps, config)
        used = [parameter for parameter in self.trained if parameter.grad is not None]
        norm = scalar((clip_shards if self.sharded else clip_gradients)(used, config.clip))
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

    @property
    def _evaluates(self) -> bool:
        """Whether this worker does: a forward pass through shards is everybody's."""
        return self.rank == 0 or self.sharded

    def _evaluate(self, on_evaluate: Callable[[Point], None]) -> None:
        figures = self._without_training(self.stage.evaluate)
        self.stage.train()
        point = {"step": float(self.step), "seconds": self.seconds, **figures}
        self.curve.append(point)
        if self.rank == 0:
            on_evaluate(point)

    def _without_training(self, method: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.stage.eval()
        with autocast(self.stage.precision, self.device):
            found = method()
        release(self.module)
        return found

    def _state(self) -> LoopState:
        tensors = {f"weights/{name}": tensor for name, tensor in self._named()}
        for name, parameter in self.stage.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.averages.items()}
        if self.sharded:
            tensors = gather(tensors, keep=self.rank == 0)
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
            borrowed=not self.sharded,
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
            tensor.copy_(divided_like(take_tensor(tensors, f"weights/{name}", tensor), tensor))
        if self.average is not None:
            for name, tensor in self.average.averages.items():
                tensor.copy_(divided_like(take_tensor(tensors, f"average/{name}", tensor), tensor))
        parameters = dict(self.stage.named_parameters())
        for key in [key for key in tensors if key.startswith("optimizer/")]:
            _, entry, name = key.split("/", 2)
            if name not in parameters:
                raise ValueError(f"state tensor {key!r} belongs to no parameter of {self.stage.name}")
            parameter = parameters[name]
            if tensors[key].ndim:
                value = divided_like(take_tensor(tensors, key, parameter), parameter)
            else:  # the count of steps; a fused optimizer wants it beside its parameter
                value = tensors.pop(key).to(parameter.device, copy=True)
            self.optimizer.state[parameter][entry] = value
        if tensors:
            raise ValueError(f"state tensor {next(iter(tensors))!r} has no place in {self.stage.name}")
        self.step, self.seconds, self.train_seconds = state.step, state.seconds, state.train_seconds
        self.tokens, self.curve = state.tokens, list(state.curve)
        self.window = {name: list(entry) for name, entry in state.window.items()}


_CLOCKS = ("step", "seconds", "tokens_per_second")


def count_tokens(batch: Any) -> int:
    """Real tokens of a batch of any stage: prompts and answers without padding; 0 for what is no text."""
    if isinstance(batch, Batch):
        return int(batch.lengths_B.sum())
    if isinstance(batch, AttemptGroup):
        return int(batch.prompt_lengths_B.sum()) + int(batch.answer_mask_BAt.sum())
    if isinstance(batch, list | tuple):
        return sum(count_tokens(part) for part in batch)
    return 0
