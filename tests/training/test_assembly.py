"""Stage 4: what a write does to the tokens it plans and to those after, and whom it teaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crsm.config import AssemblyStageConfig, OptimizerConfig
from crsm.data import AttemptGroup
from crsm.injection import carry, inject, outer_write, withdraw
from crsm.model import CRSM
from crsm.tasks import build_task
from crsm.training.assembly import AssemblyStage, Drawn, write_losses
from crsm.training.traces import Texts
from crsm.types import ModelState
from tests.fixtures import TASK, tiny_checkpoint, tiny_tokenizer
from tests.training.texts import equal_group, parts_of, prompt_of, ragged_group

groups = pytest.mark.parametrize("make", [equal_group, ragged_group])


def draw(
    target: int,
    lengths: list[int],
    alpha: float = 0.3,
    earlier: list[int] | None = None,
    withdrawn: list[bool] | None = None,
) -> Drawn:
    count = len(lengths)
    return Drawn(
        target,
        np.array(lengths),
        np.full(count, alpha, np.float32),
        np.array(earlier or [0] * count),
        np.array(withdrawn or [False] * count),
    )


def write_of(model: CRSM, line: list[int]) -> list[Tensor]:
    """The writer's outer products for one line, per layer."""
    write = model.writer(torch.tensor([line]), torch.tensor([len(line)]))
    heads = model.config.model.backbone.n_heads
    return [outer_write(write.u_BLRE[:, i], write.b_BLRN[:, i], heads) for i in range(write.u_BLRE.shape[1])]


def injected(model: CRSM, state: ModelState, line: list[int], alpha: float) -> ModelState:
    writes = write_of(model, line)
    gate = torch.tensor([alpha])
    return state.with_ssm(
        tuple(inject(layer.ssm_BHPN, write, gate) for layer, write in zip(state.layers, writes, strict=True))
    )


def by_hand(model: CRSM, texts: Texts, drawn: Drawn) -> tuple[list[float], list[float]]:
    """Cross-entropy of planned tokens and KL of later ones, one row and one token at a time."""
    follow, after = [], []
    for row in range(len(texts.answer_BT)):
        prompt = prompt_of(texts, row)
        length, target = int(texts.length_B[row]), drawn.target
        answer = texts.answer_BT[row, :length].tolist()
        _, state = model.backbone(torch.tensor([[*prompt.tolist(), *answer[:target]]]))
        plain = state
        if drawn.earlier_B[row]:
            block = row // texts.attempts * texts.attempts
            source = row if drawn.earlier_B[row] == 1 else block + (row - block + 1) % texts.attempts
            line = texts.answer_BT[source, target : target + int(drawn.length_B[row])].tolist()
            _, before = model.backbone(torch.tensor([[*prompt.tolist(), *answer[: target - 1]]]))
            written = injected(model, before, line, float(drawn.alpha_B[row]))
            out = model.backbone.step(torch.tensor([answer[target - 1]]), written)
            state = out.state
            if drawn.withdrawn_B[row]:
                state = state.with_ssm(
                    tuple(
                        withdraw(now.ssm_BHPN, carry(new.ssm_BHPN - old.ssm_BHPN, decay))
                        for now, new, old, decay in zip(
                            state.layers, written.layers, before.layers, out.decay_LBH, strict=True
                        )
                    )
                )
        planned = answer[target + 1 : target + 1 + int(drawn.length_B[row])]
        state = injected(model, state, planned, float(drawn.alpha_B[row]))
        for index in range(target, length - 1):
            token = torch.tensor([answer[index]])
            out, clean = model.backbone.step(token, state), model.backbone.step(token, plain)
            state, plain = out.state, clean.state
            q, p = (model.logits(x.hidden_BLD).log_softmax(dim=-1)[0] for x in (out, clean))
            if index - target < len(planned):
                follow.append(-float(q[answer[index + 1]]))
            else:
                after.append(float((p.exp() * (p - q)).sum()))
    return follow, after


CASES = {
    "one token, at the start": draw(0, [1, 1, 1, 1]),
    "several lengths": draw(1, [3, 2, 2, 1]),
    "earlier write of the same attempt": draw(1, [1, 2, 1, 1], earlier=[1, 1, 0, 1]),
    "earlier write of another attempt": draw(1, [2, 1, 2, 1], earlier=[2, 0, 2, 2]),
    "earlier write withdrawn": draw(1, [2, 1, 2, 1], earlier=[1, 2, 2, 1], withdrawn=[True, True, False, True]),
}


@groups
@pytest.mark.parametrize("case", CASES)
def test_both_losses_are_those_worked_out_token_by_token(make: Callable[[], AttemptGroup], case: str) -> None:
    model, drawn = tiny_checkpoint().model.double(), CASES[case]
    texts = Texts.from_group(make(), world=1)
    with torch.no_grad():
        follow_M, after_M = write_losses(model, texts, drawn)
        want_follow, want_after = by_hand(model, texts, drawn)
    np.testing.assert_allclose(follow_M, want_follow, atol=1e-9)
    np.testing.assert_allclose(after_M, want_after, atol=1e-9)
    assert float(after_M.mean()) > 1e-6, "the write must be audible for this test"


