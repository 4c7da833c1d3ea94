"""Both systems beside the CPU: they say what they say on it, make nothing elsewhere, and wait as rarely as they can."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch

from crsm import native
from crsm.config import Channel, DeliberationConfig, EngineConfig, SamplingConfig, SearchConfig
from crsm.decoding import TorchDecoder
from crsm.devices import CPU, device_of, pick_device, rows_to_host, state_on, to_device, to_host
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.latent_dynamics import ExactDynamics
from crsm.model import Checkpoint
from crsm.placement import placed, settled
from crsm.planners import InlinePlanners, Planners
from crsm.reasoning import Deliberator, NetworkEvaluator, project, stack_snapshots
from crsm.saved_generation import SavedGeneration
from crsm.slots import TorchSlots
from crsm.types import Plan, PlanRequest, Token
from crsm.wire import to_wire
from tests.fixtures import PROMPT, FakePlanners, make_plan, random_state, tiny_checkpoint, tiny_config
from tests.second_device import DEVICE, Crossings, second_device

TORCH = EngineConfig(decoder="torch")
HERE = tiny_checkpoint()
OTHER_PROMPT = (10, 21, 4, 8, 23, 7)


@pytest.fixture
def crossings() -> Iterator[Crossings]:
    with second_device() as crossings:
        yield crossings


def ask(prompt: tuple[int, ...] = PROMPT, name: str = "", **fields: Any) -> GenerationRequest:
    sampling = SamplingConfig(**({"max_tokens": 5} | fields.pop("sampling", {})))
    deliberation = DeliberationConfig(**({"lag": 1, "injection_rate": 0.9} | fields.pop("deliberation", {})))
    return GenerationRequest(prompt, sampling, deliberation, 8, name, **fields)


class Unhurried(InlinePlanners):
    """Searches to the end, whatever the time."""

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        super().submit([dataclasses.replace(request, deadline=None) for request in requests])


def inline(checkpoint: Checkpoint) -> Planners:
    return Unhurried(Deliberator.from_checkpoint(checkpoint, engine="python"))


def assert_alike(found: list[Token], want: list[Token]) -> None:
    assert [(t.generation_id, t.position, t.token) for t in found] == [
        (t.generation_id, t.position, t.token) for t in want
    ]
    assert [t.logprob for t in found] == pytest.approx([t.logprob for t in want], abs=1e-4)
    assert [t.injection is None for t in found] == [t.injection is None for t in want]


# The device that settings name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "there", "want"), [("cpu", True, "cpu"), ("auto", False, "cpu")])
def test_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch: Any, name: str, there: bool, want: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device(name) == torch.device(want)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_is_chosen_with_its_number(monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device(name) == torch.device("cuda", 1)


def test_a_device_that_is_not_there_is_refused_by_the_name_of_its_setting(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"engine\.device = 'cuda': this machine has none .*; allowed: auto, cpu"):
        Engine(HERE, config=EngineConfig(device="cuda"))
    settings = HERE.config.planners.model_copy(update={"device": "cuda"})
    HERE.model.config, before = HERE.config.model_copy(update={"planners": settings}), HERE.config
    try:
        with pytest.raises(ValueError, match=r"planners\.device = 'cuda'"):
            Deliberator.from_checkpoint(HERE)
    finally:
        HERE.model.config = before
    with pytest.raises(ValueError, match="device = 'tpu'; allowed: auto, cpu, cuda"):
        pick_device("tpu")


# On the CPU nothing moves -------------------------------------------------------------------------------------------


def test_on_the_cpu_everything_stays_what_it_is() -> None:
    x, state = torch.zeros(3), random_state(HERE)
    assert placed(HERE, CPU) is HERE and settled(HERE, "cpu", "device") is HERE
    assert to_device(x, CPU) is x and to_host(x)[0] is x and state_on(state, CPU) is state


# Beside the CPU -----------------------------------------------------------------------------------------------------


def test_the_second_device_refuses_to_mix(crossings: Crossings) -> None:
    there = torch.zeros(3, device=DEVICE)
    assert there.device == DEVICE and not there.is_cpu
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        there[torch.tensor([1])]
    there[torch.tensor([1]).to(DEVICE)] = 2.0
    assert crossings.back == 0
    assert there.cpu().tolist() == [0.0, 2.0, 0.0]
    assert crossings.back == 1
    assert float(there[1]) == 2.0
    assert crossings.back == 2
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_a_placed_model_is_another_with_the_same_weights(crossings: Crossings, tied: bool) -> None:
    here = tiny_checkpoint(tiny_config(tied=tied))
    there = placed(here, DEVICE)
    assert device_of(there.model) == DEVICE and device_of(here.model) == CPU
    assert all(tensor.device == DEVICE for tensor in there.model.state_dict().values())
    assert (there.model.lm_head.weight is there.model.backbone.embedding.weight) == tied
    assert there.model.world_model.embedding is there.model.backbone.embedding
    for name, tensor in there.model.state_dict().items():
        assert torch.equal(tensor.cpu(), here.model.state_dict()[name])


def test_weights_are_placed_once_and_again_only_when_they_are_others(crossings: Crossings) -> None:
    here = tiny_checkpoint(seed=3)
    there = placed(here, DEVICE)
    assert placed(here, DEVICE).model is there.model is placed(dataclasses.replace(here), DEVICE).model
    with torch.no_grad():
        here.model.critic.bias_L += 1.0
    newer = placed(here, DEVICE)
    assert newer.model is not there.model
    assert torch.equal(newer.model.critic.bias_L.cpu(), here.model.critic.bias_L)
    # Someone else's copy that was changed is not handed out.
    Engine(newer, config=TORCH).update_weights(tiny_checkpoint(seed=5))
    again = placed(here, DEVICE)
    assert torch.equal(again.model.critic.bias_L.cpu(), here.model.critic.bias_L)
    here.model.config = here.config.model_copy(update={"seed": 9})
    assert placed(here, DEVICE).config.seed == 9


REQUESTS = {
    "greedy": {},
    "sampled": {"sampling": {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "seed": 3}},
    "forced": {"forced": (9, 21, 3)},
}


@pytest.mark.parametrize(
    ("kind", "clock"), [("", "virtual"), ("latent", "virtual"), ("latent", "wall"), ("exact", "virtual")]
)
def test_an_engine_says_there_what_it_says_here(
    crossings: Crossings, kind: str, clock: Literal["virtual", "wall"]
) -> None:
    """Alone and with System 2, all three requests in one batch, on every channel."""
    here = tiny_checkpoint(tiny_config(kind=kind)) if kind else HERE  # type: ignore[arg-type]
    channels = {"greedy": Channel.STATE, "sampled": Channel.BOTH, "forced": Channel.POLICY}
    said = []
    for checkpoint in (here, placed(here, DEVICE)):
        requests = [
            ask(PROMPT, name, **fields, deliberation={"channel": channels[name], "lag": 0})
            for name, fields in REQUESTS.items()
        ]
        config = TORCH.model_copy(update={"clock": clock})
        engine = Engine(checkpoint, inline(checkpoint) if kind else None, config)
        said.append(list(engine.generate([*requests, ask(OTHER_PROMPT, "long", sampling={"max_tokens": 7})])))
        assert bool(engine.metrics.injections) == bool(kind)
    assert_alike(said[1], said[0])


def test_late_plans_are_carried_there_too(crossings: Crossings) -> None:
    def plans(request: PlanRequest) -> list[Plan]:
        return [make_plan(request, HERE, seed=request.target)]

    said = []
    for checkpoint in (HERE, placed(HERE, DEVICE)):
        planners = FakePlanners(plans, delay=lambda request: (3,))
        config = TORCH.model_copy(update={"clock": "wall"})
        fields = {"lag": 0, "injection_rate": 0.5, "max_lag": 4, "plan_every": 3}
        engine = Engine(checkpoint, planners, config)
        said.append(list(engine.generate([ask(name="g", deliberation=fields)])))
    assert_alike(said[1], said[0])


def test_a_generation_goes_on_there_from_what_was_saved_here_and_back(crossings: Crossings) -> None:
    there = placed(HERE, DEVICE)
    request = ask(name="g", sampling={"max_tokens": 8})
    want = list(Engine(HERE, inline(HERE), TORCH).generate([request]))
    for first, second in ((HERE, there), (there, HERE)):
        engine = Engine(first, inline(first), TORCH)
        engine.submit(request)
        said = [token for _ in range(4) for token in engine.step()]
        saved = engine.snapshot("g")
        assert isinstance(saved, SavedGeneration) and isinstance(saved.ssm_LHPN, np.ndarray)
        resumed = ask((), "h", start=saved, sampling={"max_tokens": 8})
        more = list(Engine(second, inline(second), TORCH).generate([resumed]))
        assert_alike(said + [token._replace(generation_id="g") for token in more], want)


def test_turns_states_and_new_weights_work_there(crossings: Crossings) -> None:
    newer = dataclasses.replace(tiny_checkpoint(seed=9), model_version=4)
    said = []
    for checkpoint in (tiny_checkpoint(), placed(HERE, DEVICE)):
        engine = Engine(checkpoint, config=TORCH)
        tokens = list(engine.generate([ask(name="g", park=True, keep=True), ask(OTHER_PROMPT, "r", read_only=True)]))
        assert [saved.finished for saved in engine.take_kept()] == [False, True]
        tokens += list(engine.generate([ask((4, 5), "g")]))
        engine.update_weights(newer)
        said.append(tokens + list(engine.generate([ask(name="n")])))
    assert_alike(said[1], said[0])


@pytest.mark.parametrize("streams", [1, 3])
def test_a_step_waits_once_for_what_it_says(crossings: Crossings, streams: int) -> None:
    """Tokens and their log-probabilities: two tensors in one crossing, however many generations."""
    engine = Engine(placed(HERE, DEVICE), config=TORCH)
    for stream in range(streams):
        engine.submit(ask(name=str(stream), sampling={"max_tokens": 30}))
    engine.step()
    crossings.reset()
    for _ in range(10):
        engine.step()
    assert crossings.back == 2 * 10


def test_states_are_rounded_before_they_cross(crossings: Crossings) -> None:
    """As they would be afterwards, bit for bit."""
    there, state = placed(HERE, DEVICE), random_state(HERE)
    slots = TorchSlots(HERE.model, TorchDecoder(HERE.model), 2), TorchSlots(there.model, TorchDecoder(there.model), 2)
    layers = HERE.model.config.model.backbone.n_layer
    hidden_1LD = torch.randn(1, layers, HERE.model.config.model.backbone.d_model)
    for one in slots:
        one.put([1], state, hidden_1LD)
    want, found = (one.read([1], [0], True, "bf16") for one in slots)
    assert [part.dtype for part in found if part is not None] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, theirs in zip(found, want, strict=True):
        assert mine is not None and theirs is not None and mine.is_cpu
        np.testing.assert_array_equal(to_wire(mine, "bf16"), to_wire(theirs, "bf16"))


def test_requests_are_ranked_there_as_here(crossings: Crossings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By planners that have room for some of them; a number each crosses, whatever the vocabulary."""
    ranked = []
    for checkpoint in (HERE, placed(HERE, DEVICE)):
        planners = FakePlanners(lambda request: None)
        monkeypatch.setattr(planners, "room", lambda: 2)
        engine = Engine(checkpoint, planners, TORCH.model_copy(update={"clock": "wall"}))
        prompts = [tuple((3 * i + 5 * j) % 20 for j in range(6)) for i in range(4)]
        list(engine.generate(ask(prompt, str(i), deliberation={"lag": 1}) for i, prompt in enumerate(prompts)))
        ranked.append([(request.generation_id, request.position, request.value) for request in planners.requests])
    assert len(ranked[0]) > 2
    assert [entry[:2] for entry in ranked[1]] == [entry[:2] for entry in ranked[0]]
    assert [entry[2] for entry in ranked[1]] == pytest.approx([entry[2] for entry in ranked[0]], rel=1e-4)


