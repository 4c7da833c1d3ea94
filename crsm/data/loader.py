"""Rows of text out of shards: pure functions of a seed and a row's number.

The tokens of a source are cut into windows of one length. Every epoch of a source visits each of its windows once, in
an order that the seed and the epoch decide; row ``n`` of a source is place ``n`` of its endless stream of epochs. So a
run that goes on at a step sees what it would have seen, and how many workers share the rows does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np

from crsm.data.sequences import TEXT, Batch
from crsm.data.shards import TokenShards, open_shards
from crsm.data.tokenizer import Tokenizer
from crsm.tasks.base import Split, keyed_rng
from crsm.training_config import TextConfig


class TextLoader:
    """The text of a stage.

    Args:
        config: which shards, and the length of a row.
        tokenizer: the model's.
        seed: of the run.

    Raises:
        ValueError: a shard is missing or corrupt, or another tokenizer wrote them; there is no training text, or less
            than a row of it.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.length, self.seed, self.pad_id = config.length, seed, tokenizer.pad_id
        self.shards: TokenShards = open_shards(config.shards, verify=config.verify)
        if self.shards.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"stage_1.text.shards = {config.shards!r}: another tokenizer than the model's wrote them "
                f"({self.shards.index['tokenizer']['vocab_size']} entries; the model's has {tokenizer.vocab_size}); "
                f"allowed: tokenizer: {{kind: file, path: {config.shards}/tokenizer.json}}, or shards of the model's"
            )
        self._streams = {split: self.shards.streams(split) for split in ("train", "valid")}
        if not self._streams["train"]:
            raise ValueError(f"stage_1.text.shards = {config.shards!r} hold no training text; allowed: a source of it")

    def tokens(self, split: Split = "train") -> dict[str, float]:
        """Tokens of each source."""
        return {name: float(len(stream)) for name, stream in self._streams[split].items()}

    def windows(self, source: str, split: Split = "train") -> int:
        """Rows of an epoch; the last may be short."""
        return -(-len(self._streams[split][source]) // self.length)

    def batch(self, counts: Mapping[str, int], firsts: Mapping[str, int]) -> Batch | None:
        """Rows of training text.

        Args:
            counts: rows of each source; None if there are none at all.
            firsts: number of each source's first row.
        """
        rows = []
        for source in self._streams["train"]:
            windows = self.windows(source)
            for number in range(firsts[source], firsts[source] + counts[source]):
                epoch, place = divmod(number, windows)
                rows.append(self._window(source, int(_order(self.seed, source, epoch, windows)[place]), "train"))
        return text_batch(rows, self.length, eos_id=self.shards.eos_id, pad_id=self.pad_id) if rows else None

    def held_out(self, source: str, rows: int, chunk: int) -> Iterator[Batch]:
        """At most ``rows`` windows of a source's held-out text, evenly spread, ``chunk`` at a time."""
        windows = self.windows(source, "valid")
        chosen = np.unique(np.linspace(0, windows - 1, min(rows, windows)).round().astype(int)).tolist()
        for start in range(0, len(chosen), chunk):
            picked = [self._window(source, window, "valid") for window in chosen[start : start + chunk]]
            yield text_batch(picked, self.length, eos_id=self.shards.eos_id, pad_id=self.pad_id)

    def _window(self, source: str, window: int, split: Split) -> np.ndarray:
        return self._streams[split][source].read(window * self.length, self.length)


def text_batch(rows: list[np.ndarray], length: int, *, eos_id: int, pad_id: int) -> Batch:
    """Rows of a stream of documents as a batch: every token but the first of a document, or of a row, is a target."""
    tokens_BT = np.full((len(rows), length), pad_id, np.int64)
    lengths_B = np.array([len(row) for row in rows], np.int64)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row
    real_BT = np.arange(length) < lengths_B[:, None]
    after_end_BT = np.zeros(tokens_BT.shape, bool)
    after_end_BT[:, 1:] = (tokens_BT[:, :-1] == eos_id) & real_BT[:, 1:]
    targets_BT = real_BT & ~after_end_BT
    targets_BT[:, 0] = False
    return Batch(
        tokens_BT=tokens_BT,
        targets_mask_BT=targets_BT,
        value_mask_BT=np.zeros(tokens_BT.shape, bool),
        outcome_BT=np.zeros(tokens_BT.shape, np.float32),
        segment_BT=np.cumsum(after_end_BT, axis=1, dtype=np.int32),
        answer_start_B=lengths_B,
        lengths_B=lengths_B,
        task_index_B=np.full(len(rows), TEXT, np.int64),
        step_targets=int(targets_BT.sum()),
        step_values=0,
    )


@lru_cache(maxsize=64)
def _order(seed: int, source: str, epoch: int, count: int) -> np.ndarray:
    return keyed_rng("text", seed, source, epoch).permutation(count)
