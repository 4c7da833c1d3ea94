"""States that are written beside the training: copies, one at a time, whole or not at all."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from crsm.training.loop import run_stage
from crsm.training.saving import StateBuffer
from crsm.training.state import LoopState


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def a_state(step, value, borrowed=True):
    return LoopState("stage_1", step, {"weights/w": torch.full((3,), value)}, borrowed=borrowed)


def test_what_is_written_is_the_state_of_its_step_whatever_training_does_meanwhile(tmp_path, thread):
    buffer, may_write = StateBuffer(), threading.Event()

    def write(state):
        may_write.wait(30)
        state.save(tmp_path / "state")

    state = a_state(3, 1.0)
    write_with = buffer.take(state)
    future = thread.submit(write_with, write)
    state.tensors["weights/w"].fill_(9.0)
    may_write.set()
    buffer.wait()
    future.result()
    loaded = LoopState.load(tmp_path / "state", "stage_1")
    assert loaded.step == 3 and loaded.tensors["weights/w"].tolist() == [1.0] * 3


def test_the_next_state_waits_until_the_last_is_written(thread):
    buffer, may_write, order = StateBuffer(), threading.Event(), []

    def write(state):
        may_write.wait(30)
        order.append(f"wrote {state.step}")

    thread.submit(buffer.take(a_state(1, 1.0)), write)
    threading.Timer(0.1, lambda: (order.append("may write"), may_write.set())).start()
    thread.submit(buffer.take(a_state(2, 2.0)), write)
    order.append("took 2")
    buffer.wait()
    assert order[:2] == ["may write", "wrote 1"] and set(order[2:]) == {"took 2", "wrote 2"}


def test_a_failed_write_stops_what_comes_next_with_its_own_error_and_leaves_the_former_state(
    tmp_path, thread, monkeypatch
):
    path, buffer = tmp_path / "state", StateBuffer()
    thread.submit(buffer.take(a_state(1, 1.0)), lambda state: state.save(path)).result()
    buffer.check()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    future = thread.submit(buffer.take(a_state(2, 2.0)), lambda state: state.save(path))
    for ask in (buffer.wait, buffer.check, lambda: buffer.take(a_state(3, 3.0))):
        with pytest.raises(OSError, match="No space left on device"):
            ask()
    assert isinstance(future.exception(), OSError)
    assert LoopState.load(path, "stage_1").step == 1
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_buffers_are_used_again_and_what_is_not_borrowed_is_not_copied(thread):
    buffer, seen = StateBuffer(), []
    for step in (1, 2):
        thread.submit(buffer.take(a_state(step, float(step))), seen.append).result()
    first, second = seen
    assert first.tensors["weights/w"].data_ptr() == second.tensors["weights/w"].data_ptr()
    own = a_state(3, 3.0, borrowed=False)
    thread.submit(buffer.take(own), seen.append).result()
    assert seen[-1].tensors["weights/w"] is own.tensors["weights/w"]


def test_a_run_that_is_killed_during_a_write_goes_on_from_the_state_before(make_stage, tmp_path, thread):
    """The bits are those of a run that was never stopped."""

    def make():
        return make_stage("stage_1", "stage_1.steps=6", "stage_1.checkpoint_every=2")

    class Killed(BaseException):
        pass

    buffer = StateBuffer()

    def save(state):
        def write(copied):
            if copied.step == 4:
                raise Killed
            copied.save(tmp_path / "state")

        thread.submit(buffer.take(state), write)

    with pytest.raises(Killed):
        run_stage(make(), on_checkpoint=save)
    state = LoopState.load(tmp_path / "state", "stage_1")
    assert state.step == 2
    resumed, whole = make(), make()
    run_stage(resumed, resume=state)
    run_stage(whole)
    for (name, left), right in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right), name