# The search ---------------------------------------------------------------------------------------------------------


def requests_for(checkpoint: Checkpoint, count: int, lag: int, hypotheses: int = 1) -> list[PlanRequest]:
    """Snapshots of some prompts, as a generator asks."""
    planners = FakePlanners(lambda request: None)
    fields = {"lag": lag, "hypotheses": hypotheses, "max_plans": 1}
    engine = Engine(checkpoint, planners, TORCH.model_copy(update={"clock": "wall"}))
    prompts = [tuple((3 * i + 5 * j) % 20 for j in range(6)) for i in range(count)]
    list(engine.generate(ask(prompt, str(i), deliberation=fields) for i, prompt in enumerate(prompts)))
    return planners.requests


@pytest.mark.parametrize("kind", ["latent", "exact"])
@pytest.mark.parametrize(("lag", "hypotheses"), [(0, 1), (2, 1), (2, 3)])
def test_plans_made_there_are_those_made_here(crossings: Crossings, kind: Any, lag: int, hypotheses: int) -> None:
    here = tiny_checkpoint(tiny_config(kind=kind))
    requests = requests_for(here, 3, lag, hypotheses)
    want = Deliberator.from_checkpoint(here, engine="python")(requests)
    deliberator = Deliberator.from_checkpoint(placed(here, DEVICE))
    assert deliberator.device == DEVICE
    found = deliberator(requests)
    assert len(found) == len(want) == 3 * (hypotheses if lag else 1)
    for mine, theirs in zip(found, want, strict=True):
        assert (mine.assumed, mine.line, mine.simulations) == (theirs.assumed, theirs.line, theirs.simulations)
        for name in ("value_root_L", "value_plan_L", "confidence_L", "write_u_LRE", "write_b_LRN", "policy_probs_A"):
            assert isinstance(getattr(mine, name), np.ndarray)
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=1e-4)


