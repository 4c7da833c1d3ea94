"""Whole deliberations by the native network beside those in PyTorch, and who computes when."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from crsm import native
from crsm.config import SamplingConfig, SearchConfig
from crsm.data.sequences import encode_prompt
from crsm.evaluation.solving import solve
from crsm.latent_dynamics import ExactDynamics, take_snapshot
from crsm.model import Checkpoint, load_checkpoint
from crsm.native.latent import LatentNetwork
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.search import search
from crsm.tasks import build_tasks, problems
from crsm.types import Plan, PlanRequest
from tests.fixtures import tiny_checkpoint, tiny_config
from tests.native.latent_models import another_world_model, random_model, random_snapshot, random_tokens

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native core: {native.MISSING}")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """PyTorch's products are small here; threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return load_checkpoint("nano")


@functools.cache
@torch.inference_mode()
def requests_of(count: int, lag: int = 2, hypotheses: int = 1, kind: str = "latent") -> list[PlanRequest]:
    """What an engine asks of the nano checkpoint at the end of held-out prompts of both tasks."""
    checkpoint, requests = load_checkpoint("nano"), []
    world = checkpoint.model.world_model if kind == "latent" else ExactDynamics(checkpoint.model.backbone)
    for task in build_tasks(checkpoint.config.tasks):
        for problem in problems(task, 3, "test", count // 2):
            prompt = encode_prompt(problem, checkpoint.tokenizer)
            logits_BV, hidden_BLD, state = checkpoint.model.prefill(torch.tensor([prompt]))
            snapshot = take_snapshot(hidden_BLD, state, world)
            requests.append(
                PlanRequest(
                    request_id=len(requests),
                    generation_id=f"g{len(requests)}",
                    position=len(prompt),
                    target=len(prompt) + lag,
                    token=int(logits_BV.argmax()),
                    hidden_LD=snapshot.hidden_BLD[0].numpy(),
                    ssm_LHPN=snapshot.memory_BMHPN[0].numpy(),
                    conv_LCK=None if snapshot.conv_BLCK is None else snapshot.conv_BLCK[0].numpy(),
                    hypotheses=hypotheses,
                )
            )
    return requests


def plans_by(engine: str, requests: list[PlanRequest], checkpoint: Checkpoint, kind: str = "latent") -> list[Plan]:
    world = None if kind == "latent" else ExactDynamics(checkpoint.model.backbone)
    return Deliberator.from_checkpoint(checkpoint, world_model=world, engine=engine)(requests)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["latent", "exact"])
@pytest.mark.parametrize(("lag", "hypotheses"), [(2, 1), (1, 2)])
def test_native_plans_are_those_of_pytorch(nano: Checkpoint, lag: int, hypotheses: int, kind: str) -> None:
    """Rounding may move a visit where two actions are equally good: at most one line in a hundred."""
    requests = requests_of(50, lag, hypotheses, kind)
    mine, theirs = (plans_by(engine, requests, nano, kind) for engine in ("native", "python"))
    assert [plan.assumed for plan in mine] == [plan.assumed for plan in theirs]
    same = [a.line == b.line for a, b in zip(mine, theirs, strict=True)]
    assert len(same) == 50 * hypotheses and np.mean(same) >= 0.99
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a.value_root_L, b.value_root_L, atol=1e-5)
        assert a.policy_tokens_A.tolist() == b.policy_tokens_A.tolist() and a.simulations == b.simulations
        if a.line == b.line:
            np.testing.assert_allclose(a.value_plan_L, b.value_plan_L, atol=1e-5)


def test_answers_are_as_right_as_with_pytorch(nano: Checkpoint) -> None:
    task = build_tasks(nano.config.tasks)[0]
    found = problems(task, 11, "test", 30)
    right = {}
    for engine in ("native", "python"):
        planners = InlinePlanners(Deliberator.from_checkpoint(nano, engine=engine))  # type: ignore[arg-type]
        run = solve(
            nano,
            task,
            found,
            planners=planners,
            deliberation=nano.config.deliberation,
            sampling=SamplingConfig(max_tokens=16),
            simulations=32,
            engine=nano.config.engine,
        )
        right[engine] = run.correct_M.tolist()
    assert right["native"] == right["python"]


