"""One deliberation: project, search, write. With the exact world model every step can be checked by the backbone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch

from crsm.config import SearchConfig
from crsm.delta_buffer import check_plan
from crsm.latent_dynamics import take_snapshot
from crsm.model import Checkpoint
from crsm.reasoning import Deliberator, project, stack_snapshots
from crsm.types import Plan, PlanRequest
from tests.fixtures import PROMPT, tiny_checkpoint, tiny_config

Kind = Literal["latent", "exact"]
TEXTS = (PROMPT, (10, 21, 4, 8, 23, 7, 9), (20, 20, 9), (11, 12, 13, 14))


@pytest.fixture(scope="module")
def exact() -> Checkpoint:
    return tiny_checkpoint(tiny_config(kind="exact"))


@pytest.fixture(scope="module")
def latent() -> Checkpoint:
    return tiny_checkpoint()


@torch.inference_mode()
def request_after(
    checkpoint: Checkpoint,
    text: tuple[int, ...] = PROMPT,
    *,
    lag: int = 0,
    token: int | None = None,
    request_id: int = 0,
    **fields: Any,
) -> PlanRequest:
    """What an engine would ask after ``text``, whose next token is System 1's own choice."""
    model = checkpoint.model
    logits_BV, hidden_BLD, state = model.prefill(torch.tensor([text]))
    snapshot = take_snapshot(hidden_BLD, state, model.planning_model())
    return PlanRequest(
        request_id=request_id,
        generation_id=f"g{request_id}",
        position=len(text),
        target=len(text) + lag,
        token=int(logits_BV.argmax()) if token is None else token,
        hidden_LD=snapshot.hidden_BLD[0].numpy(),
        ssm_LHPN=snapshot.memory_BMHPN[0].numpy(),
        conv_LCK=None if snapshot.conv_BLCK is None else snapshot.conv_BLCK[0].numpy(),
        **({"simulations": 8} | fields),
    )


@torch.inference_mode()
def greedy(checkpoint: Checkpoint, text: tuple[int, ...], count: int) -> list[int]:
    said: list[int] = []
    for _ in range(count):
        logits_BV, _, _ = checkpoint.model.prefill(torch.tensor([[*text, *said]]))
        said.append(int(logits_BV.argmax()))
    return said


@torch.inference_mode()
def score(checkpoint: Checkpoint, text: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """Log-probability of a continuation under the backbone."""
    model = checkpoint.model
    hidden_BTLD, _ = model.backbone(torch.tensor([[*text, *continuation]]))
    log_probs_TV = model.logits(hidden_BTLD[0]).log_softmax(dim=-1)
    return sum(float(log_probs_TV[len(text) - 1 + i, token]) for i, token in enumerate(continuation))


# Projection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_what_an_exact_planner_assumes_is_what_system_1_says(
    exact: Checkpoint, text: tuple[int, ...], lag: int
) -> None:
    (plan,) = Deliberator.from_checkpoint(exact)([request_after(exact, text, lag=lag)])
    assert list(plan.assumed) == greedy(exact, text, lag + 1)[1:]


def test_a_projection_ends_in_the_backbones_own_state(exact: Checkpoint) -> None:
    requests = [request_after(exact, text, lag=2) for text in TEXTS]
    known = torch.tensor([request.token for request in requests])
    with torch.inference_mode():
        future = project(exact.model, exact.model.planning_model(), stack_snapshots(requests), known, 2)
        for row, text in enumerate(TEXTS):
            whole = [*text, int(known[row]), *future.assumed_FT[row].tolist()]
            hidden_BTLD, state = exact.model.backbone(torch.tensor([whole]))
            np.testing.assert_allclose(future.hidden_FLD[row], hidden_BTLD[0, -1], atol=1e-4)
            for index, layer in enumerate(state.layers):
                np.testing.assert_allclose(future.latent[1][row, index], layer.ssm_BHPN[0], atol=1e-4)


def test_several_hypotheses_are_the_likeliest_futures_in_order(exact: Checkpoint) -> None:
    """With a beam as wide as the vocabulary the second step is exhaustive: compare with all futures of two tokens."""
    request = request_after(exact, lag=2, hypotheses=31)
    with torch.inference_mode():
        future = project(
            exact.model, exact.model.planning_model(), stack_snapshots([request]), torch.tensor([request.token]), 2, 31
        )
    found = [tuple(row) for row in future.assumed_FT.tolist()]
    assert len(set(found)) == 31
    begun = (*PROMPT, request.token)
    scores = {pair: score(exact, begun, pair) for pair in itertools.product(range(31), repeat=2)}
    best = sorted(scores.values(), reverse=True)[:31]
    np.testing.assert_allclose([scores[pair] for pair in found], best, atol=1e-3)


