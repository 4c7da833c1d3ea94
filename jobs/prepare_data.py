"""Text into shards of tokens on Ray Data: cleaned, without duplicates, and without what models are evaluated on.

:mod:`crsm.data.preparation` says what is done; here it is spread over a cluster. One task reads an input and streams
its parts, others clean them; later others encode them. A part is small, and only as many are under way as the object
store has room for, so memory does not grow with the data. Tasks hand back counts: what they make are files in the
output folder, which every node must see.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import JsonOption, Progress, SeedOption, SetOption, commit, describe, run, write_result
from jobs.storage import StoragePath

if TYPE_CHECKING:
    from crsm.data.decontamination import Contamination
    from crsm.data.encoding import TextEncoder
    from crsm.data.parts import PartCounts
    from crsm.data.plan import Plan
    from crsm.data.sources import Input

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="Settings (YAML), as in configs/data.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder of the shards; the settings' if not given.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="INTEGER", help="Parts at a time; the machine's cores.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh/--resume", help="Remove what the output holds and start anew, or go on with it.")
]

OBJECT_STORE_PER_WORKER = 96 << 20
"""Bytes of a local cluster's object store: room for the parts that are handed over."""
_READ_CPUS = 0.1
"""What reading reserves: it waits for the cleaning most of the time. Another number than the cleaning's keeps Ray Data
from making one task of both, which would clean an input in one place."""


def main(
    config: ConfigOption,
    overrides: SetOption = None,
    seed: SeedOption = None,
    json: JsonOption = None,
    output: OutputOption = None,
    workers: WorkersOption = None,
    fresh: FreshOption = False,
    serial: Annotated[bool, typer.Option("--serial", help="In this process, without Ray.")] = False,
) -> None:
    """Prepare training text: shards of tokens with an index and a data card.

    The same command goes on where it was stopped; the shards are the same, bit for bit, whatever the workers.
    """
    commit()
    from crsm.config import core_count
    from crsm.data_config import load_data_config

    settings = load_data_config(config, overrides or (), seed)
    folder = output or Path(settings.output or f"runs/data/{settings.name}")
    StoragePath.of(folder).check_writable()
    if fresh:
        remove_output(folder)
    started = time.perf_counter()
    from crsm.data.preparation import SerialExecutor, prepare

    with _Bars() as bars, contextlib.ExitStack() as stack:
        executor = SerialExecutor() if serial else stack.enter_context(RayExecutor(workers or core_count()))
        report = prepare(settings, folder, executor, bars.tell)
    seconds = time.perf_counter() - started
    read = sum(source["counts"]["bytes"] for source in report["sources"])
    tokens = sum(entry["tokens"] for entry in report["shards"])
    had = "had finished" if report["had_finished"] else f"{seconds:.0f} s, {read / 1e6 / seconds:.2f} MB/s"
    print(f"{read / 1e6:,.1f} MB of text, {tokens:,} tokens, {had} -> {folder}", file=sys.stderr)
    figures = {"output": folder, "seconds": seconds, "text_bytes": read, "bytes_per_second": read / seconds}
    write_result("prepare_data", settings, settings.seed, {**figures, **report}, json)


