"""A step as a CUDA graph: recorded once for a number of generations, then replayed without launching its kernels.

A graph repeats the same kernels on the same memory. So the tokens and slots of a step are written into a buffer of
fixed shape before a replay, and the states are the slots' own memory: plans are written into it, and generations join
and leave, between two replays. Invariants:

* a graph serves every number of generations up to its size, a power of two; the rows beyond are those of a spare slot;
* nothing that a slot holds changes while a graph is recorded: recording works on the spare slot;
* what a step returns is a copy: the next replay writes over the graph's own;
* graphs are dropped when the slots move to other memory; weights are written in place (:meth:`Engine.update_weights`);
* where recording fails, that is said once, and steps are launched one by one from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crsm.decoding import Decoder
from crsm.devices import to_device
from crsm.model import CRSM
from crsm.slots import TorchSlots
from crsm.steering import NEVER

logger = logging.getLogger(__name__)

Work = Callable[[], tuple[Tensor, Tensor]]
Record = Callable[[Work], tuple[Callable[[], object], tuple[Tensor, Tensor]]]
"""Does some work as often as it likes and records it: what repeats it, and its results, which every repetition writes
anew. Raises ``RuntimeError`` where it cannot."""

_WARM_UPS = 2
"""Times that the work is done first: libraries allocate, and Triton compiles."""


class CudaRecorder:
    """Records for one device; all its graphs share their working memory, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Callable[[], object], tuple[Tensor, Tensor]]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Planners of this process may allocate meanwhile: that is no fault of what is recorded here.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results


class _Graph(NamedTuple):
    place_2B: Tensor
    """Tokens, and the slots whose they are."""
    replay: Callable[[], object]
    logits_BV: Tensor
    decay_LBH: Tensor


class GraphedSlots(TorchSlots):
    """:class:`~crsm.slots.TorchSlots` whose steps are replayed."""

    def __init__(self, model: CRSM, decoder: Decoder, capacity: int, record: Record) -> None:
        """
        Args:
            model: whose states.
            decoder: consumes the tokens.
            capacity: slots.
            record: what records a step: a :class:`CudaRecorder`, or a test's.
        """
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}; allowed: at least 1")
        super().__init__(model, decoder, capacity + 1)
        self._record: Record | None = record
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    @property
    def capacity(self) -> int:
        return self._capacity - 1

    @property
    def _spare(self) -> int:
        """The slot of nobody: the last one."""
        return self._capacity - 1

    def grow(self, capacity: int) -> None:
        if capacity < self.capacity:
            raise ValueError(f"capacity = {capacity}; allowed: at least {self.capacity}, what there is")
        self._graphs.clear()
        super().grow(capacity + 1)

    @torch.inference_mode()
    def step(self, token_B: Tensor | Sequence[int], slots: Sequence[int], remember: int) -> Tensor:
        count = len(slots)
        graph = self._graph(_size(count), any(self._expires[slot] != NEVER for slot in slots))
        if graph is None:
            return super().step(token_B, slots, remember)
        idle = len(graph.place_2B[0]) - count
        tokens = token_B.tolist() if isinstance(token_B, Tensor) else list(token_B)
        place = torch.tensor([tokens + [0] * idle, [*slots] + [self._spare] * idle])
        graph.place_2B.copy_(to_device(place, self.device))
        graph.replay()
        self._keep_decays(slots, graph.place_2B[1, :count], graph.decay_LBH[:, :count], remember)
        return graph.logits_BV[:count].clone()

    def _graph(self, size: int, carried: bool) -> _Graph | None:
        """The graph for so many rows, recorded if it is the first time; None: steps cannot be recorded."""
        found = self._graphs.get((size, carried))
        if found is not None or self._record is None:
            return found
        place_2B = to_device(torch.tensor([[0] * size, [self._spare] * size]), self.device)
        try:
            replay, (logits_BV, decay_LBH) = self._record(lambda: self._advance(place_2B[0], place_2B[1], carried))
        except RuntimeError as error:
            self._record = None
            self._graphs.clear()
            logger.warning("steps are not replayed as CUDA graphs: %s", " ".join(str(error).split()))
            return None
        graph = self._graphs[size, carried] = _Graph(place_2B, replay, logits_BV, decay_LBH)
        return graph


def _size(count: int) -> int:
    """Rows of the graph that serves so many generations."""
    return 1 << (count - 1).bit_length()
