"""What a worker's micro-batch of stage 1 holds: rows, their length, and how many positions have a loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from crsm.config import Config, TaskConfig, TokenizerConfig
from crsm.data.sequences import training_batch
from crsm.data.tokenizer import PIECES, Tokenizer, build_tokenizer
from crsm.tasks import build_task
from crsm.tasks.base import Task
from crsm.training_config import BackboneStageConfig

_STEPS = 4
"""Batches of a task that are looked at: their rows differ in length."""
_SAMPLE = 16
"""Problems that the average row is taken from."""
_EVALUATION_ROWS = 8
"""Rows of held-out text that are looked at together (:mod:`crsm.training.backbone`)."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one task, or of open text, that go through the model together."""

    name: str
    rows: int
    length: int
    """T: positions of a row."""
    targets: int
    """Positions with a loss of the next token, of all rows."""
    values: int
    """Positions with a loss of the values, of all rows."""
    packed: bool
    """Whether rows hold several documents."""

    @property
    def positions(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Workload:
    """What stage 1 asks of its workers."""

    groups: tuple[RowGroup, ...]
    """Of the fullest micro-batch of a worker; each is a pass through the model, all of one backward pass."""
    evaluated: tuple[RowGroup, ...]
    """Of an evaluation; each is a pass by itself, without gradients."""
    step_rows: int
    step_tokens: float
    """Positions of an optimizer step over all workers, on average over the stage."""
    step_targets: float
    notes: tuple[str, ...]
    """What had to be assumed."""

    @property
    def target_share(self) -> float:
        return self.step_targets / max(1.0, self.step_tokens)


def vocabulary(config: Config) -> int:
    """Rows of the embedding.

    Raises:
        ValueError: the tokenizer's file is not there, and the settings do not say either.
    """
    if config.model.backbone.vocab_size:
        return config.model.backbone.vocab_size
    if config.tokenizer.kind == "bpe":
        return config.tokenizer.vocab_size
    return build_tokenizer(config.tokenizer, [build_task(task) for task in config.tasks], config.seed).vocab_size


def stage_1_workload(config: Config, workers: int) -> Workload:
    """The rows of stage 1 under these settings.

    Raises:
        ValueError: fewer rows than workers or tasks.
    """
    stage = config.stage_1
    rows = stage.batch // stage.optimizer.accumulate
    if rows < workers:
        raise ValueError(
            f"stage_1.batch = {stage.batch} over accumulate = {stage.optimizer.accumulate} micro-batches leaves "
            f"{rows} rows for {workers} workers; allowed: at least one for each"
        )
    most, mean = _text_share(stage)
    samples, notes = _samples(config.tasks, config.tokenizer, config.seed, stage.solution_share)
    groups: list[RowGroup] = []
    left = math.ceil(rows / workers)
    step_tokens = step_targets = 0.0
    if stage.text is not None:
        length = stage.text.length
        mine = min(left, math.ceil(rows * most / workers))
        groups.append(RowGroup("text", mine, length, mine * (length - 1), 0, packed=True))
        left -= mine
        step_tokens = stage.batch * mean * length
        step_targets = stage.batch * mean * (length - 1)
    weights = np.array([task.weight for task in config.tasks])
    shares = (1 - mean) * weights / weights.sum()
    for sample, share in zip(samples, shares, strict=True):
        step_tokens += stage.batch * share * sample.group.positions / sample.problems
        step_targets += stage.batch * share * sample.group.targets / sample.problems
    # Rows of tasks at the text's largest share; the longest first, as the fullest worker would have them.
    shares = (1 - most) * weights / weights.sum()
    chosen = sorted(zip(samples, shares, strict=True), key=lambda entry: -entry[0].group.length)
    for sample, share in chosen:
        mine = min(left, math.ceil(rows * share / workers - 1e-9))
        if mine:
            groups.append(sample.of(mine))
            left -= mine
    evaluated = [
        sample.of(math.ceil(stage.evaluate_problems * weight / weights.sum()))
        for sample, weight in zip(samples, weights, strict=True)
    ]
    if stage.text is not None:
        length = stage.text.length
        evaluated.append(RowGroup("text", _EVALUATION_ROWS, length, _EVALUATION_ROWS * (length - 1), 0, packed=True))
    return Workload(
        groups=tuple(groups),
        evaluated=tuple(evaluated),
        step_rows=stage.batch,
        step_tokens=float(step_tokens),
        step_targets=float(step_targets),
        notes=notes,
    )


def _text_share(stage: BackboneStageConfig) -> tuple[float, float]:
    """The largest share of text among the rows, and the average over the steps."""
    if stage.text is None:
        return 0.0, 0.0
    base = stage.text.share
    if not stage.curriculum:
        return base, base
    at = [point.at for point in stage.curriculum]
    shares = [base if point.share is None else point.share for point in stage.curriculum]
    return max(shares), float(np.interp((np.arange(1000) + 0.5) / 1000, at, shares).mean())


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some problems of a task as rows."""

    group: RowGroup
    problems: int

    def of(self, problems: int) -> RowGroup:
        """As many problems, in rows like these."""
        ratio, group = problems / self.problems, self.group
        return replace(
            group,
            rows=math.ceil(group.rows * ratio),
            targets=math.ceil(group.targets * ratio),
            values=math.ceil(group.values * ratio),
        )


@dataclass(frozen=True, slots=True)
class _Mix:
    """What drawing rows needs to know of the stage."""

    solution_share: float


@functools.lru_cache(maxsize=16)
def _samples(
    tasks: tuple[TaskConfig, ...], tokens: TokenizerConfig, seed: int, solution_share: float
) -> tuple[tuple[_Sample, ...], tuple[str, ...]]:
    """Rows of every task, and what had to be assumed."""
    notes: list[str] = []
    tokenizer = _tokenizer(tasks, tokens, seed, notes)
    found = tuple(_sample(settings, tokenizer, seed, _Mix(solution_share), notes) for settings in tasks)
    return found, tuple(dict.fromkeys(notes))


def _sample(settings: TaskConfig, tokenizer: Tokenizer | None, seed: int, mix: _Mix, notes: list[str]) -> _Sample:
    """Some rows of one task: real ones where task and tokenizer can be had."""
    limit: int | None = getattr(settings, "max_tokens", None)
    try:
        task = build_task(settings)
    except (ValueError, OSError, ImportError):
        if limit is None:
            raise
        notes.append(f"{settings.label} cannot be read here; every row is taken to be full")
        return _Sample(RowGroup(settings.label, 1, limit, limit - 1, limit, packed=True), 1)
    if tokenizer is not None:
        return _real(task, tokenizer, seed, mix)
    if task.max_tokens is not None:
        return _Sample(RowGroup(task.name, 1, task.max_tokens, task.max_tokens - 1, task.max_tokens, packed=True), 1)
    lengths = list(_pieces(task, seed))
    length = max(prompt + answer for prompt, answer in lengths)
    answers = sum(answer for _, answer in lengths)
    return _Sample(RowGroup(task.name, len(lengths), length, answers, answers, packed=False), len(lengths))


def _real(task: Task, tokenizer: Tokenizer, seed: int, mix: _Mix) -> _Sample:
    found = [training_batch([task], tokenizer, mix, seed=seed, step=step, batch=_SAMPLE)[0] for step in range(_STEPS)]
    group = RowGroup(
        task.name,
        max(batch.num_rows for batch in found),
        max(batch.tokens_BT.shape[1] for batch in found),
        max(int(batch.targets_mask_BT.sum()) for batch in found),
        max(int(batch.value_mask_BT.sum()) for batch in found),
        any(batch.packed for batch in found),
    )
    return _Sample(group, _SAMPLE)


def _tokenizer(tasks: tuple[TaskConfig, ...], tokens: TokenizerConfig, seed: int, notes: list[str]) -> Tokenizer | None:
    """The run's; None where it would have to be trained, or its file is not here."""
    if tokens.kind == "closed":
        return build_tokenizer(tokens, [build_task(task) for task in tasks], seed)
    if tokens.kind == "bpe":
        notes.append("rows of tasks: a token a piece of text, since the BPE is not trained yet")
        return None
    assert tokens.path is not None
    try:
        return Tokenizer.adopt(tokens.path)
    except ValueError:
        notes.append(f"rows of tasks: a token a piece of text, since {tokens.path} is not here")
        return None


def _pieces(task: Task, seed: int) -> Iterator[tuple[int, int]]:
    """Pieces of prompt and answer, verdict included, of some problems."""
    import tokenizers

    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated")
    for index in range(_SAMPLE):
        problem = task.generate(seed, "train", index)
        prompt = len(split.pre_tokenize_str(problem.prompt))
        yield prompt, len(split.pre_tokenize_str(f" {problem.solution}")) + 1
