"""Stage 2: with the exact world model every error is zero; with another one it is what was worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from crsm.config import DynamicsStageConfig, OptimizerConfig
from crsm.data import AttemptGroup
from crsm.latent_dynamics import ExactDynamics, Snapshot
from crsm.model import CRSM
from crsm.tasks import build_task
from crsm.training.dynamics import DynamicsStage, fidelity, trust_horizon, unroll
from crsm.training.traces import Texts, trace_backbone
from tests.fixtures import TASK, tiny_checkpoint, tiny_tokenizer
from tests.training.texts import equal_group, parts_of, prompt_of, ragged_group

groups = pytest.mark.parametrize("make", [equal_group, ragged_group])


def all_roots(model: CRSM, texts: Texts) -> tuple[int, ...]:
    return tuple(range(texts.answer_BT.shape[1]))


@groups
@pytest.mark.parametrize("roots", [None, (0,), (1, 3)])
def test_the_exact_world_model_makes_no_error(make: Callable[[], AttemptGroup], roots: tuple[int, ...] | None) -> None:
    model = tiny_checkpoint().model
    world = ExactDynamics(model.backbone)
    texts = Texts.from_group(make(), world=1)
    roots = roots or all_roots(model, texts)
    trace = trace_backbone(model.backbone, texts, roots, world.read_layers)
    steps = list(unroll(model, world, trace, texts, 5))
    assert [step.step for step in steps] == list(range(1, min(5, int(texts.length_B.max()) - roots[0]) + 1))
    for step in steps:
        assert step.policy_kl_M.abs().max() < 1e-4
        assert step.value_error_M.max() < 1e-4
        assert step.cosine_M.max() < 1e-5
        # What is left of the value loss is the entropy of the soft targets.
        lengths = texts.length_B[step.index_M]
        assert len(step.index_M) == sum(
            int(root + step.step <= length) for root in roots for length in texts.length_B.tolist()
        )
        assert (step.last_M.sum() <= (lengths > 0).sum()) and not (step.last_M & ~step.judged_M).any()


@groups
def test_each_row_of_a_step_compares_the_right_positions(make: Callable[[], AttemptGroup]) -> None:
    """The errors of the latent world model, one root, row and step at a time."""
    model = tiny_checkpoint().model
    world = model.world_model
    texts = Texts.from_group(make(), world=1)
    roots = all_roots(model, texts)
    trace = trace_backbone(model.backbone, texts, roots, world.read_layers)
    want: dict[int, list[tuple[int, float, float, bool, bool]]] = {}
    with torch.no_grad():
        for root in roots:
            for row in range(len(texts.answer_BT)):
                prompt = prompt_of(texts, row)
                hidden, _ = model.backbone(torch.cat([prompt, texts.answer_BT[row]])[None])
                snapshot = trace.memory_RBMHPN[root, row][None]
                begin = Snapshot(hidden[:, len(prompt) - 1 + root], snapshot)
                latent = world.begin(begin)
                for step in range(1, int(texts.length_B[row]) - root + 1):
                    token = texts.answer_BT[row, root + step - 1][None]
                    latent, imagined = world.advance(latent, begin, token)
                    real = hidden[:, len(prompt) - 1 + root + step]
                    p, q = (model.logits(x).log_softmax(dim=-1) for x in (real, imagined))
                    error = float((model.critic(imagined) - model.critic(real)).abs().mean())
                    position = root + step
                    judged = position < int(texts.length_B[row])
                    last = position == int(texts.length_B[row]) - 1
                    want.setdefault(step, []).append((row, float((p.exp() * (p - q)).sum()), error, judged, last))
    for got in unroll(model, world, trace, texts, 4):
        rows = want[got.step]
        assert got.index_M.tolist() == [row for row, *_ in rows]
        np.testing.assert_allclose(got.policy_kl_M.detach(), [kl for _, kl, *_ in rows], atol=1e-4)
        np.testing.assert_allclose(got.value_error_M, [error for _, _, error, *_ in rows], atol=1e-4)
        assert got.judged_M.tolist() == [judged for *_, judged, _ in rows]
        assert got.last_M.tolist() == [last for *_, last in rows]


def stage_of(**settings: Any) -> DynamicsStage:
    fields: dict[str, Any] = {"steps": 1, "batch": 2, "attempts": 2, "unroll": 3, "optimizer": OptimizerConfig()}
    config = DynamicsStageConfig(**(fields | settings))
    return DynamicsStage(tiny_checkpoint().model, config, 0, [build_task(TASK)], tiny_tokenizer())


def test_a_loss_moves_the_world_model_and_nothing_else() -> None:
    stage = stage_of()
    loss, metrics = stage(stage.batch(0, 0, 0, 1))
    loss.backward()
    assert metrics["loss"] == float(loss.detach()) > 0
    for name, parameter in stage.model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) is name.startswith("world_model."), name


def test_a_short_part_of_a_padded_step_still_has_a_finite_loss() -> None:
    """With roots drawn at random, a worker whose answers are all shorter than the padding must find some to learn."""
    group = ragged_group()
    padded = dataclasses.replace(
        group,
        answers_BAt=np.pad(group.answers_BAt, ((0, 0), (0, 0), (0, 30))),
        answer_mask_BAt=np.pad(group.answer_mask_BAt, ((0, 0), (0, 0), (0, 30))),
        prompts_BT=group.prompts_BT[:, :4],
        prompt_lengths_B=np.array([4, 4]),
    )
    stage = stage_of(roots=1)
    for token in range(7, 12):
        answers = padded.answers_BAt.copy()
        answers[0, 0, 0] = token
        loss, _ = stage([dataclasses.replace(padded, answers_BAt=answers)])
        assert bool(loss.isfinite())


@groups
@pytest.mark.parametrize("roots", [None, 2])
def test_workers_losses_average_to_that_of_one_whatever_the_lengths_of_their_rows(
    make: Callable[[], AttemptGroup], roots: int | None
) -> None:
    stage, group = stage_of(roots=roots), make()
    alone, _ = stage([group])
    stage.world = 2
    shared = [stage([part])[0] for part in parts_of(group)]
    assert float(sum(shared)) / 2 == pytest.approx(float(alone), rel=1e-5)


def test_some_roots_are_drawn_from_the_texts_alone_and_ascend() -> None:
    stage = stage_of(roots=2)
    texts = Texts.from_group(equal_group(), world=1)
    roots = stage._roots(texts)
    assert roots == stage._roots(texts) and len(roots) == 2 and list(roots) == sorted(set(roots))
    assert stage_of(roots=None)._roots(texts) == (0, 1, 2, 3, 4)


def rows_of(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"policy_kl": kl, "value_error": error} for kl, error in pairs]


@pytest.mark.parametrize(
    ("table", "want"),
    [
        ({"a": rows_of((0.1, 0.1), (0.2, 0.1), (0.3, 0.1))}, 2),
        ({"a": rows_of((0.1, 0.1), (0.1, 0.2), (0.1, 0.1))}, 1),  # no gap is stepped over
        ({"a": rows_of((0.9, 0.1), (0.1, 0.1))}, 0),
        ({"a": rows_of((0.1, 0.1), (0.1, 0.1)), "b": rows_of((0.1, 0.1), (0.9, 0.1))}, 1),  # every task
        ({"a": rows_of((0.1, 0.1), (0.1, 0.1)), "b": rows_of((0.1, 0.1))}, 2),  # b has ended
        ({"a": rows_of((0.1, 0.1), (0.9, 0.1)), "b": rows_of((0.1, 0.1))}, 1),
        ({"a": rows_of((0.25, 0.15))}, 1),  # on the bound
        ({"a": rows_of((math.nan, 0.1))}, 0),  # a model that broke is not trusted
        ({"a": rows_of((0.1, 0.1), (0.1, math.nan))}, 1),
    ],
)
def test_the_trust_horizon_by_hand(table: dict[str, list[dict[str, float]]], want: int) -> None:
    assert trust_horizon(table, kl=0.25, value_error=0.15) == want


def test_fidelity_of_the_exact_world_model_is_perfect_and_orders_branches_as_the_critic_does() -> None:
    model = tiny_checkpoint().model
    task = build_task(TASK)
    group = equal_group()
    table = fidelity(model, ExactDynamics(model.backbone), [task], [group], 4)
    rows = table[task.name]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["policy_kl"] < 1e-4 and row["value_error"] < 1e-4 and row["cosine"] > 1 - 1e-4
    texts = Texts.from_group(group, world=1)
    good: list[bool] = []
    with torch.no_grad():
        for problem in range(2):
            values = {}
            for attempt in (2 * problem, 2 * problem + 1):
                length = int(texts.length_B[attempt])
                text = torch.cat([texts.prompt_BT[problem], texts.answer_BT[attempt, : length - 1]])[None]
                hidden = model.backbone(text)[0][:, -1]
                values[bool(texts.outcome_B[attempt])] = float(model.critic.consensus(model.critic(hidden)))
            good.append(values[True] > values[False])
    # Every answer has at least three tokens: two steps reach each one's last from a root that exists.
    assert rows[1]["branch_accuracy"] == pytest.approx(np.mean(good))


def test_evaluation_reports_every_step_of_every_task_and_changes_nothing() -> None:
    stage = stage_of(evaluate_problems=4, attempts=6)
    before = torch.get_rng_state()
    metrics = stage.evaluate()
    assert {f"valid/policy_kl/path_star/step_{step}" for step in (1, 2, 3)} <= set(metrics)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_equal(stage.evaluate(), metrics)