def test_a_wave_of_all_trees_crosses_once_each_way(crossings: Crossings) -> None:
    """Tokens, their logits and values come back together; whatever the number of trees."""
    here = tiny_checkpoint(tiny_config())
    requests = requests_for(here, 4, 0)
    there = placed(here, DEVICE).model
    with torch.inference_mode():
        snapshot = stack_snapshots(requests).on(DEVICE)
        known_B = torch.tensor([request.token for request in requests]).to(DEVICE)
        future = project(there, there.world_model, snapshot, known_B, 0)
        evaluator = NetworkEvaluator(there, there.world_model, future, 4, 4, [1])
        crossings.reset()
        root = evaluator.root()
        assert crossings.back == 1
        crossings.reset()
        active_B = np.array([True, True, False, True])
        parent_B, node_B = np.zeros(4, np.int64), np.full(4, 1, np.int64)
        evaluator.expand(parent_B, root.actions_BA[:, 0].copy(), node_B, active_B)
        assert crossings.back == 1
        crossings.reset()
        tree_R, parent_R, node_R = np.array([0, 0, 3]), np.array([0, 0, 0]), np.array([2, 3, 2])
        found = evaluator.expand_rows(tree_R, parent_R, root.actions_BA[tree_R, [0, 1, 0]], node_R)
        assert found.actions_BA.shape == (3, 4) and crossings.back == 1


