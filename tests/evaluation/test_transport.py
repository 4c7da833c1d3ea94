"""Transport of writes: exact in the first layer, measured in the others."""

from __future__ import annotations

import pytest
import torch

from crsm.evaluation.steering_audit import Line, lines_of
from crsm.evaluation.transport import transport_errors
from crsm.injection import inject, outer_write
from crsm.model import Checkpoint
from crsm.tasks import build_task
from crsm.tasks.base import problems
from tests.fixtures import TASK, tiny_checkpoint

RATE = 0.3


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def lines(checkpoint: Checkpoint) -> list[Line]:
    task = build_task(TASK)
    return [line for line in lines_of(checkpoint, task, problems(task, 3, "test", 6), 3) if line.correct]


def test_a_carried_difference_is_exact_in_the_first_layer(checkpoint: Checkpoint, lines: list[Line]) -> None:
    rows = transport_errors(checkpoint, lines, rate=RATE, late=(1, 3))
    first = [row for row in rows if row["layer"] == 0]
    assert [row["late"] for row in first] == [1, 3]
    assert all(row["carried"] < 1e-5 for row in first)
    # What is left alone, or multiplied by a rule of thumb, is not.
    assert all(row["raw"] > 100 * row["carried"] and row["fixed"] > 100 * row["carried"] for row in first)


def test_above_it_the_inputs_differ(checkpoint: Checkpoint, lines: list[Line]) -> None:
    rows = transport_errors(checkpoint, lines, rate=RATE, late=(3,))
    assert next(row for row in rows if row["layer"] == 1)["carried"] > 1e-4


@torch.inference_mode()
def test_the_errors_are_those_of_two_runs_by_hand(checkpoint: Checkpoint, lines: list[Line]) -> None:
    """One token after the write, in the second layer: what really changed beside what was carried."""
    model = checkpoint.model
    _, _, before = model.prefill(torch.tensor([line.prompt for line in lines]))
    length = checkpoint.config.deliberation.plan_length
    planned = torch.tensor([line.answer[1 : 1 + length] for line in lines])
    write = model.writer(planned, torch.full((len(lines),), planned.shape[1]))
    alpha = torch.full((len(lines),), RATE)
    written = before.with_ssm(
        tuple(
            inject(layer.ssm_BHPN, outer_write(write.u_BLRE[:, i], write.b_BLRN[:, i], layer.ssm_BHPN.shape[1]), alpha)
            for i, layer in enumerate(before.layers)
        )
    )
    token = torch.tensor([line.answer[0] for line in lines])
    plain, steered = model.backbone.step(token, before), model.backbone.step(token, written)
    effect = steered.state.layers[1].ssm_BHPN - plain.state.layers[1].ssm_BHPN
    delta = written.layers[1].ssm_BHPN - before.layers[1].ssm_BHPN
    carried = delta * steered.decay_LBH[1][..., None, None]
    (row,) = (row for row in transport_errors(checkpoint, lines, rate=RATE, late=(1,)) if row["layer"] == 1)
    assert row["carried"] == pytest.approx(float((carried - effect).norm() / effect.norm()), rel=1e-4)
    assert row["raw"] == pytest.approx(float((delta - effect).norm() / effect.norm()), rel=1e-4)


def test_lines_of_several_lengths_are_refused(checkpoint: Checkpoint, lines: list[Line]) -> None:
    longer = lines[0]._replace(prompt=(*lines[0].prompt, 1))
    with pytest.raises(ValueError, match="allowed: the same of all"):
        transport_errors(checkpoint, [lines[0], longer], rate=RATE, late=(1,))
    with pytest.raises(ValueError, match="numbers from 1 on"):
        transport_errors(checkpoint, lines, rate=RATE, late=(0,))