def test_both_searches_grow_the_same_tree_on_the_native_network() -> None:
    model, settings = random_model(), SearchConfig(simulations=40, num_actions=5, max_depth=6)
    snapshot, known_B = random_snapshot(model, 6), random_tokens(model, 6)
    network = LatentNetwork.from_model(model, model.world_model)
    memory = network.memory(snapshot.memory_BMHPN.numpy())
    found = network.project(memory, snapshot.hidden_BLD.numpy(), known_B.numpy(), 1)
    trees = [
        search(
            network.evaluator(memory, found, 5, [1, 2]),
            settings,
            consensus_weights_L=model.critic.consensus_weights_L.numpy(),
            uncertainty_penalty=0.25,
            terminal_tokens=[1, 2],
            engine=engine,
        )
        for engine in ("native", "python")
    ]
    for field in dataclasses.fields(trees[0]):
        np.testing.assert_array_equal(*(getattr(tree, field.name) for tree in trees), err_msg=field.name)


@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_a_plan_is_bit_by_bit_what_it_is_alone(nano: Checkpoint, kind: str) -> None:
    requests = requests_of(10, kind=kind)
    together = plans_by("native", requests, nano, kind)
    for plan, request in list(zip(together, requests, strict=True))[::3]:
        (alone,) = plans_by("native", [request], nano, kind)
        for name in ("line", "simulations"):
            assert getattr(plan, name) == getattr(alone, name)
        for name in ("value_root_L", "value_plan_L", "policy_probs_A", "policy_tokens_A"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(alone, name))


# Who computes ---------------------------------------------------------------------------------------------------------


def computes_natively(deliberator: Deliberator) -> bool:
    return deliberator._network() is not None


def test_the_native_network_serves_where_it_can() -> None:
    latent, exact = tiny_checkpoint(), tiny_checkpoint(tiny_config(kind="exact"))
    assert computes_natively(Deliberator.from_checkpoint(latent))
    assert computes_natively(Deliberator.from_checkpoint(latent, engine="native"))
    assert not computes_natively(Deliberator.from_checkpoint(latent, engine="python"))
    assert computes_natively(Deliberator.from_checkpoint(exact))
    assert computes_natively(Deliberator.from_checkpoint(exact, engine="native"))
    assert not computes_natively(Deliberator.from_checkpoint(exact, engine="python"))
    elsewhere = ExactDynamics(latent.model.backbone)
    with pytest.raises(ValueError, match="engine = 'native', world model = ExactDynamics; allowed: a world model on"):
        Deliberator.from_checkpoint(exact, world_model=elsewhere, engine="native")
    wide = dataclasses.replace(latent, model=copy.deepcopy(latent.model).double())
    assert not computes_natively(Deliberator.from_checkpoint(wide))
    with pytest.raises(
        ValueError, match=r"engine = 'native', backbone.embedding.weight is torch.float64 on cpu; allowed"
    ):
        Deliberator.from_checkpoint(wide, engine="native")
    with pytest.raises(ValueError, match="engine = 'fast'; allowed: auto, native, python"):
        Deliberator.from_checkpoint(latent, engine="fast")  # type: ignore[arg-type]


def test_another_world_model_on_the_same_embedding_serves_too() -> None:
    checkpoint = tiny_checkpoint()
    other = another_world_model(checkpoint.model)
    assert computes_natively(Deliberator.from_checkpoint(checkpoint, world_model=other))
    foreign = tiny_checkpoint(seed=5).model.world_model
    assert not computes_natively(Deliberator.from_checkpoint(checkpoint, world_model=foreign))
    exact = ExactDynamics(checkpoint.model.backbone)
    assert computes_natively(Deliberator.from_checkpoint(checkpoint, world_model=exact))
    foreign_backbone = ExactDynamics(tiny_checkpoint(seed=5).model.backbone)
    assert not computes_natively(Deliberator.from_checkpoint(checkpoint, world_model=foreign_backbone))


def test_without_a_native_core_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "core", None)
    checkpoint = tiny_checkpoint()
    assert not computes_natively(Deliberator.from_checkpoint(checkpoint))
    with pytest.raises(RuntimeError, match="no native core"):
        Deliberator.from_checkpoint(checkpoint, engine="native")


def test_weights_are_packed_once_and_again_when_they_change(nano: Checkpoint) -> None:
    checkpoint = dataclasses.replace(nano, model=copy.deepcopy(nano.model))
    deliberator = Deliberator.from_checkpoint(checkpoint, engine="native")
    packed = deliberator._network()
    requests = requests_of(4)
    before = deliberator(requests)
    assert deliberator._network() is packed
    with torch.no_grad():
        checkpoint.model.critic.bias_L -= 2.0
    after = deliberator(requests)
    assert deliberator._network() is not packed
    for low, high in zip(after, before, strict=True):
        assert (low.value_root_L < high.value_root_L).all()
    deliberator.model, deliberator.world_model = nano.model, nano.model.world_model
    again = deliberator(requests)
    for one, other in zip(again, before, strict=True):
        np.testing.assert_array_equal(one.value_root_L, other.value_root_L)
