"""How well a text is predicted: bits per byte, and perplexity per token.

A document begins after the end of another text and is predicted in windows (:func:`crsm.evaluation.scoring.windows`),
as lm-eval's rolling log-likelihood does it. A window is a problem; its bytes are those of the characters that begin in
it, so that the windows of a document have its bytes together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from crsm.data.tokenizer import Tokenizer
from crsm.evaluation.benchmarks.base import Measure, PartResult, Record, bits_of, count_plans, digest_of
from crsm.evaluation.benchmarks.settings import BenchmarkConfig
from crsm.evaluation.comparison import system_planners
from crsm.evaluation.scoring import Continuation, score, windows
from crsm.model import Checkpoint
from crsm.tasks.jsonl import field, read_bytes, read_jsonl


class Window(NamedTuple):
    """A piece of a document."""

    document: int
    continuation: Continuation
    bytes: int


class Text:
    """The windows of the documents of a file.

    Raises:
        ValueError: the file cannot be read, holds no text, or something that the vocabulary cannot write.
    """

    kind = "text"
    excluded: Mapping[str, str] = {
        "oracle": "the text itself as the plan is a look at the answer",
        "silent_tokens": "a plan's token that is said for certain leaves every other token a probability of 0",
    }

    def __init__(self, settings: BenchmarkConfig, tokenizer: Tokenizer) -> None:
        assert settings.path is not None
        self.name = settings.name
        self._windows: list[Window] = []
        for number, (where, text) in enumerate(read_documents(settings.path)):
            try:
                self._windows += _windows(number, text, tokenizer, settings.window)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if settings.problems is not None and len(self._windows) >= settings.problems:
                break
        self._windows = self._windows[: settings.problems]
        if not self._windows:
            raise ValueError(f"{settings.path!r} holds no text; allowed: at least one character")
        self.digest = digest_of(self.problems())

    def __len__(self) -> int:
        return len(self._windows)

    def problems(self) -> Iterable[Record]:
        for index, window in enumerate(self._windows):
            context, tokens = window.continuation.context, window.continuation.tokens
            yield {
                "index": index,
                "document": window.document,
                "bytes": window.bytes,
                "tokens": digest_of([[list(context), list(tokens)]]),
            }

    def answer(self, checkpoint: Checkpoint, system: str, first: int, count: int, seed: int) -> PartResult:
        config, part = checkpoint.config, self._windows[first : first + count]

        def no_solutions() -> dict[str, Any]:
            raise AssertionError("the oracle is excluded")

        planners, deliberation = system_planners(
            system,
            checkpoint,
            deliberation=config.deliberation,
            search=config.search,
            seed=seed + first,
            solutions=no_solutions,
        )
        started = time.perf_counter()
        try:
            scores = score(
                checkpoint,
                [window.continuation for window in part],
                planners=planners,
                deliberation=deliberation,
                simulations=config.search.simulations,
                seed=seed + first,
                names=[f"problem-{first + place}" for place in range(len(part))],
            )
        finally:
            if planners is not None:
                planners.close()
        records = [
            {
                "index": first + place,
                "logprob": sum(row),
                "tokens": len(row),
                "bytes": window.bytes,
                "bits": bits_of((), row),
            }
            for place, (window, row) in enumerate(zip(part, scores.logprobs, strict=True))
        ]
        return PartResult(records, count_plans(scores.metrics), time.perf_counter() - started)

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        """``bits_per_byte``, and ``bits_per_token``, whose power of 2 is the perplexity."""
        bits_M = np.array([-record["logprob"] for record in records]) / np.log(2)
        bytes_M, tokens_M = (np.array([float(record[name]) for record in records]) for name in ("bytes", "tokens"))
        return {
            "bits_per_byte": Measure(bits_M, bytes_M, "bits"),
            "bits_per_token": Measure(bits_M, tokens_M, "bits"),
        }


def read_documents(path: str) -> Iterator[tuple[str, str]]:
    """The documents of a file, each with its place for error messages; empty ones are passed over.

    Raises:
        ValueError: the file's name ends otherwise, it cannot be read, or a line of it is no record with a text.
    """
    name = path.removesuffix(".gz")
    if name.endswith(".txt"):
        try:
            text = read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r} is not UTF-8 at byte {error.start}; allowed: UTF-8") from error
        if text.strip():
            yield repr(path), text
    elif name.endswith(".jsonl"):
        for where, record in read_jsonl(path):
            text = field(record, "text", str, where)
            if text.strip():
                yield where, text
    else:
        raise ValueError(f"{path!r} is no text to predict; allowed: .txt, .jsonl, and .gz of them")


def _windows(document: int, text: str, tokenizer: Tokenizer, size: int) -> Iterator[Window]:
    tokens, starts = tokenizer.encode_with_places(text)
    place = 0
    for continuation in windows(tokens, tokenizer.eos_id, size):
        begin, place = place, place + len(continuation.tokens)
        # What comes before the first token, or after the last, belongs to these.
        left = starts[begin] if begin else 0
        right = starts[place] if place < len(tokens) else len(text)
        yield Window(document, continuation, len(text[left:right].encode()))
