"""What the machine can do, measured on the spot and with the same threads: the limits that the rows are held against.

A limit is the best that any implementation here reached at any time of the run, ours among them, so that no share is
flattered by a slow one or by a moment in which the machine had something else to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

WORKING_SET = 512 * 2**20
"""Bytes that no cache holds."""

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""


@dataclass(slots=True)
class Roofline:
    """Measured limits of this machine; reads of other sizes are measured when they are asked for."""

    threads: int
    quick: bool = False
    device: str = "cpu"
    gemm_gflops: float = 0.0
    """fp32 matrix product (bf16 on a GPU), the best of ``gemm``."""
    gemm: dict[str, float] = field(default_factory=dict)
    """GFLOP/s per implementation."""
    read: dict[int, float] = field(default_factory=dict)
    """GB/s of reading so many bytes again and again."""

    @property
    def read_gbs(self) -> float:
        """Reading from memory."""
        return self.read_gbs_of(WORKING_SET if not self.quick else 2**20)

    def read_gbs_of(self, size: int) -> float:
        """GB/s of reading ``size`` bytes over and over: from the cache that holds them, or from memory.

        Measured with every call; the best one counts.
        """
        size = max(1 << 16, size)
        self.read[size] = max(self.read.get(size, 0.0), measure_read(size, self.device, 0.05 if self.quick else 0.4))
        return self.read[size]

    def measure_gemm(self) -> None:
        """Measures the matrix product, once more if it was; the best one counts."""
        size = 256 if self.quick else GEMM_SIZE[self.device]
        found = measure_gemm(size, self.device, 0.05 if self.quick else 0.5)
        self.gemm = {name: max(rate, self.gemm.get(name, 0.0)) for name, rate in found.items()}
        self.gemm_gflops = max(self.gemm.values())

    def products_per_second(self, multiply_adds: float, weight_bytes: float, batch: int = 1) -> float:
        """How often a network of dense layers can be applied to a batch, in items a second.

        Every item costs its multiply-adds at the rate of the matrix product; every batch reads all weights once.
        """
        compute = self.gemm_gflops * 1e9 / (2 * multiply_adds)
        traffic = self.read_gbs_of(int(weight_bytes)) * 1e9 / weight_bytes * batch
        return min(compute, traffic)


def measure(threads: int, quick: bool = False, device: str = "cpu") -> Roofline:
    """The machine's limits with ``threads`` threads, which must already be set."""
    roofline = Roofline(threads, quick, device)
    roofline.measure_gemm()
    assert roofline.read_gbs > 0
    return roofline


def measure_gemm(size: int, device: str, seconds: float) -> dict[str, float]:
    """GFLOP/s of a square matrix product, per implementation: fp32 on the CPU, bf16 on a GPU."""
    import torch

    from crsm import native

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    found = {"torch": 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), seconds, device) / 1e9}
    core = native.core
    if device == "cpu" and core is not None and hasattr(core, "linear"):
        x, weight, y = a.numpy(), b.numpy(), out.numpy()
        found["native"] = 2 * size**3 / _best(lambda: core.linear(x, weight, y), seconds, device) / 1e9
    return found


def measure_read(size: int, device: str, seconds: float) -> float:
    """GB/s of summing ``size`` bytes."""
    import torch

    data = torch.ones(size // 4, device=device)
    ways: list[Callable[[], object]] = [data.sum, data.amax]
    if device == "cpu":
        array = data.numpy()
        ways.append(lambda: array.sum())  # one thread, which costs no start of others: for what a cache holds
    # Ways to touch every byte once; which of them is the fastest depends on machine and size.
    return size / min(_best(way, seconds / len(ways), device) for way in ways) / 1e9


def _best(run: Callable[[], object], seconds: float, device: str) -> float:
    """Seconds of the fastest of as many runs as fit into ``seconds``, five at least."""
    from jobs.speed.timing import synchronized, timed

    sample = timed(synchronized(run, device))
    sample()
    best, until, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 5 or time.perf_counter() < until:
        best = min(best, sample())
        count += 1
    return best
