"""The planner and its weights as plain objects, in this process."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.planner import PlannerActor, PlannerSettings
from actors.weights import open_source, pack, unpack
from crsm.latent_dynamics import ExactDynamics
from crsm.model import Checkpoint, save_checkpoint
from crsm.reasoning import Deliberator
from crsm.types import Plan
from tests.actors.helpers import make_requests, until
from tests.fixtures import tiny_checkpoint, tiny_config


def assert_same_plans(one: list[Plan], other: list[Plan]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        for field in dataclasses.fields(Plan):
            if field.name not in ("seconds", "planner_id"):
                assert np.array_equal(getattr(mine, field.name), getattr(theirs, field.name)), field.name


@pytest.mark.parametrize("tied", [False, True])
def test_weights_survive_the_way_bit_by_bit(tied: bool) -> None:
    before = tiny_checkpoint(tiny_config(tied=tied))
    weights = pack(before)
    for array in weights.state.values():
        array.flags.writeable = False  # as they come out of an object store
    after = unpack(weights)
    assert after.model.state_dict().keys() == before.model.state_dict().keys()
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor), name
        assert name == "lm_head.weight" or after.model.state_dict()[name].data_ptr() != tensor.data_ptr()
    assert (after.config, after.model_version, after.weights_hash) == (
        before.config,
        before.model_version,
        before.weights_hash,
    )
    assert after.tokenizer.to_json() == before.tokenizer.to_json()


def test_bfloat16_survives_the_way() -> None:
    before = tiny_checkpoint()
    before.model.to(torch.bfloat16)
    tensor = unpack(pack(before)).model.state_dict()["world_model.encoder.weight"]
    assert torch.equal(tensor, before.model.state_dict()["world_model.encoder.weight"].float())


def test_weights_that_do_not_fit_are_named(checkpoint: Checkpoint) -> None:
    weights = pack(checkpoint)
    state = dict(weights.state)
    del state["fusion.weight" if "fusion.weight" in state else sorted(state)[0]]
    with pytest.raises(ValueError, match="missing or not one of"):
        unpack(dataclasses.replace(weights, state=state))
    state = dict(weights.state, **{"writer.u.bias": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"writer\.u\.bias"):
        unpack(dataclasses.replace(weights, state=state))


def test_a_planner_plans_what_its_checkpoint_plans(checkpoint: Checkpoint, tmp_path: Path) -> None:
    requests = make_requests(checkpoint)
    expected = Deliberator.from_checkpoint(checkpoint)(requests)
    save_checkpoint(checkpoint, tmp_path / "tiny")
    for source in (pack(checkpoint), str(tmp_path / "tiny")):
        planner = PlannerActor(source, planner_id="p")
        plans = planner.plan(requests, time.monotonic())
        assert_same_plans(plans, expected)
        assert {plan.planner_id for plan in plans} == {"p"}


def test_settings_replace_what_the_checkpoint_says(checkpoint: Checkpoint) -> None:
    search = tiny_config().search.model_copy(update={"num_actions": 2})
    settings = PlannerSettings(search=search, plan_length=1, forced_confidence=0.5)
    (plan,) = PlannerActor(pack(checkpoint), settings).plan(make_requests(checkpoint, 1), time.monotonic())
    assert len(plan.line) == 1 and len(plan.policy_tokens_A) <= 2 and set(plan.confidence_L.tolist()) <= {0.0, 0.5}
    assert isinstance(PlannerSettings(world_model="exact").planning_model(checkpoint), ExactDynamics)
    with pytest.raises(ValueError, match="conv_LCK"):
        PlannerActor(pack(checkpoint), PlannerSettings(world_model="exact")).plan(make_requests(checkpoint, 1), 0.0)


def test_new_weights_are_used_and_named_from_the_next_call_on(checkpoint: Checkpoint) -> None:
    requests = make_requests(checkpoint)
    other = dataclasses.replace(tiny_checkpoint(seed=9), model_version=8)
    planner = PlannerActor(pack(checkpoint))
    assert planner.ping(0.0).model_version == 3
    assert planner.update_weights(pack(other)) == 8
    assert_same_plans(planner.plan(requests, 0.0), Deliberator.from_checkpoint(other)(requests))


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_a_running_search_ends_early_and_answers(checkpoint: Checkpoint, end: str) -> None:
    (request,) = make_requests(checkpoint, 1)
    planner = PlannerActor(pack(checkpoint))
    endless = dataclasses.replace(request, simulations=1_000_000)
    found: list[Plan] = []
    search = threading.Thread(target=lambda: found.extend(planner.plan([endless], 0.0)))
    search.start()
    until(lambda: planner.ping(0.0).searching)
    while search.is_alive():  # a cancel before the search has begun is forgotten by it
        getattr(planner, end)()
        search.join(0.05)
    assert 0 <= found[0].simulations < 1_000_000
    after = planner.plan([request], 0.0)[0].simulations
    assert after == (request.simulations if end == "cancel" else 0)


def test_deadlines_are_kept_on_the_clock_of_the_sender(checkpoint: Checkpoint) -> None:
    (request,) = make_requests(checkpoint, 1)
    planner = PlannerActor(pack(checkpoint))
    senders_now = time.monotonic() + 1e6  # another machine, which was started long before
    planner.ping(senders_now)
    past, future = (dataclasses.replace(request, deadline=senders_now + offset) for offset in (-1.0, 1e4))
    assert planner.plan([past], senders_now)[0].simulations == 0
    assert planner.plan([future], senders_now)[0].simulations == request.simulations


def test_a_source_is_a_folder_or_a_message(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        open_source("nowhere")
    assert open_source(pack(checkpoint)).weights_hash == checkpoint.weights_hash