def test_what_comes_back_together_is_what_was_there(crossings: Crossings) -> None:
    actions_RA = torch.tensor([[5, 0], [2**31 - 1, 7]])
    logits_RA, values_RL = torch.tensor([[-1.5, -2.0], [0.25, -0.0]]), torch.tensor([[0.1], [0.9]])
    found = rows_to_host(actions_RA.to(DEVICE), logits_RA.to(DEVICE), values_RL.to(DEVICE))
    for mine, want in zip(found, (actions_RA, logits_RA, values_RL), strict=True):
        assert torch.equal(mine, want) and mine.dtype == want.dtype and mine.is_contiguous()
    assert crossings.back == 1
    assert rows_to_host(actions_RA, logits_RA)[0] is actions_RA


@pytest.mark.skipif(not native.available(), reason="several leaves in flight need the native core")
@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_several_leaves_of_a_tree_are_imagined_there_in_one_call(
    crossings: Crossings, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tiny_checkpoint(tiny_config(kind=kind))
    requests = requests_for(here, 3, 1)
    settings = here.config.search.model_copy(update={"leaves": 3, "virtual_loss": 1})
    rows = []
    together = NetworkEvaluator.expand_rows

    def expand_rows(self: NetworkEvaluator, *leaves: np.ndarray) -> Any:
        rows.append(len(leaves[0]))
        return together(self, *leaves)

    monkeypatch.setattr(NetworkEvaluator, "expand_rows", expand_rows)
    found = Deliberator.from_checkpoint(placed(here, DEVICE), search=settings)(requests)
    assert max(rows) > 3
    monkeypatch.delattr(NetworkEvaluator, "expand_rows")  # one after the other
    want = Deliberator.from_checkpoint(here, search=settings)(requests)
    for mine, theirs in zip(found, want, strict=True):
        assert (mine.line, mine.simulations) == (theirs.line, theirs.simulations)
        np.testing.assert_allclose(mine.policy_probs_A, theirs.policy_probs_A, atol=1e-4)
        np.testing.assert_allclose(mine.value_plan_L, theirs.value_plan_L, atol=1e-4)


def test_trees_that_rest_keep_their_latents() -> None:
    here = tiny_checkpoint(tiny_config())
    requests = requests_for(here, 2, 0)
    with torch.inference_mode():
        known_B = torch.tensor([request.token for request in requests])
        future = project(here.model, here.model.world_model, stack_snapshots(requests), known_B, 0)
        evaluator = NetworkEvaluator(here.model, here.model.world_model, future, 4, 4, [1])
        root = evaluator.root()
        both, first = np.array([True, True]), np.array([True, False])

        def expand(parent: int, node: int, active_B: np.ndarray) -> np.ndarray:
            parents, nodes = np.full(2, parent, np.int64), np.full(2, node, np.int64)
            return evaluator.expand(parents, root.actions_BA[:, 0].copy(), nodes, active_B).values_BL

        expand(0, 1, both)
        before = expand(1, 2, both)
        expand(0, 3, first)  # the second tree rests: nothing of it may change, whatever slot is named
        expand(2, 1, first)
        after = expand(1, 2, both)
        np.testing.assert_array_equal(before[1], after[1])
        assert not np.array_equal(before[0], after[0])


@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_a_world_model_that_lies_elsewhere_is_refused(crossings: Crossings, kind: str) -> None:
    other = tiny_checkpoint(tiny_config(), seed=5).model
    world_model = other.world_model if kind == "latent" else ExactDynamics(other.backbone)
    with pytest.raises(ValueError, match=r"world_model on cpu, the model on privateuseone:0; allowed: one of the"):
        Deliberator.from_checkpoint(placed(HERE, DEVICE), world_model=world_model, search=SearchConfig(simulations=2))
