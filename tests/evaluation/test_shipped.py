"""The shipped reasoning checkpoint keeps its promises: size, and planners that help on fresh problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crsm.evaluation.comparison import run_system
from crsm.evaluation.statistics import mcnemar
from crsm.model import ASSETS, Checkpoint, load_checkpoint, use_settings
from crsm.overrides import merge_settings
from crsm.tasks import build_task
from crsm.tasks.base import problems

pytestmark = pytest.mark.skipif(
    not (ASSETS / "reasoning" / "config.json").is_file(), reason="the checkpoint reasoning is not shipped yet"
)


@pytest.fixture(scope="module")
def reasoning() -> Checkpoint:
    torch.set_num_threads(1)
    return load_checkpoint("reasoning")


def right(checkpoint: Checkpoint, name: str, system: str, count: int) -> np.ndarray:
    config = checkpoint.config
    task = build_task(next(task for task in config.tasks if task.label == name))
    run = run_system(
        system,
        checkpoint,
        task,
        problems(task, 3, "test", count),
        deliberation=config.deliberation,
        search=config.search,
        sampling=config.sampling,
        seed=3,
    )
    return np.array([answer.correct for answer in run.answers])


def test_the_reasoning_model_is_small_enough_to_ship(reasoning: Checkpoint) -> None:
    assert sum(reasoning.model.num_parameters().values()) <= 5_000_000
    assert sum(path.stat().st_size for path in (ASSETS / "reasoning").iterdir()) <= 12 * 2**20
    tensors = load_file(ASSETS / "reasoning" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() > 1} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["star_2", "star_5", "tree_path", "prosqa"])
def test_planners_help_on_fresh_problems(reasoning: Checkpoint, name: str) -> None:
    one, two = (right(reasoning, name, system, 120) for system in ("system1", "system2"))
    assert two.mean() > one.mean()
    assert mcnemar(one, two) < 0.001


def test_planners_help_on_graphs_of_a_size_that_was_never_trained(reasoning: Checkpoint) -> None:
    changed = load_checkpoint("reasoning")
    use_settings(changed, merge_settings(reasoning.config, None, ["tasks.star_5.arms=3"], None))
    one, two = (right(changed, "star_5", system, 120) for system in ("system1", "system2"))
    assert two.mean() > one.mean()
    assert mcnemar(one, two) < 0.01
