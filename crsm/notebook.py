"""What every notebook of ``docs/notebooks`` begins with: how large it runs, and on what."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch

from crsm.config import core_count
from crsm.threads import use_threads

VARIABLE = "CRSM_NOTEBOOK_SIZE"
SIZES = {"full": "minutes on two cores", "tiny": "seconds, and figures that mean nothing"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Notebook:
    """How a notebook runs."""

    size: str
    """One of ``SIZES``."""
    device: torch.device
    """What stages train on; generation and search are the CPU's."""

    def pick(self, *, full: T, tiny: T) -> T:
        """The setting for the size."""
        return tiny if self.size == "tiny" else full


def begin() -> Notebook:
    """Takes the size from the environment and all cores, looks for a GPU, and says all that in one line.

    Raises:
        ValueError: ``CRSM_NOTEBOOK_SIZE`` is no size.
    """
    size = os.environ.get(VARIABLE) or "full"
    if size not in SIZES:
        raise ValueError(f"{VARIABLE} = {size!r}; allowed: {', '.join(SIZES)}")
    threads = core_count()
    use_threads(threads)
    if torch.cuda.is_available():
        place = f"GPU: {torch.cuda.get_device_name()} trains; generation and search run on the CPU"
    else:
        place = f"no GPU: everything runs on the CPU ({threads} threads), with models of a size for it"
    print(f"{place}. Size {size}: {SIZES[size]}.")
    return Notebook(size, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
