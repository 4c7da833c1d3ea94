"""How the states of a run reach Ray Train, and come back: one file each, in a folder below the run's.

Ray Train counts a state once it is told that it is whole, keeps the newest ``train.keep_checkpoints``, removes older
ones, and hands the newest to workers that start. All workers report at the same steps; only the first has a state.

With ``train.async_checkpoints`` the first worker copies its state and goes on, and a thread of Ray Train writes the
copy to where the run lies. Until it is whole, the one before is the newest.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runs import Work
from jobs.storage import StoragePath

if TYPE_CHECKING:
    import ray.train

    from crsm.training.loop import LoopState
    from crsm.training.saving import StateBuffer

_PREFIX = "checkpoint_"
"""Of the folders of states; Ray Train names them."""


class StateReports:
    """Hands states of a run to Ray Train; one on every worker."""

    def __init__(self, work: Work, rank: int) -> None:
        self._place, self._rank = work.place, rank
        self._buffer: StateBuffer | None = None
        self._in_background: bool = work.config["train"]["async_checkpoints"]
        if rank == 0:
            remove_unfinished(work.place)
            if self._in_background:
                from crsm.training.saving import StateBuffer

                self._buffer = StateBuffer()

    def report(self, state: LoopState, figures: Mapping[str, float]) -> None:
        """Saves a state with what is known of the model; called by all workers at the same steps.

        Raises:
            OSError: this state, or the one that was being written, cannot be.
        """
        import ray.train
        from ray.train import CheckpointUploadMode

        from crsm.training.loop import STATE_FILE

        metrics = {**figures, "step": state.step}
        mode = CheckpointUploadMode.ASYNC if self._in_background else CheckpointUploadMode.SYNC
        if self._rank != 0:
            ray.train.report(metrics, checkpoint=None, checkpoint_upload_mode=mode)
        elif self._buffer is None:
            with tempfile.TemporaryDirectory(prefix="crsm-state-") as folder:
                state.save(Path(folder) / STATE_FILE)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        else:
            write_with = self._buffer.take(state)

            def upload(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
                write_with(lambda copied: write_state(copied, self._place / name))
                return _checkpoint_at(self._place / name)

            ray.train.report(
                metrics,
                checkpoint=_checkpoint_at(self._place),  # there is none to copy; Ray Train asks for one
                checkpoint_upload_mode=mode,
                checkpoint_upload_fn=upload,
                delete_local_checkpoint_after_upload=False,
            )

    def check(self) -> None:
        """
        Raises:
            OSError: a state could not be written in the background.
        """
        if self._buffer is not None:
            self._buffer.check()

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: it cannot be.
        """
        if self._buffer is not None:
            self._buffer.wait()


def write_state(state: LoopState, folder: StoragePath) -> None:
    """Writes a state straight to its place; what fails leaves no folder behind.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    from crsm.training.loop import STATE_FILE

    if folder.local is None:
        with tempfile.TemporaryDirectory(prefix="crsm-state-") as local:
            state.save(Path(local) / STATE_FILE)
            folder.upload(Path(local))
        return
    try:
        state.save(folder.local / STATE_FILE)
    except BaseException:
        shutil.rmtree(folder.local, ignore_errors=True)
        raise


def remove_unfinished(place: StoragePath) -> None:
    """Removes what killed workers have begun to write; Ray Train knows nothing of it."""
    from crsm.training.loop import STATE_FILE

    if place.local is None:
        return
    with contextlib.suppress(OSError):
        for folder in place.local.glob(f"{_PREFIX}*"):
            if folder.is_dir() and not (folder / STATE_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)


def latest_state(work: Work) -> LoopState | None:
    """The newest state of the run; None: it begins."""
    import ray.train

    from crsm.training.loop import STATE_FILE, LoopState

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return LoopState.load(Path(folder) / STATE_FILE, work.stage, work.fingerprint)


def _checkpoint_at(place: StoragePath) -> ray.train.Checkpoint:
    import ray.train

    path, filesystem = place.for_ray()
    return ray.train.Checkpoint(path, filesystem)
