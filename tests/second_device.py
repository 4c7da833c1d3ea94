"""A second device without hardware: PyTorch's private backend, its numbers kept on the CPU.

Inside :func:`second_device` there is a device ``DEVICE`` beside the CPU, and it is as strict as a GPU or stricter: an
operator whose tensors lie on both is an error, but for copies and for single numbers; so is a NumPy view of a tensor
that lies there. What comes back to the CPU is counted: on a GPU each of these waits for everything before it.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("privateuseone", 0)

_ops = torch.ops.aten
_CROSSINGS = (_ops._to_copy.default, _ops.copy_.default)
_READS = (_ops._local_scalar_dense.default, _ops.equal.default)
_PACK = _ops._pack_padded_sequence.default
"""Takes lengths on the CPU and gives others there, whatever the device of the rest."""


class There(Tensor):
    """A tensor of the second device, around one of the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        found: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        found.here = here.detach()
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {}, None)

    def __deepcopy__(self, memo: Any) -> There:
        return There(self.here.clone())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({self.here!r})"


class Crossings(TorchDispatchMode):
    """Makes tensors where they are asked for, and counts what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.back = 0
        """Copies to the CPU, and single numbers read, since the last :meth:`reset`."""
        self.made = 0
        """Tensors made on the device by a factory."""

    def reset(self) -> None:
        self.back = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {}, self)


@contextlib.contextmanager
def second_device() -> Iterator[Crossings]:
    """Lets tensors be made on, copied to and fetched from ``DEVICE``."""
    if not hasattr(torch, DEVICE.type):  # what PyTorch looks up before it makes or indexes a tensor there
        module: Any = types.ModuleType(f"torch.{DEVICE.type}")
        module._is_in_bad_fork, module.manual_seed_all = (lambda: False), (lambda seed: None)
        torch._register_device_module(DEVICE.type, module)
        torch._C._acc.register_python_privateuseone_device_guard(backend_registration._DummyDeviceGuard())
    with Crossings() as crossings:
        yield crossings


def _compute(func: Any, args: Any, kwargs: dict[str, Any], crossings: Crossings | None) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if not there and (asked is None or asked.type != DEVICE.type):
        return func(*args, **kwargs)
    with contextlib.nullcontext() if crossings is None else crossings:
        # In inference mode whatever is made of other operators comes here whole.
        made = func.decompose(*args, **kwargs)
    if made is not NotImplemented:
        return made
    apart = [t for t in tensors if not isinstance(t, There) and t.ndim > 0]
    if there and apart and func not in (*_CROSSINGS, _PACK):
        shapes = [f"{'there' if isinstance(t, There) else 'here'} {list(t.shape)}" for t in tensors]
        raise RuntimeError(f"{func}: tensors on two devices: {', '.join(shapes)}")
    here_args, here_kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    if asked is not None:
        here_kwargs["device"] = torch.device("cpu")
    back = (func is _CROSSINGS[0] and asked is not None and asked.type == "cpu") or func in _READS
    back = back or (func is _CROSSINGS[1] and not isinstance(args[0], There))
    if crossings is not None:
        crossings.back += back
        crossings.made += not there
    result = func(*here_args, **here_kwargs)
    if back:
        return args[0] if func is _CROSSINGS[1] else result
    if func.overloadpacket.__name__.endswith("_") and isinstance(args[0], There):
        return args[0]  # in place
    if func is _PACK:
        return There(result[0]), result[1]
    # A view is an inference tensor if what it shows is one, whatever the mode.
    normal = func.is_view and not args[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not normal):
        return tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, result)
