"""States on their way to Ray Train: written to their place whole, or nothing is left."""

import errno
import os

import pytest
import torch

from crsm.training.loop import STATE_FILE, LoopState
from jobs.storage import StoragePath
from jobs.train_states import remove_unfinished, write_state

STATE = LoopState("stage_1", 7, {"weights/w": torch.ones(3)})


def test_a_state_is_written_to_its_own_folder(tmp_path):
    write_state(STATE, StoragePath.of(tmp_path / "checkpoint_1"))
    assert LoopState.load(tmp_path / "checkpoint_1" / STATE_FILE, "stage_1").step == 7


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_state(STATE, StoragePath.of(tmp_path / "checkpoint_1"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_state(STATE, StoragePath.of(tmp_path / "checkpoint_2"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


def test_what_a_killed_worker_had_begun_to_write_is_removed_and_nothing_else(tmp_path):
    write_state(STATE, StoragePath.of(tmp_path / "checkpoint_1"))
    (tmp_path / "checkpoint_2").mkdir()
    (tmp_path / "checkpoint_2" / f".{STATE_FILE}.abc.part").write_bytes(b"half")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "run.json").touch()
    remove_unfinished(StoragePath.of(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "checkpoint_1", "run.json"}
