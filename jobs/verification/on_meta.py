"""A pass through stage 1 at full size without any memory: real code, tensors on the meta device, the C++ left out.

Only sizes are computed, so what the tensors would hold can be counted for models and batches that no machine at hand
has room for. What depends on values is told: how many targets a mask marks; every number that is read is 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from crsm.kernels import native
from crsm.native import require
from jobs.verification.live_tensors import LiveTensors

if TYPE_CHECKING:
    from crsm.config import Config

_aten = torch.ops.aten


class SizesOnly(LiveTensors):
    """Counts on the meta device.

    Args:
        marked: how many entries a mask of a shape marks.
    """

    def __init__(self, marked: dict[tuple[int, ...], int]) -> None:
        super().__init__()
        self._marked = marked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0.0
        if func in (_aten.index.Tensor, _aten._index_put_impl_.default, _aten.index_put_.default):
            args = (args[0], self._places(args[1]), *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _places(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Masks as the numbers of what they mark."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            count = self._marked[tuple(index.shape)]
            found += [torch.empty(count, dtype=torch.int64, device="meta") for _ in index.shape]
        return found


class _NoCore:
    """The C++ core with its sizes and without its work."""

    scan_chunks = staticmethod(lambda length, chunk: require().scan_chunks(length, chunk))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


@contextlib.contextmanager
def _without_the_core() -> Iterator[None]:
    with (
        mock.patch.object(native, "require", _NoCore),
        mock.patch.object(native, "_takes", lambda *tensors: True),
    ):
        yield


def count_on_meta(config: Config, rows: int, length: int) -> int:
    """The most bytes that weights, gradients and activations of a micro-batch of text hold at once, in fp32 on the
    native kernels; the optimizer not counted."""
    from crsm.config import PathStarConfig, TokenizerConfig
    from crsm.data.tokenizer import build_tokenizer
    from crsm.kernels import select_kernels
    from crsm.model import CRSM
    from crsm.tasks import build_tasks
    from crsm.training.backbone import BackboneStage
    from jobs.verification.plan_memory import text_rows

    tasks = build_tasks([PathStarConfig()])
    tokenizer = build_tokenizer(TokenizerConfig(), tasks)
    settings = config.stage_1.model_copy(update={"text": None, "curriculum": ()})
    with torch.device("meta"):
        stage = BackboneStage(CRSM(config, select_kernels("native")), settings, 0, tasks, tokenizer)
    if config.train.checkpoint_activations:
        stage.model.backbone.recompute = True
    batch = text_rows(config, rows, length)
    counter = SizesOnly({(rows, length - 1): rows * (length - 1)})
    counter.add([*stage.parameters(), *stage.buffers()])
    with _without_the_core(), counter:
        loss, _ = stage([batch])
        loss.backward()
    return counter.peak
