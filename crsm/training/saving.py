"""States that are written while the training goes on.

The loop's thread copies a state and hands the copy over; another thread writes it. One copy exists at a time: who wants
the next waits until the last is written. What goes wrong with a write is raised in the loop's thread, by whatever it
asks next, and a state that could not be written is none (:meth:`crsm.training.state.LoopState.save`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from crsm.training.state import LoopState

T = TypeVar("T")


class StateBuffer:
    """Room for the copy of one state in CPU memory, page-locked where states come from a GPU; used again and again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._written = threading.Event()
        self._written.set()
        self._failure: BaseException | None = None

    def take(self, state: LoopState) -> Callable[[Callable[[LoopState], T]], T]:
        """Copies a state, after the last one was written.

        Returns:
            What another thread has to call, with the function that writes the copy.

        Raises:
            Exception: what the last write failed with.
        """
        self.wait()
        copied, arrived = self._copy(state) if state.borrowed else (state, None)
        self._written.clear()

        def write_with(write: Callable[[LoopState], T]) -> T:
            try:
                if arrived is not None:
                    arrived.synchronize()
                done = write(copied)
                self._failure = None
                return done
            except BaseException as error:
                self._failure = error
                raise
            finally:
                self._written.set()

        return write_with

    def check(self) -> None:
        """
        Raises:
            Exception: what the last write failed with, if it has ended.
        """
        if self._written.is_set() and self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            Exception: what the last write failed with.
        """
        self._written.wait()
        self.check()

    @torch.no_grad()
    def _copy(self, state: LoopState) -> tuple[LoopState, torch.cuda.Event | None]:
        on_gpu = any(tensor.is_cuda for tensor in state.tensors.values())
        self._buffers = {name: self._buffer(name, tensor, on_gpu) for name, tensor in state.tensors.items()}
        for name, tensor in state.tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        arrived = None
        if on_gpu:
            # The next step is queued behind the copies; only the writer has to wait for them.
            arrived = torch.cuda.Event()
            arrived.record()
        return dataclasses.replace(state, tensors=dict(self._buffers), borrowed=False), arrived

    def _buffer(self, name: str, like: Tensor, pinned: bool) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == like.shape and buffer.dtype == like.dtype:
            return buffer
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