def test_beams_are_distinct_best_first_and_their_own(exact: Checkpoint) -> None:
    """Several requests, several futures each: every future is searched from its own state."""
    requests = [request_after(exact, text, lag=2, hypotheses=3, request_id=i) for i, text in enumerate(TEXTS)]
    plans = Deliberator.from_checkpoint(exact)(requests)
    assert [plan.request_id for plan in plans] == [i for i in range(len(TEXTS)) for _ in range(3)]
    for i, (text, request) in enumerate(zip(TEXTS, requests, strict=True)):
        futures = [plan.assumed for plan in plans[3 * i : 3 * i + 3]]
        scores = [score(exact, (*text, request.token), assumed) for assumed in futures]
        assert len(set(futures)) == 3 and scores == sorted(scores, reverse=True)
        for plan in plans[3 * i : 3 * i + 3]:
            with torch.inference_mode():
                hidden = exact.model.backbone(torch.tensor([[*text, request.token, *plan.assumed]]))[0][:, -1]
                value = exact.model.critic(hidden)[0]
            np.testing.assert_allclose(plan.value_root_L, value, atol=1e-4)


def test_with_nothing_to_assume_there_is_one_future(exact: Checkpoint) -> None:
    assert len(Deliberator.from_checkpoint(exact)([request_after(exact, lag=0, hypotheses=5)])) == 1


# The plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_a_plan_is_well_formed_and_addressed_to_its_request(kind: Kind) -> None:
    checkpoint = tiny_checkpoint(tiny_config(kind=kind, rank=2))
    request = request_after(checkpoint, lag=2, request_id=5, simulations=11, seed=3)
    (plan,) = Deliberator.from_checkpoint(checkpoint, planner_id="me")([request])
    assert check_plan(plan, checkpoint.config.model.backbone, 2) is None
    assert (plan.request_id, plan.generation_id, plan.position, plan.target) == (5, "g5", 6, 8)
    assert (plan.simulations, plan.planner_id, plan.model_version) == (11, "me", 3)
    assert 1 <= len(plan.line) <= 3 and plan.tree is None
    assert plan.uncertainty == pytest.approx(float(plan.value_plan_L.std()), abs=1e-6)
    arrays = [value for name, value in vars_of(plan).items() if isinstance(value, np.ndarray)]
    assert all(array.flags["C_CONTIGUOUS"] and array.flags["OWNDATA"] for array in arrays) and len(arrays) == 7


def vars_of(plan: Plan) -> dict[str, object]:
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}


def test_the_write_is_the_writers_for_the_planned_line(exact: Checkpoint) -> None:
    plans = Deliberator.from_checkpoint(exact)([request_after(exact, text) for text in TEXTS])
    for plan in plans:
        with torch.inference_mode():
            write = exact.model.writer(torch.tensor([plan.line]), torch.tensor([len(plan.line)]))
        np.testing.assert_allclose(plan.write_u_LRE, write.u_BLRE[0], atol=1e-5)
        np.testing.assert_allclose(plan.write_b_LRN, write.b_BLRN[0], atol=1e-5)


def test_confidence_is_the_gate_of_what_the_plan_says_of_itself(exact: Checkpoint) -> None:
    model = exact.model
    (plan,) = Deliberator.from_checkpoint(exact)([request_after(exact)])
    root, end = torch.tensor(plan.value_root_L)[None], torch.tensor(plan.value_plan_L)[None]
    with torch.inference_mode():
        gain = model.critic.consensus(end) - model.critic.consensus(root)
        want = model.gate(end - root, torch.tensor([plan.uncertainty]), gain, model.critic.uncertainty_penalty)
    np.testing.assert_allclose(plan.confidence_L, want[0], atol=1e-6)
    assert plan.confidence_L.all()


def test_an_uncalibrated_planners_gates_are_exactly_zero() -> None:
    checkpoint = tiny_checkpoint(calibrated=False)
    for plan in Deliberator.from_checkpoint(checkpoint)([request_after(checkpoint, text) for text in TEXTS]):
        assert (plan.confidence_L == 0.0).all() and plan.line


def test_a_forced_confidence_replaces_the_gate() -> None:
    checkpoint = tiny_checkpoint(calibrated=False)
    (plan,) = Deliberator.from_checkpoint(checkpoint, forced_confidence=0.75)([request_after(checkpoint)])
    assert plan.confidence_L.tolist() == [0.75, 0.75]


def test_the_planned_line_is_no_longer_than_asked(exact: Checkpoint) -> None:
    for length in (1, 2):
        deliberator = Deliberator.from_checkpoint(exact, plan_length=length)
        assert len(deliberator([request_after(exact, simulations=40)])[0].line) == length


