"""The device of an actor: a GPU only if Ray reserves one, or a share of one, for it."""

from __future__ import annotations

from collections.abc import Sequence

from actors.cluster import require_resources
from crsm.config import DeviceName, EngineConfig, PlannersConfig

_ROUNDING = 1e-9
"""Ray counts in ten-thousandths; three thirds are one."""


def planner_device(planners: PlannersConfig) -> DeviceName:
    """Where planner actors compute.

    Raises:
        ValueError: a GPU is asked for and none is reserved, or the cluster has fewer than are reserved.
    """
    _require(
        [planners.num_gpus] * planners.count, f"planners.count = {planners.count}, num_gpus = {planners.num_gpus:g}"
    )
    return _device(planners.device, planners.num_gpus, "planners.device", "planners.num_gpus")


def generator_device(engine: EngineConfig, num_gpus: float, planners: PlannersConfig) -> DeviceName:
    """Where a generator actor computes that starts these planners.

    Raises:
        ValueError: likewise, for all of them together; or several GPUs and a part of one, which Ray does not give.
    """
    if num_gpus < 0 or (num_gpus > 1 and num_gpus != int(num_gpus)):
        raise ValueError(f"the generator's num_gpus = {num_gpus:g}; allowed: 0, a share of one, or a whole number")
    planner_device(planners)
    more = f" and {planners.count} planners with {planners.num_gpus:g} each" if planners.num_gpus else ""
    _require([num_gpus, *[planners.num_gpus] * planners.count], f"a generator with {num_gpus:g} GPU{more}")
    return _device(engine.device, num_gpus, "engine.device", "the generator's num_gpus")


def gpus_needed(shares: Sequence[float]) -> int:
    """GPUs that hold so many shares, each of them whole on one: the largest first, each where it still fits."""
    whole = sum(int(share) for share in shares if share >= 1)
    left: list[float] = []
    for share in sorted((share for share in shares if 0 < share < 1), reverse=True):
        for number, room in enumerate(left):
            if room >= share - _ROUNDING:
                left[number] -= share
                break
        else:
            left.append(1 - share)
    return whole + len(left)


def _require(shares: Sequence[float], what: str) -> None:
    if gpus := gpus_needed(shares):
        require_resources({"GPU": float(gpus)}, what)


def _device(name: DeviceName, num_gpus: float, setting: str, reserved: str) -> DeviceName:
    if num_gpus == 0 and name == "cuda":
        raise ValueError(f"{setting} = 'cuda' with {reserved} = 0; allowed: a GPU or a share of one, auto, or cpu")
    # A GPU that is not reserved belongs to others, whether this process could see it or not.
    return "cpu" if num_gpus == 0 else name
