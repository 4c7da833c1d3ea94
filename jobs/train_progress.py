"""What the workers of a stage say, on its way to the terminal of the driver.

Workers and Ray Train's controller tell a small actor beside the driver, which asks it twice a second: so the way is the
same wherever they run. The driver shows what is said, and keeps it as ``progress.jsonl`` in the stage's folder: line by
line in a folder, as one object at the end in an object store.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.command import Progress
from jobs.storage import StoragePath

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import UserCallback

PROGRESS_FILE = "progress.jsonl"
_PAUSE = 0.5
_TIMEOUT = 10.0

Message = dict[str, Any]
"""``say``: a line; or ``step`` and figures by name."""


class Board:
    """The actor: messages in the order in which they came."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def tell(self, message: Message) -> None:
        self._messages.append(message)

    def read(self, start: int) -> list[Message]:
        return self._messages[start:]


def start_board() -> ActorHandle:
    """On the driver's own node: the loss of another one does not reach it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


def failure_callback(board: ActorHandle, max_failures: int) -> UserCallback:
    """Tells the driver why a worker group is started anew; runs in Ray Train's controller."""
    from ray.train import UserCallback

    class TellFailures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, failure in sorted(worker_exceptions.items()):
                text = (str(failure).splitlines() or [""])[0]
                what = f"worker {rank} failed: {type(failure).__name__}: {text} (train.max_failures = {max_failures})"
                board.tell.remote({"say": what})

    return TellFailures()


@contextlib.contextmanager
def watched(board: ActorHandle, stage: str, steps: int, workers: str, folder: StoragePath) -> Iterator[None]:
    """Shows and keeps what is said meanwhile.

    Args:
        board: what is asked.
        stage: for the title.
        steps: of the whole stage.
        workers: how many, in words.
        folder: of the stage.
    """
    import ray
    from ray.exceptions import RayError

    going_down = (RayError, RuntimeError)  # or nothing is connected any more
    ended = threading.Event()
    keep = _Keep(folder / PROGRESS_FILE)
    position = 0

    def read() -> list[Message]:
        nonlocal position
        try:
            messages = ray.get(board.read.remote(position), timeout=_TIMEOUT)
        except going_down:  # or busy: what was said is asked for again
            return []
        position += len(messages)
        keep.add(messages)
        return list(messages)

    def show(progress: Progress, messages: list[Message]) -> None:
        for message in messages:
            if "say" in message:
                progress.say(f"{stage}: {message['say']}")
            else:
                progress.update(int(message["step"]), **{name: message[name] for name in message if name != "step"})

    def watch() -> None:
        # The bar's clock starts with the training, not with the starting of workers.
        while not (first := read()) and not ended.wait(_PAUSE):
            pass
        with Progress(stage, steps) as progress:
            show(progress, first)
            while not ended.wait(_PAUSE):
                show(progress, read())
            show(progress, read())

    print(f"{stage}: starts {workers}", file=sys.stderr, flush=True)
    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        keep.close()
        with contextlib.suppress(*going_down):
            ray.kill(board)


class _Keep:
    """``progress.jsonl``."""

    def __init__(self, path: StoragePath) -> None:
        self._path, self._lines = path, ""

    def add(self, messages: list[Message]) -> None:
        lines = "".join(json.dumps(message) + "\n" for message in messages)
        if self._path.local is None:
            self._lines += lines
        elif lines:
            with open(self._path.local, "a", encoding="utf-8") as file:
                file.write(lines)

    def close(self) -> None:
        if self._lines:
            before = self._path.read_text() if self._path.is_file() else ""
            self._path.write_text(before + self._lines)