@pytest.mark.parametrize(("horizon", "lag", "depth"), [(None, 0, 4), (9, 0, 4), (4, 0, 3), (4, 2, 1), (2, 3, 1)])
@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_the_trust_horizon_caps_projection_and_search_of_a_learned_world_model(
    horizon: int | None, lag: int, depth: int, kind: Literal["latent", "exact"]
) -> None:
    """Known token, assumed tokens and depth of the tree are all imagined steps; one is searched in any case. The
    backbone itself is searched as deep as the settings say."""
    checkpoint = dataclasses.replace(tiny_checkpoint(tiny_config(kind=kind)), trust_horizon=horizon)
    deliberator = Deliberator.from_checkpoint(
        checkpoint, search=SearchConfig(num_actions=2, max_depth=4), keep_tree=True
    )
    (plan,) = deliberator([request_after(checkpoint, lag=lag, simulations=60)])

    def depth_of(node: Any) -> int:
        return max((1 + depth_of(child) for child in node["children"]), default=0)

    assert plan.tree is not None and depth_of(plan.tree) == (4 if kind == "exact" else depth)


# The end of a text ----------------------------------------------------------------------------------------------------


def test_after_the_end_there_is_nothing_to_plan(exact: Checkpoint) -> None:
    """The known token ends the answer, or an assumed one does: the gates stay shut, even forced ones."""
    terminal = exact.tokenizer.terminal_ids
    deliberator = Deliberator.from_checkpoint(exact, forced_confidence=1.0)
    for token in terminal:
        (plan,) = deliberator([request_after(exact, token=token, lag=1)])
        assert (plan.confidence_L == 0.0).all()
    plans = deliberator([request_after(exact, lag=1, hypotheses=31)])
    ended = [plan for plan in plans if plan.assumed[0] in terminal]
    assert len(ended) == 3 and not any(plan.confidence_L.any() for plan in ended)
    assert all(plan.confidence_L.all() for plan in plans if plan.assumed[0] not in terminal)


def test_a_terminal_token_ends_a_line_and_keeps_the_value_it_ends(exact: Checkpoint) -> None:
    """With every token but the known one terminal, a line is one token long and what it claims changes no value."""
    deliberator = Deliberator(
        exact.model,
        SearchConfig(num_actions=3, max_depth=4),
        plan_length=4,
        terminal_tokens=set(range(31)) - {request_after(exact).token},
        keep_tree=True,
    )
    (plan,) = deliberator([request_after(exact, simulations=20)])
    assert len(plan.line) == 1 and plan.tree is not None
    for child in plan.tree["children"]:  # type: ignore[attr-defined]
        assert child["terminal"] and not child["children"]
        np.testing.assert_allclose(child["raw_values"], plan.value_root_L, rtol=1e-6)
    assert plan.value_plan_L.tolist() == plan.value_root_L.tolist()


def test_a_vocabulary_without_terminal_tokens_is_searched_to_the_cap(exact: Checkpoint) -> None:
    deliberator = Deliberator(exact.model, SearchConfig(num_actions=2, max_depth=3), plan_length=9, terminal_tokens=())
    (plan,) = deliberator([request_after(exact, lag=1, simulations=60)])
    assert len(plan.line) == 3 and plan.confidence_L.all()


# Batches, budgets, stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [SearchConfig(num_actions=4), SearchConfig(policy="gumbel", gumbel_scale=1.0)])
@pytest.mark.parametrize("kind", ["exact", "latent"])
def test_a_plan_does_not_depend_on_who_else_is_planned_for(kind: Kind, search: SearchConfig) -> None:
    """Mixed lags, hypotheses, budgets and seeds in one batch; the same line, counts and, up to rounding, numbers."""
    checkpoint = tiny_checkpoint(tiny_config(kind=kind))
    requests = [
        request_after(checkpoint, text, lag=lag, hypotheses=hypotheses, simulations=budget, seed=seed, request_id=i)
        for i, (text, lag, hypotheses, budget, seed) in enumerate(
            [(TEXTS[0], 1, 1, 9, 5), (TEXTS[1], 0, 1, 5, 6), (TEXTS[2], 1, 2, 9, 7), (TEXTS[3], 1, 2, 12, 8)]
        )
    ]
    deliberator = Deliberator.from_checkpoint(checkpoint, search=search)
    together = deliberator(requests)
    alone = [plan for request in requests for plan in deliberator([request])]
    backwards = deliberator(requests[::-1])
    assert [plan.request_id for plan in together] == [0, 1, 2, 2, 3, 3]
    for others in (alone, sorted(backwards, key=lambda plan: plan.request_id)):
        for mine, other in zip(together, others, strict=True):
            assert (mine.request_id, mine.assumed, mine.line) == (other.request_id, other.assumed, other.line)
            assert mine.simulations == other.simulations == requests[mine.request_id].simulations
            np.testing.assert_array_equal(mine.policy_tokens_A, other.policy_tokens_A)
            np.testing.assert_array_equal(mine.policy_probs_A, other.policy_probs_A)
            np.testing.assert_allclose(mine.confidence_L, other.confidence_L, atol=1e-4)
            np.testing.assert_allclose(mine.write_u_LRE, other.write_u_LRE, atol=1e-4)