@groups
def test_a_write_of_rate_zero_leaves_the_backbones_own_loss_and_no_divergence(
    make: Callable[[], AttemptGroup],
) -> None:
    model = tiny_checkpoint().model
    texts = Texts.from_group(make(), world=1)
    with torch.no_grad():
        follow_M, after_M = write_losses(model, texts, draw(1, [2, 1, 2, 1], alpha=0.0, earlier=[1, 2, 0, 1]))
    assert float(after_M.abs().max()) < 1e-5
    want = []
    for row, count in enumerate([2, 1, 2, 1]):
        text = torch.cat([prompt_of(texts, row), texts.answer_BT[row]])[None]
        log_probs_TV = model.logits(model.backbone(text)[0][0]).log_softmax(dim=-1)
        first = len(prompt_of(texts, row)) + 2
        want += [-float(log_probs_TV[first + i - 1, text[0, first + i]]) for i in range(count)]
    np.testing.assert_allclose(follow_M, want, atol=1e-4)


def test_hits_are_the_tokens_that_became_the_most_likely() -> None:
    model = tiny_checkpoint().model
    texts = Texts.from_group(equal_group(), world=1)
    drawn = draw(0, [3, 3, 3, 2])
    with torch.no_grad():
        hits_M, _ = write_losses(model, texts, drawn, hits=True)
        losses_M, _ = write_losses(model, texts, drawn)
    assert hits_M.shape == losses_M.shape == (11,) and set(hits_M.tolist()) <= {0.0, 1.0}
    # More likely than 1/2 is the most likely; less likely than 1/31 is not.
    assert (hits_M[losses_M < np.log(2)] == 1).all() and (hits_M[losses_M > np.log(31)] == 0).all()


def stage_of(**settings: Any) -> AssemblyStage:
    fields: dict[str, Any] = {"steps": 1, "batch": 8, "evaluate_problems": 8, "optimizer": OptimizerConfig()}
    config = AssemblyStageConfig(**(fields | settings))
    return AssemblyStage(tiny_checkpoint().model, config, 0, [build_task(TASK)], tiny_tokenizer(), plan_length=3)


def test_a_loss_moves_the_writer_and_nothing_else() -> None:
    stage = stage_of(earlier_write=1.0)
    for step in range(4):
        loss, metrics = stage(stage.batch(step, 0, 0, 1))
        loss.backward()
        assert metrics["loss"] == pytest.approx(float(loss.detach()))
    for name, parameter in stage.model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) is name.startswith("writer."), name


def test_some_steps_of_it_make_plans_better_followed() -> None:
    """The gradient points where it should: plans of one fixed batch become likelier."""
    stage = stage_of(rates=(1.0,), after_weight=0.0)
    batch = stage.batch(0, 0, 0, 1)
    optimizer = torch.optim.Adam(stage.model.writer.parameters(), lr=2e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, metrics = stage(batch)
        loss.backward()
        optimizer.step()
        losses.append(metrics["follow_loss/path_star"])
    assert losses[-1] < 0.9 * losses[0]


def test_what_is_drawn_fits_the_texts() -> None:
    stage = stage_of(earlier_write=0.5, rates=(0.1, 0.4))
    texts = Texts.from_group(ragged_group(), world=1)
    seen: set[tuple[int, int]] = set()
    for seed in range(100):
        drawn = stage._draw(texts, np.random.default_rng(seed))
        left_B = texts.length_B.numpy() - 1 - drawn.target
        assert left_B.max() >= 1, "a plan has something to say in one row at least"
        assert (drawn.length_B >= 1).all() and (drawn.length_B <= np.clip(left_B, 1, 3)).all()
        assert set(drawn.alpha_B.tolist()) <= {np.float32(0.1).item(), np.float32(0.4).item()}
        assert drawn.target > 0 or not drawn.earlier_B.any()
        seen |= {(drawn.target, kind) for kind in drawn.earlier_B.tolist()}
    # The longest rows have five tokens: the fourth is the last before which a plan has something to say. Before the
    # first there can be no earlier plan.
    assert int(texts.length_B.max()) == 5
    assert seen == {(0, 0)} | {(target, kind) for target in (1, 2, 3) for kind in (0, 1, 2)}


@groups
def test_workers_losses_average_to_that_of_one_whatever_the_lengths_of_their_rows(
    make: Callable[[], AttemptGroup],
) -> None:
    stage, group = stage_of(), make()
    for index in range(5):
        alone, _ = stage([(group, index)])
        stage.world = 2
        shared = [stage([(part, index)])[0] for part in parts_of(group)]
        stage.world = 1
        assert float(sum(shared)) / 2 == pytest.approx(float(alone), rel=1e-5)


def test_a_row_that_has_ended_takes_no_part() -> None:
    """Its losses are those of the rows that go on."""
    model = tiny_checkpoint().model
    texts = Texts.from_group(equal_group(), world=1)
    drawn = draw(3, [1, 1, 1, 1])
    with torch.no_grad():
        follow_M, _ = write_losses(model, texts, drawn)
    assert texts.length_B.tolist() == [5, 4, 5, 3] and follow_M.shape == (2,)


def test_evaluation_is_the_same_twice_and_between_none_and_all() -> None:
    stage = stage_of()
    metrics = stage.evaluate()
    assert 0 <= metrics["valid/follow_rate/path_star"] <= 1 and metrics["valid/after_kl/path_star"] >= 0
    assert stage.evaluate() == metrics
