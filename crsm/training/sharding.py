"""Weights, gradients and optimizer state divided over the workers: FSDP2, ``torch.distributed.fsdp.fully_shard``.

* Sharded is what a stage trains: every layer of the backbone by itself, the rest together. Frozen weights lie whole on
  every worker. They have neither gradients nor moments, and stages 2 to 4 run them as often as the worker's own texts
  are long, while a use of shards is a collective, which all workers must make equally often (``Stage.in_step``).
* Shards are fp32, and gradients are summed in fp32. With ``bf16`` the projections of a layer, nearly all of its
  weights, are gathered as bfloat16.
* A parameter that a worker's batch does not use counts as a gradient of zero there; one that no worker uses gets none,
  as in one process.
* To be saved, tensors are gathered one by one and kept in the first worker's CPU memory: no device ever holds more than
  its shards and one whole tensor. What is saved is what one process saves.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from crsm.mamba_ssm import Layer
from crsm.model import CRSM
from crsm.training.stage import Stage

_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(stage: Stage) -> None:
    """Divides what a stage trains over all workers, in place; they must be connected, and the stage on its device.

    Raises:
        ValueError: this version of torch cannot.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(f"train.strategy = 'fsdp' with torch {torch.__version__}; allowed: torch 2.13 or newer")
    # The states of layers are views, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = init_device_mesh(stage.device.type, (dist.get_world_size(),))
    free = [name for name, parameter in stage.named_parameters() if getattr(parameter, "_no_weight_decay", False)]
    for layer in cast(Iterable[Layer], stage.model.backbone.layers):
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            continue
        if stage.precision == "bf16":
            fully_shard([layer.mixer.in_proj, layer.mixer.out_proj], mesh=mesh, mp_policy=_BF16)
        fully_shard(layer, mesh=mesh)
    frozen = {parameter for parameter in stage.parameters() if not parameter.requires_grad}
    fully_shard(stage, mesh=mesh, ignored_params=frozen)
    cast(FSDPModule, stage).set_reduce_scatter_unused_params(True)
    for method in ("evaluate", "finish"):
        register_fsdp_forward_method(stage, method)
    parameters = dict(stage.named_parameters())
    for name in free:  # the shards are new parameters
        parameters[name]._no_weight_decay = True  # type: ignore[attr-defined]
    stage.in_step = True


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def release(module: nn.Module) -> None:
    """Frees what a pass without gradients has gathered."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextlib.contextmanager
def synchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients are exchanged after the last one of a step only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    yield


def clip_shards(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """:func:`crsm.training.optimizer.clip_gradients` for shards, the same on all workers.

    Drops the gradients of parameters that no worker has used.
    """
    used = [parameter for parameter in parameters if parameter.grad is not None]
    shards = [_part(cast(Tensor, parameter.grad)) for parameter in used]
    squares_P = torch.stack([shard.float().square().sum() for shard in shards])
    dist.all_reduce(squares_P)
    norm = squares_P.sum().sqrt()
    torch._foreach_mul_(shards, (limit / (norm + 1e-6)).clamp(max=1.0))
    for parameter, square in zip(used, squares_P.tolist(), strict=True):
        if square == 0:
            parameter.grad = None
    return norm


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, on workers that ``keep`` them; all workers must call it with the same names."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().to("cpu", copy=full is tensor)
        del full
    return whole


def divided_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as ``like`` is stored: on its device, and this worker's shard of it where ``like`` is sharded."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def whole_model(stage: Stage, keep: bool) -> CRSM | None:
    """A model without shards, on the CPU, on workers that ``keep`` it; all workers must call it."""
    model = stage.model
    tensors = gather(dict(model.state_dict()), keep)
    if not keep:
        return None
    with torch.device("meta"):
        fresh = CRSM(model.config, model.backbone.kernels)
    fresh.load_state_dict(tensors, assign=True)
    if model.config.model.backbone.tie_embeddings:
        fresh.lm_head.weight = fresh.backbone.embedding.weight
    return fresh


def bytes_of(tensors: Iterable[Any]) -> int:
    """Memory of this worker's parts of tensors."""
    parts = [_part(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)
