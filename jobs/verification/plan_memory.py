"""Measures the memory of some steps of stage 1 in this process; see :mod:`jobs.verify_plan`.

The rows are made up: text of several documents for a config that reads text, else the config's own problems.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crsm.config import Config
    from crsm.data.sequences import Batch
    from crsm.scaling.plan import Plan
    from crsm.training.backbone import BackboneStage

STEPS = 2
"""The first makes the optimizer's moments."""


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One config, cut to what fits, through ``STEPS`` steps.

    Args:
        task: ``config``, ``overrides``, ``rows`` and ``length`` of made-up text, ``limit`` in gigabytes, and ``count``:
            live tensors (True) or the growth of the process.
    """
    from crsm.config import load_config

    config = load_config(task["config"], task["overrides"])
    all_layers = config.model.backbone.n_layer
    plan = cut_to(with_rows(config, task["rows"], task["length"]), task["limit"])
    # What importing takes is not the model's.
    import torch

    from crsm.training.loop import run_stage

    torch.set_num_threads(config.train.threads or 1)
    _warm_up()
    before = resident()
    stage, batches = build(plan, task)
    found = count_tensors(stage, batches) if task["count"] else {}
    if not task["count"]:
        _feed(stage, batches)
        run_stage(stage)
        found["process"] = high_water() - before
    layers = plan.config.model.backbone.n_layer
    shape = ", ".join(f"{group.rows} x {group.length} {group.name}" for group in plan.workload.groups)
    return {
        "name": plan.config.name,
        "layers": layers,
        "all_layers": all_layers,
        "shape": shape,
        "planned": plan.memory.peak,
        "parts": plan.memory.parts,
        "moment": plan.memory.moment,
        **found,
    }


def _warm_up() -> None:
    """A step of a small model: what libraries load and keep when they are first used is not the model's either."""
    from crsm.config import Config
    from crsm.training.loop import run_stage

    config = Config()
    stage = config.stage_1.model_copy(update={"steps": 1, "batch": 4})
    plan = cut_to(config.model_copy(update={"stage_1": stage}), 1.0)
    small, _ = build(plan, {})
    _feed(small, None)
    run_stage(small)


def with_rows(config: Config, rows: int, length: int) -> Config:
    """One micro-batch of so many rows of text on one worker, where the config reads text; its own problems else."""
    stage = config.stage_1.model_copy(update={"steps": STEPS, "curriculum": ()})
    if stage.text is not None:
        text = stage.text.model_copy(update={"length": length, "share": 1.0})
        optimizer = stage.optimizer.model_copy(update={"accumulate": 1})
        stage = stage.model_copy(update={"text": text, "batch": rows, "optimizer": optimizer})
    train = config.train.model_copy(update={"workers": 1, "use_gpu": False, "precision": "fp32", "strategy": "ddp"})
    return config.model_copy(update={"stage_1": stage, "train": train})


def cut_to(config: Config, limit: float) -> Plan:
    """The plan of a config on a CPU worker, with as many of its layers as ``limit`` gigabytes hold."""
    from crsm.scaling.devices import GB, Device
    from crsm.scaling.plan import make_plan

    device = Device("cpu", limit * GB, 1.0, None, None, "given")
    plan = make_plan(config, 1, device)
    while plan.memory.peak > device.room:
        sizes = plan.config.model.backbone
        if sizes.n_layer == 1:
            raise ValueError(f"{config.name}: one layer needs {plan.memory.peak / GB:.1f} GB; allowed: more --limit")
        layers = min(sizes.n_layer - 1, max(1, int(sizes.n_layer * plan.device.room / plan.memory.peak)))
        world = plan.config.model.world_model.model_copy(update={"read_layers": (layers - 1,)})
        model = plan.config.model.model_copy(
            update={"backbone": sizes.model_copy(update={"n_layer": layers}), "world_model": world}
        )
        plan = make_plan(plan.config.model_copy(update={"model": model}), 1, device)
    return plan


def build(plan: Plan, task: dict[str, Any]) -> tuple[BackboneStage, list[Batch] | None]:
    """The stage, and its made-up rows if it reads text."""
    import torch

    from crsm.config import PathStarConfig, TokenizerConfig
    from crsm.data.tokenizer import build_tokenizer
    from crsm.model import CRSM
    from crsm.tasks import build_tasks
    from crsm.training.backbone import BackboneStage

    config = plan.config
    torch.manual_seed(0)
    settings, batches = config.stage_1, None
    # Made-up rows need no tokenizer; a stage has one all the same.
    tasks = build_tasks(config.tasks if settings.text is None else [PathStarConfig()])
    tokenizer = build_tokenizer(config.tokenizer if settings.text is None else TokenizerConfig(), tasks, config.seed)
    if settings.text is not None:
        batches = [text_rows(config, task["rows"], task["length"])]
        settings = settings.model_copy(update={"text": None})
    model = CRSM(config)
    if model.backbone.kernels.NAME != plan.kernels:
        raise ValueError(f"kernels = {model.backbone.kernels.NAME!r}; the plan is for {plan.kernels!r}")
    return BackboneStage(model, settings, config.seed, tasks, tokenizer), batches


def text_rows(config: Config, rows: int, length: int) -> Batch:
    """Random tokens, two documents a row."""
    import numpy as np

    from crsm.data.sequences import TEXT, Batch

    tokens_BT = np.random.default_rng(0).integers(config.model.backbone.vocab_size, size=(rows, length))
    targets_mask_BT = np.ones((rows, length), bool)
    targets_mask_BT[:, 0] = False
    segment_BT = np.zeros((rows, length), np.int32)
    segment_BT[:, length // 2 :] = 1
    return Batch(
        tokens_BT=tokens_BT,
        targets_mask_BT=targets_mask_BT,
        value_mask_BT=np.zeros((rows, length), bool),
        outcome_BT=np.zeros((rows, length), np.float32),
        segment_BT=segment_BT,
        answer_start_B=np.zeros(rows, np.int64),
        lengths_B=np.full(rows, length, np.int64),
        task_index_B=np.full(rows, TEXT, np.int64),
        step_targets=int(targets_mask_BT.sum()),
        step_values=1,
    )


def _feed(stage: BackboneStage, batches: list[Batch] | None) -> None:
    """Gives the stage its made-up rows; nothing is evaluated."""
    if batches is not None:
        stage.batch = lambda *_: batches  # type: ignore[method-assign]
    stage.evaluate = dict  # type: ignore[method-assign]


def count_tensors(stage: BackboneStage, batches: list[Batch] | None) -> dict[str, int]:
    """The most bytes of tensors that were alive at once in the last step."""
    from crsm.training.loop import run_stage
    from jobs.verification.live_tensors import LiveTensors

    _feed(stage, batches)
    counter, batch = LiveTensors(), stage.batch

    def at_the_start_of_a_step(*place: int) -> list[Batch]:
        counter.restart()
        return batch(*place)

    stage.batch = at_the_start_of_a_step  # type: ignore[method-assign, assignment]
    counter.add([*stage.parameters(), *stage.buffers()])
    peaks = []

    def evaluate() -> dict[str, float]:
        peaks.append(counter.peak)
        return {}

    stage.evaluate = evaluate  # type: ignore[method-assign]
    with counter:
        run_stage(stage)
    return {"tensors": peaks[-1]}


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def high_water() -> int:
    """The most that ever were."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
