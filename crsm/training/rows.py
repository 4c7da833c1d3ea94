"""The rows of stage 1: tasks and open text, mixed; what is held out of both.

A pure function of settings, seed and step, and of no model: whoever trains another model on these rows sees what ours
saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from crsm.config import BackboneStageConfig
from crsm.data.loader import TextLoader
from crsm.data.mixture import build_mixture
from crsm.data.sequences import TEXT, Batch, training_batch
from crsm.data.tokenizer import Tokenizer
from crsm.tasks.base import Task

_TEXT_ROWS = 8
"""Rows of held-out text that are looked at together."""


class BackboneRows:
    """Batches by step.

    Raises:
        ValueError: shards that are missing or corrupt, or of another tokenizer; names that nothing has.
    """

    def __init__(self, settings: BackboneStageConfig, seed: int, tasks: Sequence[Task], tokenizer: Tokenizer) -> None:
        self.settings, self.seed, self.tasks, self.tokenizer = settings, seed, tasks, tokenizer
        self.text = None if settings.text is None else TextLoader(settings.text, tokenizer, seed)
        self._mixture = None
        if settings.text is not None or settings.curriculum:
            accumulate = settings.optimizer.accumulate
            self._mixture = build_mixture(
                settings,
                {task.name: task.weight for task in tasks},
                {} if self.text is None else self.text.tokens(),
                rows=settings.batch // accumulate,
                steps=settings.steps * accumulate,
            )

    def batch(self, step: int, micro: int, rank: int, world: int, every_batch: bool = False) -> list[Batch]:
        """The part of micro-batch ``micro`` of optimizer step ``step`` that belongs to ``rank``.

        Args:
            step, micro: which.
            rank, world: this worker, of how many.
            every_batch: also the batches of which none of the rows are this worker's (see ``training_batch``).
        """
        accumulate = self.settings.optimizer.accumulate
        return training_batch(
            self.tasks,
            self.tokenizer,
            self.settings,
            seed=self.seed,
            step=step * accumulate + micro,
            batch=self.settings.batch // accumulate,
            rank=rank,
            world=world,
            mixture=self._mixture,
            text=self.text,
            every_batch=every_batch,
        )

    def held_out(self) -> list[Batch]:
        """Validation problems of the tasks."""
        return training_batch(
            self.tasks,
            self.tokenizer,
            self.settings,
            seed=self.seed,
            step=0,
            batch=max(len(self.tasks), self.settings.evaluate_problems),
            split="valid",
        )

    def held_out_text(self, loss: Callable[[Batch], float], rows: int | None = None) -> dict[str, float]:
        """Loss, perplexity and bits per byte of every source with held-out text: the last does not depend on the
        tokenizer.

        Args:
            loss: cross-entropy of the targets of some rows, summed, in nats.
            rows: of each source, evenly spread; None: ``evaluate_problems``.
        """
        figures: dict[str, float] = {}
        if self.text is None:
            return figures
        bytes_V = self.tokenizer.byte_counts
        for source in self.text.tokens("valid"):
            total, targets, size = 0.0, 0, 0
            for part in self.text.held_out(source, rows or self.settings.evaluate_problems, _TEXT_ROWS):
                total += loss(part)
                targets += part.step_targets
                size += int(bytes_V[part.tokens_BT[part.targets_mask_BT]].sum())
            if targets and size:
                figures[f"valid/loss/{source}"] = total / targets
                figures[f"valid/perplexity/{source}"] = math.exp(total / targets)
                figures[f"valid/bits_per_byte/{source}"] = total / math.log(2) / size
        return figures

    def name(self, batch: Batch) -> str:
        """Of the task, or ``text``."""
        index = int(batch.task_index_B[0])
        return "text" if index == TEXT else self.tasks[index].name