def test_the_seed_of_each_request_is_its_own(exact: Checkpoint) -> None:
    """With root noise, equal requests of different seeds get different trees, whatever their place in the batch."""
    search = SearchConfig(policy="gumbel", gumbel_scale=3.0, num_actions=8)
    deliberator = Deliberator.from_checkpoint(exact, search=search)
    plans = deliberator([request_after(exact, seed=seed, simulations=30) for seed in (0, 1, 0, 2, 3)])
    probs = [tuple(plan.policy_probs_A.tolist()) for plan in plans]
    assert probs[0] == probs[2] and len(set(probs)) > 2


def test_the_same_batch_gives_the_same_bits(latent: Checkpoint) -> None:
    requests = [request_after(latent, text, lag=1) for text in TEXTS]
    deliberator = Deliberator.from_checkpoint(latent)
    for mine, other in zip(deliberator(requests), deliberator(requests), strict=True):
        for name, value in vars_of(mine).items():
            if name != "seconds":
                np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def test_snapshots_are_read_and_not_written(exact: Checkpoint) -> None:
    request = request_after(exact, lag=2, hypotheses=2)
    arrays = [request.hidden_LD.copy(), request.ssm_LHPN.copy(), request.conv_LCK]
    for name in ("hidden_LD", "ssm_LHPN", "conv_LCK"):
        array = getattr(request, name).copy()
        array.flags.writeable = False
        request = dataclasses.replace(request, **{name: array})
    Deliberator.from_checkpoint(exact)([request])
    for before, after in zip(arrays, (request.hidden_LD, request.ssm_LHPN, request.conv_LCK), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_deadline_or_a_stop_ends_the_search_with_what_there_is(exact: Checkpoint) -> None:
    """Any-time: even with no time at all there is an answer, with nothing to write."""
    time = itertools.count()
    deliberator = Deliberator.from_checkpoint(exact, forced_confidence=1.0)
    late = deliberator([request_after(exact, deadline=4.5, simulations=50)], clock=lambda: float(next(time)))
    assert 0 < late[0].simulations < 10
    (stopped,) = deliberator([request_after(exact, simulations=50)], should_stop=lambda: True)
    assert stopped.simulations == 0 and stopped.line == () and not stopped.confidence_L.any()
    assert check_plan(stopped, exact.config.model.backbone, 1) is None


# Bad requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"hidden_LD": r.hidden_LD[:1]}, r"hidden_LD has shape \(1, 16\); allowed: \(2, 16\)"),
        (lambda r: {"ssm_LHPN": r.ssm_LHPN[..., 1:]}, r"ssm_LHPN has shape .*; allowed: \(2, 4, 8, 8\)"),
        (lambda r: {"conv_LCK": None}, r"conv_LCK has shape None; allowed: \(2, 48, 3\)"),
        (lambda r: {"hidden_LD": r.hidden_LD * np.float32("nan")}, "hidden_LD holds NaN"),
        (lambda r: {"ssm_LHPN": r.ssm_LHPN * np.float32("inf")}, "ssm_LHPN holds NaN or infinity"),
        (lambda r: {"conv_LCK": r.conv_LCK.astype(np.float64)}, "conv_LCK is float64; allowed: float32"),
        (lambda r: {"token": 31}, "token = 31; allowed: 0 to 30"),
        (lambda r: {"token": -1}, "token = -1"),
        (lambda r: {"target": r.position - 1}, "target = 5"),
        (lambda r: {"hypotheses": 0}, "hypotheses = 0"),
        (lambda r: {"simulations": 0}, "simulations = 0"),
    ],
)
def test_a_malformed_request_is_refused_by_its_number_and_field(
    exact: Checkpoint, change: Callable[[PlanRequest], dict[str, Any]], message: str
) -> None:
    good = request_after(exact, request_id=1)
    bad = dataclasses.replace(good, request_id=42, **change(good))
    with pytest.raises(ValueError, match=f"request 42: .*{message}"), np.errstate(invalid="ignore"):
        Deliberator.from_checkpoint(exact)([good, bad])
