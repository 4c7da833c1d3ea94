"""One worker, several with copies, several with shards, and a run that changes between them: one curve."""

import pytest

from crsm.config import load_config
from jobs import verify_workers
from jobs.local_workers import Leg
from jobs.verify_workers import TINY, largest_difference, legs, losses

TOLERANCE = 1e-4


def settings(stage, steps, *changes):
    log = (f"{stage}.steps={steps}", f"{stage}.log_every=1", f"{stage}.evaluate_every=1000")
    return load_config(None, [*TINY, *log, f"{stage}.checkpoint_every=1000", *changes])


def differences(stage, steps, runs, *changes):
    config = settings(stage, steps, *changes)
    alone = losses(config, stage, [Leg()])
    assert len(alone) == steps
    return {how: largest_difference(losses(config, stage, row), alone) for how, row in runs.items()}


@pytest.mark.serial
@pytest.mark.parametrize(("stage", "steps"), [("stage_1", 50), ("stage_2", 50), ("stage_4", 50)])
def test_two_workers_with_copies_or_shards_have_the_losses_of_one(stage, steps):
    runs = {strategy: [Leg(2, strategy)] for strategy in ("ddp", "fsdp")}
    found = differences(stage, steps, runs)
    print(stage, found)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.serial
def test_a_run_of_two_then_one_then_four_workers_continues_the_curve():
    runs = {"changing": [Leg(2, "fsdp", 4), Leg(1, "ddp", 8), Leg(4, "fsdp")]}
    found = differences("stage_1", 12, runs, "train.checkpoint_activations=true")
    assert found["changing"] < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_1", "stage_2", "stage_4"])
def test_four_workers_have_the_losses_of_one_over_50_steps(stage):
    found = differences(stage, 50, legs(4, 50))
    print(stage, found)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
def test_shards_in_bf16_have_the_losses_of_one_process_in_bf16_to_its_rounding():
    config = settings("stage_1", 30, "train.precision=bf16")
    alone = losses(config, "stage_1", [Leg()])
    for row in ([Leg(2, "ddp")], [Leg(2, "fsdp")]):
        assert losses(config, "stage_1", row) == pytest.approx(alone, rel=0.02)


def test_another_stage_is_refused():
    with pytest.raises(ValueError, match="stage = 'stage_3'; allowed: stage_1, stage_2, stage_4"):
        verify_workers.main(stage=["stage_3"])