def remove_output(folder: Path) -> None:
    """Removes what a preparation left in a folder, and nothing else.

    The index goes first: what is left of the rest, should this be stopped, is not taken for finished.
    """
    from crsm.data.plan import WORK
    from crsm.data.preparation import REPORT
    from crsm.data.shards import CARD, FOLDER, INDEX, TOKENIZER

    for name in (INDEX, CARD, REPORT, TOKENIZER):
        (folder / name).unlink(missing_ok=True)
    for name in (WORK, FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


class RayExecutor:
    """Runs parts as tasks of Ray Data, ``workers`` at a time. Ray is started when there is something to do, and stopped
    at the end of the ``with`` block."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._stack = contextlib.ExitStack()
        self._data: Any = None

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *exception: object) -> None:
        self._data = None
        self._stack.close()

    def clean(self, plan: Plan, inputs: list[Input], contamination: Contamination) -> Iterator[PartCounts]:
        if not inputs:
            return
        data, shared = self._share((plan, contamination))
        blocks = [{"input": pickle.dumps(given)} for given in inputs]
        parts = data.from_items(blocks, override_num_blocks=len(blocks)).flat_map(
            _read,
            fn_kwargs=shared,
            num_cpus=_READ_CPUS,
            compute=data.TaskPoolStrategy(size=min(self.workers, len(inputs))),
        )
        for row in _rows(
            parts.map(_clean, fn_kwargs=shared, num_cpus=1, compute=data.TaskPoolStrategy(size=self.workers))
        ):
            yield pickle.loads(row)

    def encode(self, plan: Plan, keys: list[str]) -> Iterator[str]:
        if not keys:
            return
        data, shared = self._share((plan,))
        parts = data.from_items([{"key": key} for key in keys], override_num_blocks=len(keys))
        for row in _rows(
            parts.map(_encode, fn_kwargs=shared, num_cpus=1, compute=data.TaskPoolStrategy(size=self.workers))
        ):
            yield row.decode()

    def _share(self, value: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        """``ray.data``, and what gives its tasks the value."""
        if self._data is None:
            self._data = self._stack.enter_context(_session(self.workers))
        import ray

        # In a list: a reference that is an argument of its own would be fetched for every call.
        return self._data, {"shared": [ray.put(value)]}


@contextlib.contextmanager
def _session(workers: int) -> Iterator[Any]:
    # Ray Data's own bars and notes would come between ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from actors.cluster import start_ray

    store = max(128 << 20, workers * OBJECT_STORE_PER_WORKER)
    with start_ray(num_cpus=workers + 1, object_store_memory=store):
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = 1 << 20  # every part is a block of its own
        yield ray.data


def _rows(dataset: Any) -> Iterator[bytes]:
    """What the tasks gave, as it comes.

    Raises:
        ValueError, OSError: a task's; Ray Data would wrap it up in pages of its own.
    """
    for row in dataset.iter_rows():
        if row["error"]:
            kind, message = pickle.loads(row["error"])
            raise kind(message)
        yield row["result"]


def _told(error: Exception) -> bytes:
    return pickle.dumps((ValueError if isinstance(error, ValueError) else OSError, describe(error)))


# ------------------------------------------------------------------------------------------------ what workers run


def _read(row: dict[str, Any], shared: list[Any]) -> Iterator[dict[str, Any]]:
    import ray

    from crsm.data.preparation import missing_parts

    plan, _ = ray.get(shared[0])
    try:
        for part in missing_parts(plan, pickle.loads(row["input"])):
            yield {"part": pickle.dumps(part, protocol=5), "error": b""}
    except (ValueError, OSError) as error:
        yield {"part": b"", "error": _told(error)}


def _clean(row: dict[str, Any], shared: list[Any]) -> dict[str, Any]:
    import ray

    from crsm.data.preparation import clean_and_write

    if row["error"]:
        return {"result": b"", "error": row["error"]}
    plan, contamination = ray.get(shared[0])
    try:
        counts = clean_and_write(plan, pickle.loads(row["part"]), contamination)
    except (ValueError, OSError) as error:
        return {"result": b"", "error": _told(error)}
    return {"result": pickle.dumps(counts), "error": b""}


_ENCODERS: dict[str, TextEncoder] = {}
"""Of this process, by folder: what it has learnt of the words serves the next part."""


def _encode(row: dict[str, Any], shared: list[Any]) -> dict[str, Any]:
    import ray

    from crsm.data.preparation import encode_and_write, make_encoder

    (plan,) = ray.get(shared[0])
    try:
        if plan.folder not in _ENCODERS:
            _ENCODERS.clear()
            _ENCODERS[plan.folder] = make_encoder(plan)
        encode_and_write(plan, row["key"], _ENCODERS[plan.folder])
    except (ValueError, OSError) as error:
        return {"result": b"", "error": _told(error)}
    return {"result": row["key"].encode(), "error": b""}


class _Bars:
    """One progress bar after the other, one for every step."""

    def __init__(self) -> None:
        self._step = ""
        self._bar: Progress | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def tell(self, step: str, done: int, total: int | None, figures: Any) -> None:
        if step != self._step:
            self.__exit__()
            self._step, self._bar = step, Progress(step, total).__enter__()
        assert self._bar is not None
        self._bar.update(done, **figures)


if __name__ == "__main__":
    run(main)
