"""The audit against plain ways to get its figures."""

import math

import numpy as np
import pytest
import torch

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.evaluation.steering_audit import (
    Line,
    audit_writes,
    follow_rates,
    gate_sparsity,
    lines_of,
    long_text,
    stability,
)
from crsm.generation import GenerationRequest
from crsm.injection import inject, outer_write
from crsm.tasks import build_task
from crsm.tasks.base import problems
from tests.fixtures import PROMPT, TASK, tiny_checkpoint

SETTINGS = DeliberationConfig(plan_length=2, withdraw=False)


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def greedy(checkpoint):
    """What System 1 says by itself."""
    engine = Engine(checkpoint, config=EngineConfig())
    return tuple(engine.generate_all([GenerationRequest(PROMPT, SamplingConfig(max_tokens=6))])[0])


@torch.inference_mode()
def written(checkpoint, line, position, rate, length):
    """Log-probabilities after each token of the line from ``position`` on, by hand."""
    model = checkpoint.model
    _, _, state = model.prefill(torch.tensor([line.prompt + line.answer[:position]]))
    plan = torch.tensor([line.answer[position + 1 : position + 1 + length]])
    write = model.writer(plan, torch.tensor([plan.shape[1]]))
    state = state.with_ssm(
        tuple(
            inject(h.ssm_BHPN, outer_write(write.u_BLRE[:, i], write.b_BLRN[:, i], 4), torch.tensor([rate]))
            for i, h in enumerate(state.layers)
        )
    )
    found = []
    for token in line.answer[position:-1]:
        out = model.backbone.step(torch.tensor([token]), state)
        state = out.state
        found.append(model.logits(out.hidden_BLD).log_softmax(dim=-1)[0])
    return torch.stack(found)


def test_the_audit_is_the_difference_of_two_passes_by_hand(checkpoint):
    line = Line(PROMPT, (20, 21, 22, 23, 24), True)
    audit = audit_writes(checkpoint, [line], 1, 0.5, SETTINGS)
    on, off = written(checkpoint, line, 1, 0.5, 2), written(checkpoint, line, 1, 0.0, 2)
    gain = sum(float(on[i, token] - off[i, token]) for i, token in enumerate((22, 23)))
    kl = (off.exp() * (off - on)).sum(dim=1)
    assert float(audit.gain_B) == pytest.approx(gain, abs=1e-4)
    assert float(audit.first_kl_B) == pytest.approx(float(kl[0]), abs=1e-4)
    # Two tokens are planned, one comes after them.
    assert audit.after_kl.tolist() == pytest.approx(kl[2:].tolist(), abs=1e-4)
    assert bool(audit.followed_B) == bool((on.argmax(dim=1)[:2] == torch.tensor([22, 23])).all())


def test_a_rate_of_zero_changes_nothing(checkpoint, greedy):
    audit = audit_writes(checkpoint, [Line(PROMPT, greedy, True)], 2, 0.0, SETTINGS)
    assert (float(audit.gain_B), float(audit.first_kl_B), float(audit.after_kl.sum())) == (0.0, 0.0, 0.0)


def test_what_system_1_says_anyway_is_followed_without_a_write(checkpoint, greedy):
    assert bool(audit_writes(checkpoint, [Line(PROMPT, greedy, True)], 0, 0.0, SETTINGS).alone_B)
    other = (*greedy[:1], (greedy[1] + 1) % 20 + 2, *greedy[2:])
    assert not bool(audit_writes(checkpoint, [Line(PROMPT, other, True)], 0, 0.0, SETTINGS).alone_B)


def test_follow_rates_have_a_row_per_kind_position_and_rate(checkpoint):
    task = build_task(TASK)
    lines = lines_of(checkpoint, task, problems(task, 0, "test", 4), seed=0)
    assert {line.correct for line in lines} == {True, False}
    rows = follow_rates(checkpoint, lines, rates=(0.1, 0.5), positions=3, settings=SETTINGS)
    assert {(row["line"], row["position"], row["rate"]) for row in rows} == {
        (line, position, rate) for line in ("right", "wrong") for position in range(3) for rate in (0.1, 0.5)
    }
    # The answers have 6 tokens: after two planned ones from position 2 on, one is left.
    assert not any(math.isnan(row["after_kl"]) for row in rows)
    whole = follow_rates(checkpoint, lines, rates=(0.1,), positions=9, settings=SETTINGS)
    assert max(row["position"] for row in whole) == 4  # after the last token there is nothing to plan
    assert [math.isnan(row["after_kl"]) for row in whole if row["line"] == "right"] == [False, False, False, True, True]


def test_wrong_lines_are_wrong_and_say_so(checkpoint):
    task = build_task(TASK)
    fresh = problems(task, 0, "test", 6)
    for line in lines_of(checkpoint, task, fresh, seed=0):
        text = checkpoint.tokenizer.decode(line.answer)
        problem = next(p for p in fresh if tuple(checkpoint.tokenizer.encode(p.prompt)) == line.prompt)
        assert task.verify(problem, text) is line.correct
        assert line.answer[-1] == checkpoint.tokenizer.verdict_id(line.correct)


def test_sparsity_counts_gates_that_are_exactly_zero(checkpoint):
    task = build_task(TASK)
    fresh = problems(task, 0, "test", 3)
    opened = gate_sparsity(checkpoint, task, fresh)
    assert opened["plans"] > 0
    assert all(0 < layer["confidence"] < 1 for layer in opened["layers"])
    # The fixture's gates are wider in the last layer.
    assert opened["layers"][0]["confidence"] < opened["layers"][1]["confidence"]
    shut = gate_sparsity(tiny_checkpoint(calibrated=False), task, fresh)
    assert [layer["shut"] for layer in shut["layers"]] == [1.0, 1.0]
    assert [layer["confidence"] for layer in shut["layers"]] == [None, None]
    assert shut["applied"] == 0


def test_a_model_that_ends_before_a_plan_could_come_has_no_gates_to_count(checkpoint):
    asks_nothing = checkpoint.config.deliberation.model_copy(update={"max_plans": 0})
    silent = tiny_checkpoint(checkpoint.config.model_copy(update={"deliberation": asks_nothing}))
    found = gate_sparsity(silent, build_task(TASK), list(problems(build_task(TASK), 0, "test", 2)))
    assert (found["plans"], found["applied"]) == (0, 0)
    assert all(math.isnan(layer["shut"]) and layer["confidence"] is None for layer in found["layers"])


@pytest.mark.parametrize("write", ["writer", "random", "adversarial"])
def test_no_write_makes_a_head_grow(checkpoint, write):
    text = long_text(checkpoint, [Line(PROMPT, (20, 21, 22), True)], 60)
    assert len(text) == 60
    found = stability(checkpoint, text, rate=1.0, write=write)
    assert found["bounded"]
    assert found["max_ratio"] <= 1
    assert found["mean_ratio"] <= found["max_ratio"]
    assert found["writes"] == 59
    assert np.isfinite(found["max_growth"])


def test_a_rate_of_zero_leaves_every_norm_alone(checkpoint):
    found = stability(checkpoint, long_text(checkpoint, [Line(PROMPT, (20,), True)], 20), rate=0.0, write="adversarial")
    assert (found["max_ratio"], found["mean_ratio"], found["max_growth"]) == (1.0, 1.0, 1.0)
