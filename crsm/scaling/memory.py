"""Bytes that a step of stage 1 holds at once, from what forward and backward pass really save.

A :class:`Ledger` is walked through one micro-batch in the order in which PyTorch allocates and frees: weights,
optimizer and gradients stay; each layer saves what its kernels save (:mod:`crsm.kernels`); the head holds a row of the
vocabulary's length for every target, three of them when its backward pass begins; the mixture over layers needs the
residual streams of all of them side by side. The peak is the largest sum, wherever it comes.

Letters as in :mod:`crsm.mamba_ssm`; M targets, W positions with a value. What is left out: token ids, masks, norms'
statistics and other vectors, under 1 % at the sizes that need a plan.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from crsm.config import BackboneConfig, ModelConfig
from crsm.scaling.parameters import count_parameters, layer_shape, projected, trained_parameters
from crsm.scaling.rows import RowGroup

FP32 = 4
KernelName = Literal["native", "cuda"]

WEIGHTS, COPIES, GRADIENTS, OPTIMIZER, AVERAGE, BUCKETS = (
    "weights",
    "copies of weights",
    "gradients",
    "optimizer",
    "averaged weights",
    "communication buffers",
)
LAYERS, LOGITS, STREAMS, WORK = "saved by layers", "logits", "residual streams", "work space"
STEADY = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, BUCKETS, COPIES)
ACTIVATIONS = (LAYERS, LOGITS, STREAMS, WORK)


class Ledger:
    """What is held, by kind, and the most that ever was."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.moment = ""
        """When the peak was."""
        self._now = ""

    def enter(self, moment: str) -> None:
        """Names what follows."""
        self._now = moment

    def hold(self, kind: str, size: float) -> None:
        self.held[kind] += round(size)
        total = self.held.total()
        if total > self.peak:
            self.peak, self.at_peak, self.moment = total, dict(self.held), self._now

    def drop(self, kind: str, size: float) -> None:
        self.held[kind] -= round(size)
        assert self.held[kind] >= 0, f"{kind} was never held"

    @contextlib.contextmanager
    def briefly(self, kind: str, size: float) -> Iterator[None]:
        self.hold(kind, size)
        yield
        self.drop(kind, size)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a step runs and in what numbers."""

    kernels: KernelName
    bf16: bool = False
    checkpoint: bool = False
    """Layers keep their input only and run forward again in the backward pass."""
    sharded: bool = False
    """FSDP2: weights, gradients and optimizer over all workers; a layer is gathered when it is needed."""
    workers: int = 1
    accumulated: bool = False
    """Gradients of earlier micro-batches are there already."""
    ema: bool = False

    @property
    def width(self) -> int:
        """Bytes of a number that matrices are multiplied in."""
        return 2 if self.bf16 else FP32


def steady_bytes(model: ModelConfig, layout: Layout) -> dict[str, int]:
    """What one worker holds from step to step, gradients included.

    FSDP2 shards what is trained; frozen weights lie whole on every worker, and so do gradients while they are summed
    over micro-batches.
    """
    total, trained = sum(count_parameters(model).values()), trained_parameters(model)
    shards = layout.workers if layout.sharded else 1
    summed = layout.sharded and layout.accumulated
    return {
        WEIGHTS: FP32 * (total - trained + -(-trained // shards)),
        GRADIENTS: FP32 * (trained if summed else -(-trained // shards)),
        OPTIMIZER: 2 * FP32 * -(-trained // shards),
        AVERAGE: FP32 * -(-trained // shards) if layout.ema else 0,
        # DDP copies gradients into buckets of its own, all of them together as large as the gradients.
        BUCKETS: FP32 * trained if layout.workers > 1 and not layout.sharded else 0,
    }


def step_ledger(model: ModelConfig, groups: tuple[RowGroup, ...], layout: Layout) -> Ledger:
    """The ledger after one micro-batch."""
    return _Step(model, groups, layout).run()


def evaluation_ledger(model: ModelConfig, groups: tuple[RowGroup, ...], layout: Layout) -> Ledger:
    """The ledger after an evaluation, between two steps: one pass after the other, without gradients."""
    return _Step(model, groups, layout).evaluate()


class _Step:
    """One micro-batch: all groups forward, then all backward, the last one first."""

    def __init__(self, model: ModelConfig, groups: tuple[RowGroup, ...], layout: Layout) -> None:
        self.sizes, self.groups, self.layout = model.backbone, groups, layout
        self.ledger = Ledger()
        self.steady = steady_bytes(model, layout)
        self.shape = layer_shape(self.sizes)
        self.table = FP32 * self.sizes.vocab_size * self.sizes.d_model
        """Of the embedding, and of the head's matrix."""

    def run(self) -> Ledger:
        ledger, steady = self.ledger, self.steady
        for kind in (WEIGHTS, OPTIMIZER, AVERAGE, BUCKETS):
            ledger.hold(kind, steady[kind])
        if self.layout.accumulated:
            ledger.hold(GRADIENTS, steady[GRADIENTS])
        self._gather()
        ledger.hold(COPIES, self.sizes.n_layer * self._cast_layer + self._cast_head)
        for group in self.groups:
            self._forward(group)
        if self.layout.checkpoint:
            ledger.drop(COPIES, self.sizes.n_layer * self._cast_layer)
        for place, group in enumerate(reversed(self.groups)):
            self._backward(group, first=place == 0, last=place == len(self.groups) - 1)
        return ledger

    def evaluate(self) -> Ledger:
        ledger, sizes = self.ledger, self.sizes
        for kind in (WEIGHTS, OPTIMIZER, AVERAGE, BUCKETS, GRADIENTS):
            ledger.hold(kind, self.steady[kind])
        self._gather()
        ledger.hold(COPIES, sizes.n_layer * self._cast_layer + self._cast_head)
        for group in self.groups:
            ledger.enter(f"{group.name}, evaluation")
            streams = FP32 * sizes.n_layer * group.positions * sizes.d_model
            with ledger.briefly(STREAMS, sizes.n_layer * self._state(group.rows)):
                ledger.hold(STREAMS, streams)  # of every layer
                with ledger.briefly(WORK, self._saved(group)):
                    pass
                with ledger.briefly(STREAMS, streams):  # side by side
                    pass
                gathered = FP32 * group.targets * sizes.n_layer * sizes.d_model
                with ledger.briefly(STREAMS, gathered), ledger.briefly(WORK, gathered):
                    pass
                logits = FP32 * group.targets * sizes.vocab_size
                with ledger.briefly(LOGITS, 2 * logits):
                    pass
                with ledger.briefly(LOGITS, logits):
                    judged = FP32 * group.values * sizes.n_layer * sizes.d_model
                    with ledger.briefly(STREAMS, 2 * judged), ledger.briefly(WORK, judged):
                        pass
                ledger.drop(STREAMS, streams)
        return ledger

    # ---------------------------------------------------------------------------------------------------- weights

    @property
    def _gathers(self) -> bool:
        """Whether weights come from other workers."""
        return self.layout.sharded and self.layout.workers > 1

    @property
    def _matrices(self) -> int:
        """Of a layer, in bytes of the type that they are multiplied in."""
        return self.layout.width * (self.shape.in_proj + self.shape.out_proj)

    def _gather(self) -> None:
        """FSDP2: the tables stay gathered, in fp32, from the forward to the backward pass; of the layers, one computes,
        one is on its way, and one more is the buffer that it arrives in."""
        if self._gathers:
            self.ledger.hold(COPIES, self.table + 3 * (self._matrices + FP32 * self.shape.small))

    def _cast(self, size: int) -> int:
        """Bytes of autocast's copies, which its cache keeps to the end of the forward pass and the graph to the
        backward pass. What FSDP2 gathers is bf16 already."""
        return size if self.layout.bf16 else 0

    @property
    def _cast_layer(self) -> int:
        return 0 if self._gathers else self._cast(self._matrices)

    @property
    def _cast_head(self) -> int:
        return self._cast(self.table // 2)

    # ---------------------------------------------------------------------------------------------------- forward

    def _forward(self, group: RowGroup) -> None:
        ledger, sizes, layout = self.ledger, self.sizes, self.layout
        ledger.enter(f"{group.name}, forward")
        positions, width = group.positions, layout.width
        stream = FP32 * positions * sizes.d_model
        state = self._state(group.rows)
        ledger.hold(LAYERS, state)  # the zeros that all layers start from
        saved = self._saved(group)
        for _ in range(sizes.n_layer):
            ledger.hold(LAYERS, stream)  # x before the layer
            ledger.hold(LAYERS, saved)
            ledger.hold(STREAMS, state)  # after the last token
            if layout.checkpoint:
                ledger.drop(LAYERS, saved)
        streams = sizes.n_layer * stream
        with ledger.briefly(STREAMS, stream):
            ledger.hold(STREAMS, streams)  # side by side, for mixture and critics
        gathered = FP32 * group.targets * sizes.n_layer * sizes.d_model
        ledger.hold(STREAMS, gathered)
        with ledger.briefly(WORK, gathered):  # times their weights, before the sum
            ledger.hold(LOGITS, FP32 * group.targets * sizes.d_model)
        ledger.hold(LOGITS, width * group.targets * sizes.d_model)  # normed
        logits = group.targets * sizes.vocab_size
        with ledger.briefly(LOGITS, FP32 * logits):
            with ledger.briefly(LOGITS, self._cast(width * logits)):  # before they are made fp32
                pass
            ledger.hold(LOGITS, FP32 * logits)  # log softmax
            judged = FP32 * group.values * sizes.n_layer * sizes.d_model
            ledger.hold(STREAMS, 2 * judged)  # gathered, and normed
            with ledger.briefly(WORK, judged):
                pass
        ledger.drop(STREAMS, streams)
        ledger.drop(STREAMS, sizes.n_layer * state)

    def _state(self, rows: int) -> int:
        """Bytes of one layer's state."""
        sizes = self.sizes
        window = sizes.conv_channels * (sizes.d_conv - 1)
        return FP32 * rows * (sizes.d_inner * sizes.d_state + window)

    def _saved(self, group: RowGroup) -> int:
        """What one layer saves beside its input, all of it in the type that matrices are multiplied in but for states
        and decays."""
        sizes, width, positions = self.sizes, self.layout.width, group.positions
        inner, channels = sizes.d_inner, sizes.conv_channels
        # Normed input; projection; convolved and activated x, B, C; output of the scan; normed and gated output.
        numbers = sizes.d_model + projected(sizes) + channels + inner + inner
        if self.layout.kernels == "native":
            chunks = native_chunks(group.length, sizes.chunk_size)
            kept = group.rows * chunks * inner * sizes.d_state if chunks > 1 else 0
            return FP32 * (positions * numbers + kept)
        # mamba-ssm computes the states again; the convolution's output is saved before its activation too, decays by
        # head in fp32; and where rows hold several documents, the share that the state from before has in the output.
        saved = width * positions * (numbers + channels) + FP32 * positions * sizes.n_heads
        if group.packed:
            saved += positions * (width * inner + 3 * FP32 * sizes.n_heads)
        return saved

    # --------------------------------------------------------------------------------------------------- backward

    def _backward(self, group: RowGroup, first: bool, last: bool) -> None:
        ledger, sizes, layout = self.ledger, self.sizes, self.layout
        positions, width, layers = group.positions, layout.width, sizes.n_layer
        stream = FP32 * positions * sizes.d_model
        streams = layers * stream
        ledger.enter(f"{group.name}, backward of the values")
        judged = FP32 * group.values * layers * sizes.d_model
        if judged:
            with ledger.briefly(WORK, 2 * judged):  # of the normed streams and of their weights
                pass
            ledger.drop(STREAMS, judged)
            with ledger.briefly(WORK, judged):
                ledger.hold(STREAMS, streams)  # their gradient, at every position
            ledger.drop(STREAMS, judged)
        ledger.enter(f"{group.name}, backward of the head")
        logits = group.targets * sizes.vocab_size
        with ledger.briefly(LOGITS, FP32 * logits):  # gradient of the log-probabilities
            ledger.hold(LOGITS, FP32 * logits)  # of the logits
        ledger.drop(LOGITS, FP32 * logits)  # log softmax
        if layout.bf16:
            ledger.hold(LOGITS, width * logits)
            ledger.drop(LOGITS, FP32 * logits)
        self._table_gradient(first)
        with ledger.briefly(WORK, width * group.targets * sizes.d_model):
            pass
        ledger.drop(LOGITS, width * logits)
        ledger.drop(LOGITS, width * group.targets * sizes.d_model)
        if last:
            ledger.drop(COPIES, self._cast_head)
        ledger.enter(f"{group.name}, backward of the mixture")
        gathered = FP32 * group.targets * layers * sizes.d_model
        with ledger.briefly(WORK, gathered):  # of the weights, before the sum
            ledger.hold(WORK, gathered)
        ledger.drop(STREAMS, gathered)
        ledger.drop(LOGITS, FP32 * group.targets * sizes.d_model)
        shorter = FP32 * (positions - group.rows) * layers * sizes.d_model
        ledger.hold(WORK, shorter)  # put back in their places
        ledger.drop(WORK, gathered)
        if judged:
            with ledger.briefly(WORK, streams):
                pass
        else:
            ledger.hold(STREAMS, streams)
        ledger.drop(WORK, shorter)
        ledger.enter(f"{group.name}, backward of the layers")
        ledger.hold(WORK, stream)
        saved = self._saved(group)
        for _ in range(layers):
            if layout.checkpoint:
                ledger.hold(COPIES, self._cast_layer)
                with ledger.briefly(LAYERS, stream):  # its output
                    ledger.hold(LAYERS, saved)  # computed again
            self._layer_backward(group, saved, stream, first, last)
            if layout.checkpoint or last:
                ledger.drop(COPIES, self._cast_layer)
        ledger.drop(LAYERS, self._state(group.rows))
        ledger.drop(WORK, stream)
        ledger.drop(STREAMS, streams)
        ledger.enter(f"{group.name}, backward of the embedding")
        # Of the embedding, and its sum with that of the head.
        with ledger.briefly(WORK, self.table * (2 if sizes.tie_embeddings else 1)):
            if self._gathers and sizes.tie_embeddings:
                ledger.drop(WORK, self.table)  # what waited for it, in the buffer that is sent
        if not sizes.tie_embeddings:
            self._table_gradient(first)

    def _layer_backward(self, group: RowGroup, saved: int, stream: int, first: bool, last: bool) -> None:
        ledger, sizes, layout = self.ledger, self.sizes, self.layout
        positions, width = group.positions, layout.width
        inner, channels = sizes.d_inner, sizes.conv_channels
        ledger.hold(WORK, stream)  # the gradient past the layer, beside the one that comes in
        # Of the normed output, the projection, the scan's output and the convolved x, B, C.
        numbers = inner + projected(sizes) + inner + channels
        work = width * positions * numbers
        if layout.kernels == "cuda":
            work += self._scan_work(group)
        out = width * positions * inner
        with ledger.briefly(WORK, width * positions * inner):
            self._gradients(FP32 * self.shape.out_proj, first, last)
            ledger.drop(LAYERS, out)
            with ledger.briefly(WORK, work - out):
                pass
        projection = width * positions * projected(sizes)
        normed = width * positions * sizes.d_model
        ledger.drop(LAYERS, saved - out - normed)
        with ledger.briefly(WORK, projection):
            with ledger.briefly(WORK, normed):
                self._gradients(FP32 * (self.shape.in_proj + self.shape.small), first, last)
        ledger.drop(LAYERS, normed)
        with ledger.briefly(WORK, normed + stream):
            pass
        ledger.drop(LAYERS, stream)
        ledger.drop(WORK, stream)

    def _scan_work(self, group: RowGroup) -> int:
        """What mamba-ssm's backward pass of the scan makes beside the gradients: scores of the chunks, their states
        and the states' gradients in fp32 and in the inputs' type."""
        sizes, width = self.sizes, self.layout.width
        chunk = cuda_chunk(sizes.chunk_size)
        chunks = -(-group.length // chunk)
        states = group.rows * chunks * sizes.d_inner * sizes.d_state
        scores = group.rows * chunks * chunk * chunk
        return FP32 * scores + 2 * (FP32 + width) * states + 4 * FP32 * group.positions * sizes.n_heads

    def _gradients(self, size: int, first: bool, last: bool) -> None:
        """Gradients of some weights. Those of several groups are summed before they are added to what earlier
        micro-batches left, so that both are there."""
        ledger, layout = self.ledger, self.layout
        if self._gathers:
            # As they are computed, and in fp32 in the buffer that is sent.
            with ledger.briefly(WORK, self._cast(size // 2) + size):
                if first and not layout.accumulated:
                    ledger.hold(GRADIENTS, -(-size // layout.workers))
        elif first and not (layout.accumulated and last):
            ledger.hold(GRADIENTS, size)
        else:
            with ledger.briefly(WORK, size):
                pass

    def _table_gradient(self, first: bool) -> None:
        """Of the head's matrix; where it is the embedding too, it waits for that one's."""
        if self._gathers and self.sizes.tie_embeddings:
            self.ledger.hold(WORK, self.table)
            if first and not self.layout.accumulated:
                self.ledger.hold(GRADIENTS, -(-self.table // self.layout.workers))
            return
        self._gradients(self.table, first, last=not self.sizes.tie_embeddings)


def native_chunks(length: int, chunk_size: int) -> int:
    """Chunks that the C++ kernels cut a row into: equal ones of 64 tokens at most."""
    longest = min(chunk_size, 64)
    chunks = -(-length // longest)
    return -(-length // -(-length // chunks))


def cuda_chunk(chunk_size: int) -> int:
    """Tokens of a chunk of mamba-ssm's kernels (:mod:`crsm.kernels.cuda`)."""
    return chunk_size if chunk_size in (64, 128, 256) else 256


def kernel_chunk(sizes: BackboneConfig, kernels: KernelName) -> int:
    """Tokens of a chunk of a long row."""
    return min(sizes.chunk_size, 64) if kernels == "native" else cuda_chunk(sizes.chunk_size)
