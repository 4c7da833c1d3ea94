"""Several workers under DDP do what one does with the same global batch."""

import contextlib
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from crsm.config import load_config
from crsm.data.tokenizer import build_tokenizer
from crsm.model import build_model
from crsm.tasks import build_tasks
from crsm.training.backbone import BackboneStage
from crsm.training.execution import run_connected
from crsm.training.loop import LoopState, run_stage

OVERRIDES = [
    "model.backbone={d_model: 32, n_layer: 2, d_state: 8, headdim: 16, chunk_size: 16}",
    "model.world_model={width: 16, decoder_width: 16}",
    "model.writer.width=16",
    "tasks=[{name: path_star, arms: 3, length: 4, labels: 30}]",
    "stage_1.steps=20",
    "stage_1.batch=8",
    "stage_1.log_every=1",
    "stage_1.evaluate_every=1000",
    "stage_1.evaluate_problems=8",
    "stage_1.optimizer={warmup: 5, accumulate: 2}",
]


class Poisoned(BackboneStage):
    """The second worker's loss is not finite at step 1."""

    def forward(self, batch):
        loss, metrics = super().forward(batch)
        if dist.get_rank() == 1 and self.poisoned_step():
            loss = loss + math.nan
        return loss, metrics

    def poisoned_step(self):
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls > 2  # two micro-batches a step


def make_stage(kind=BackboneStage):
    config = load_config(None, OVERRIDES)
    tasks = build_tasks(config.tasks)
    tokenizer = build_tokenizer(config.tokenizer, tasks, config.seed)
    torch.manual_seed(config.seed)
    return kind(build_model(config, tokenizer), config.stage_1, config.seed, tasks, tokenizer)


PATIENCE = timedelta(seconds=120)


def work(rank, world, folder, poisoned):
    torch.set_num_threads(1)

    def train():
        stage = make_stage(Poisoned if poisoned else BackboneStage)
        module = DistributedDataParallel(stage, find_unused_parameters=True)
        found: dict[str, object] = {}
        try:
            result = run_stage(stage, rank=rank, world=world, module=module)
            found = {"losses": [point["loss"] for point in result.curve if "loss" in point]}
        except FloatingPointError as error:
            found = {"error": str(error)}
        torch.save({**found, "weights": stage.model.state_dict()}, f"{folder}/rank_{rank}")

    run_connected(train, rank=rank, world=world, store=f"{folder}/store", patience=PATIENCE)


def run_two(folder: Path, poisoned: bool = False):
    mp.spawn(work, args=(2, str(folder), poisoned), nprocs=2)
    return [torch.load(folder / f"rank_{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.serial
def test_two_workers_equal_one_over_20_steps(tmp_path):
    first, second = run_two(tmp_path)
    stage = make_stage()
    losses = [point["loss"] for point in run_stage(stage).curve if "loss" in point]
    assert len(losses) == 20
    assert first["losses"] == pytest.approx(losses, abs=1e-4)
    assert first["losses"] == second["losses"]
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        assert torch.allclose(first["weights"][name], tensor, atol=1e-4), name
    assert losses[-1] < losses[0]


class Preempted(Exception):
    pass


def run_part(rank, world, folder, first, last):
    """Steps ``first`` to ``last``. Only the worker of the highest rank hears that it has to stop there."""
    torch.set_num_threads(1)

    def train():
        stage = make_stage()
        module = DistributedDataParallel(stage, find_unused_parameters=True) if world > 1 else None
        steps = first

        def save_now():
            nonlocal steps
            steps += 1
            return rank == world - 1 and steps == last

        def save(state):
            assert state.step == last
            if rank == 0:
                state.save(f"{folder}/state_{last}")
            raise Preempted

        resume = LoopState.load(f"{folder}/state_{first}", stage.name) if first else None
        with contextlib.suppress(Preempted):
            run_stage(
                stage, rank=rank, world=world, module=module, resume=resume, on_checkpoint=save, save_now=save_now
            )

    if world == 1:
        train()
    else:
        run_connected(train, rank=rank, world=world, store=f"{folder}/store_{first}", patience=PATIENCE)


@pytest.mark.serial
def test_workers_that_become_fewer_and_more_end_where_one_ends(tmp_path):
    mp.spawn(run_part, args=(2, str(tmp_path), 0, 7), nprocs=2)
    threads = torch.get_num_threads()
    run_part(0, 1, str(tmp_path), 7, 13)
    torch.set_num_threads(threads)
    mp.spawn(run_part, args=(2, str(tmp_path), 13, 20), nprocs=2)
    state = LoopState.load(tmp_path / "state_20", "stage_1")
    stage = make_stage()
    undisturbed = run_stage(stage)
    losses = [point["loss"] for point in state.curve]
    assert losses == pytest.approx([point["loss"] for point in undisturbed.curve if "loss" in point], abs=1e-4)
    assert len(losses) == 20 and state.tokens == sum(
        int(batch.lengths_B.sum())
        for step in range(20)
        for micro in range(2)
        for batch in stage.batch(step, micro, 0, 1)
    )


@pytest.mark.serial
def test_a_bad_loss_on_one_worker_stops_all_of_them_before_the_update(tmp_path):
    first, second = run_two(tmp_path, poisoned=True)
    assert "step 1: loss = nan; nothing was updated" in second["error"]
    assert "step 1: " in first["error"] and "nothing was updated" in first["error"]
    for name, tensor in first["weights"].items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, second["weights"][name]), name
