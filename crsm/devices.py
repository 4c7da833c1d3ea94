"""Where a model lies, and how numbers cross between its device and the host.

The settings say where an engine and a deliberator compute, and :mod:`crsm.placement` puts their model there; they make
their tensors where the model lies. Messages, saved states and search trees stay on the host; everything that crosses
does so here. Invariants:

* on the CPU nothing is copied and nothing waited for: what is there already comes back as it is;
* what goes to a GPU goes through pinned memory and is not waited for;
* what comes back is waited for once, however many tensors it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crsm.types import LayerState, ModelState

CPU = torch.device("cpu")
DEVICES = ("auto", "cpu", "cuda")
"""What settings may name; ``auto`` is a GPU if there is one."""


def pick_device(name: str, setting: str = "device") -> torch.device:
    """The device that a setting names.

    Raises:
        ValueError: no such name, or no such device here.
    """
    if name not in DEVICES:
        raise ValueError(f"{setting} = {name!r}; allowed: {', '.join(DEVICES)}")
    if name == "cpu":
        return CPU
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise ValueError(f"{setting} = 'cuda': this machine has none that torch can use; allowed: auto, cpu")
    return CPU


def device_of(model: nn.Module) -> torch.device:
    """Where a model lies: all of it, or it could not compute."""
    return next(model.parameters()).device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; what is done there later comes after it."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.is_cpu and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def index_on(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Rows, slots or tokens as a tensor on a device."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device on the CPU, there when this returns."""
    device = next((tensor.device for tensor in tensors if not tensor.is_cpu), CPU)
    if device.type != "cuda":
        return tuple(tensor.cpu() for tensor in tensors)
    found = tuple(tensor.to(CPU, non_blocking=True) for tensor in tensors)  # into pinned memory
    torch.cuda.current_stream(device).synchronize()
    return found


def rows_to_host(numbers_RA: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Integers below 2³¹ and float32 parts with as many rows, on the CPU: by one copy, whatever their number."""
    if numbers_RA.is_cpu:
        return numbers_RA, *parts
    bits_RA = numbers_RA.to(torch.int32).view(torch.float32)  # one kind of number, to travel together
    (together,) = to_host(torch.cat([bits_RA, *parts], dim=1))
    bits_RA, *found = together.split([part.shape[1] for part in (numbers_RA, *parts)], dim=1)
    return bits_RA.contiguous().view(torch.int32).to(numbers_RA.dtype), *(part.contiguous() for part in found)


def state_on(state: ModelState, device: torch.device) -> ModelState:
    """A state on a device."""
    if state.layers[0].ssm_BHPN.device == device:
        return state
    return ModelState(
        tuple(
            LayerState(to_device(layer.conv_BCK, device), to_device(layer.ssm_BHPN, device)) for layer in state.layers
        )
    )


_streams = threading.local()


def own_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Has what this thread does on a GPU wait for nothing but itself: planners beside a generator in one process."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    mine: dict[str, torch.cuda.Stream] = _streams.__dict__
    if str(device) not in mine:
        mine[str(device)] = torch.cuda.Stream(device)
    return torch.cuda.stream(mine[str(device)])
