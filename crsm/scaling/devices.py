"""Devices that a plan can be made for: memory and peak arithmetic, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the part of a machine's memory that one worker has."""

    name: str
    memory: float
    """Bytes; of the data sheet's gigabytes a thousand million each."""
    usable: float
    """Share of the memory that tensors may take; the rest is the driver's context, NCCL's buffers and what the
    allocator cannot fill (assumed)."""
    bf16_flops: float | None
    """Dense matrix products per second in bf16, accumulated in fp32; None: not known."""
    fp32_flops: float | None
    """Outside of the tensor cores, which PyTorch does not use for fp32 by default."""
    source: str

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    @property
    def room(self) -> float:
        """Bytes that tensors may take."""
        return self.memory * self.usable

    def flops(self, precision: str) -> float | None:
        """Peak operations per second at a precision of training."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


def _gpu(name: str, gigabytes: float, bf16_tera: float, fp32_tera: float, source: str) -> Device:
    return Device(name, gigabytes * GB, 0.92, bf16_tera * 1e12, fp32_tera * 1e12, source)


DEVICES = {
    device.name: device
    for device in (
        _gpu("A10", 24, 125, 31.2, "NVIDIA A10 data sheet"),
        _gpu("A100-40", 40, 312, 19.5, "NVIDIA A100 data sheet, SXM4"),
        _gpu("A100-80", 80, 312, 19.5, "NVIDIA A100 data sheet, SXM4"),
        _gpu("H100", 80, 989, 67, "NVIDIA H100 data sheet, SXM5; half of the figure with sparsity"),
        _gpu("H100-PCIE", 80, 756, 51, "NVIDIA H100 data sheet, PCIe; half of the figure with sparsity"),
        _gpu("H200", 141, 989, 67, "NVIDIA H200 data sheet, SXM; half of the figure with sparsity"),
        _gpu("L4", 24, 121, 30.3, "NVIDIA L4 data sheet; half of the figure with sparsity"),
        _gpu("L40S", 48, 362, 91.6, "NVIDIA L40S data sheet"),
        _gpu("RTX4090", 24, 165.2, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A"),
    )
}

_FORM = re.compile(
    r"(?:(?P<count>[0-9]+)x)?(?P<name>[A-Za-z][A-Za-z0-9-]*?)(?::(?P<memory>[0-9]+(?:\.[0-9]+)?)GB)?", re.ASCII
)
MAX_DEVICES = 1 << 20


def parse_devices(text: str) -> tuple[int, Device]:
    """``8xH100``, ``H100``, ``2xcpu:12GB``: how many devices of which kind. ``:12GB`` is the memory of each.

    Raises:
        ValueError: another form, no device, a kind that is not known, or a CPU without its memory.
    """
    known = f"{', '.join(DEVICES)}, cpu:<memory>GB"
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"gpus = {text!r}; allowed: COUNTxNAME or COUNTxNAME:MEMORYGB, NAME being one of {known}")
    count = int(found["count"] or 1)
    if not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"gpus = {text!r}: {count} devices; allowed: 1 to {MAX_DEVICES}")
    memory = None if found["memory"] is None else float(found["memory"]) * GB
    if memory is not None and memory <= 0:
        raise ValueError(f"gpus = {text!r}: no memory; allowed: more than 0 GB")
    if found["name"].lower() == "cpu":
        if memory is None:
            raise ValueError(f"gpus = {text!r}; allowed: the memory of a worker too, as in {count}xcpu:12GB")
        return count, Device("cpu", memory, 1.0, None, None, "given")
    named = next((device for name, device in DEVICES.items() if name.lower() == found["name"].lower()), None)
    if named is None:
        raise ValueError(f"gpus = {text!r}: {found['name']!r} is not known; allowed: {known}")
    if memory is None:
        return count, named
    given = Device(
        named.name, memory, named.usable, named.bf16_flops, named.fp32_flops, f"{named.source}; memory given"
    )
    return count, given
