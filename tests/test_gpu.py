"""Both systems on a real GPU beside the CPU: `make test-gpu`, `scripts/gpu_checks.sh test`."""

from __future__ import annotations

import functools
import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.data.sequences import encode_prompt
from crsm.decoding import TorchDecoder
from crsm.devices import pick_device
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint, load_checkpoint
from crsm.placement import placed
from crsm.planners import InlinePlanners, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.slots import TorchSlots
from crsm.step_graphs import CudaRecorder, GraphedSlots
from crsm.tasks import build_tasks
from crsm.types import ModelState, Plan, PlanRequest, StepOutput, Token
from jobs import benchmark_speed
from jobs.command import invoke

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

EAGER = EngineConfig(device="cuda", cuda_graphs=False)
GRAPHS = EngineConfig(device="cuda")

nano = functools.cache(lambda: load_checkpoint("nano"))


@functools.cache
def nano_there() -> Checkpoint:
    return placed(nano(), pick_device("cuda"))


def requests(count: int, **deliberation: Any) -> list[GenerationRequest]:
    """Fresh problems of both tasks."""
    tasks = build_tasks(nano().config.tasks)
    problems = [tasks[number % len(tasks)].generate(7, "test", number) for number in range(count)]
    settings = nano().config.deliberation.model_copy(update=deliberation)
    return [
        GenerationRequest(
            tuple(encode_prompt(problem, nano().tokenizer)), SamplingConfig(max_tokens=24), settings, 64, str(i)
        )
        for i, problem in enumerate(problems)
    ]


def said(tokens: list[Token]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for token in tokens:
        found.setdefault(token.generation_id, []).append(token.token)
    return found


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    """TF32 would hide differences behind its own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_logits_on_the_gpu_are_those_of_the_cpu() -> None:
    tokens_BT = torch.randint(nano().tokenizer.vocab_size, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want, _, state = nano().model.prefill(tokens_BT)
        found, _, state_there = nano_there().model.prefill(tokens_BT.cuda())
        torch.testing.assert_close(found.cpu(), want, atol=1e-3, rtol=1e-3)
        for step in range(20):
            token_B = want.argmax(dim=-1)
            out = nano().model.backbone.step(token_B, state)
            out_there = nano_there().model.backbone.step(token_B.cuda(), state_there)
            state, state_there = out.state, out_there.state
            want, found = nano().model.logits(out.hidden_BLD), nano_there().model.logits(out_there.hidden_BLD)
            torch.testing.assert_close(found.cpu(), want, atol=1e-3, rtol=1e-3, msg=f"step {step}")


@pytest.mark.parametrize("config", [EAGER, GRAPHS], ids=["launched", "graphs"])
def test_greedy_text_is_the_same_on_the_gpu(config: EngineConfig) -> None:
    want = list(Engine(nano(), config=EngineConfig(decoder="torch")).generate(requests(16)))
    found = list(Engine(nano(), config=config).generate(requests(16)))
    assert said(found) == said(want)
    assert [t.logprob for t in found] == pytest.approx([t.logprob for t in want], abs=1e-3)


def test_steps_are_really_recorded(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "crsm.step_graphs"):
        engine = Engine(nano(), config=GRAPHS)
        list(engine.generate(requests(5)))
    assert isinstance(engine._slots, GraphedSlots) and not caplog.records
    assert {size for size, _ in engine._slots._graphs} >= {8}


@pytest.mark.parametrize("config", [EAGER, GRAPHS], ids=["launched", "graphs"])
def test_system_2_on_the_gpu_solves_what_it_solves_on_the_cpu(config: EngineConfig) -> None:
    here = InlinePlanners(Deliberator.from_checkpoint(nano()))
    there = InlinePlanners(Deliberator.from_checkpoint(nano_there()))
    want = said(list(Engine(nano(), here).generate(requests(24, lag=1))))
    found = said(list(Engine(nano_there(), there, config).generate(requests(24, lag=1))))
    # A search breaks ties by rounding: nearly all answers are the same, not each.
    assert sum(found[name] == want[name] for name in want) >= 22


def test_plans_made_on_the_gpu_are_those_of_the_cpu() -> None:
    kept: list[PlanRequest] = []

    class Keeper(InlinePlanners):
        def submit(self, requests: Any) -> None:
            kept.extend(requests)
            super().submit(requests)

    list(Engine(nano(), Keeper(Deliberator.from_checkpoint(nano()))).generate(requests(8, lag=1, max_plans=1)))
    want, found = Deliberator.from_checkpoint(nano())(kept), Deliberator.from_checkpoint(nano_there())(kept)
    same = [pair for pair in zip(found, want, strict=True) if pair[0].line == pair[1].line]
    assert len(same) >= 7
    for mine, theirs in same:
        for name in ("value_root_L", "value_plan_L", "write_u_LRE", "write_b_LRN"):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=2e-2, rtol=2e-2)


def test_planners_in_threads_search_on_a_stream_of_their_own_while_steps_are_recorded() -> None:
    streams: set[int] = set()

    class Noting(Deliberator):
        def _plan(self, *args: Any) -> list[list[Plan]]:
            streams.add(torch.cuda.current_stream().cuda_stream)
            assert threading.current_thread() is not threading.main_thread()
            return super()._plan(*args)

    planners = ThreadPlanners(Noting.from_checkpoint(nano_there()), count=2, max_batch=4)
    try:
        config = GRAPHS.model_copy(update={"clock": "wall"})
        engine = Engine(nano_there(), planners, config)
        tokens = list(engine.generate(requests(16, lag=1)))
    finally:
        planners.close()
    assert len(said(tokens)) == 16 and engine.metrics.requests
    assert streams and torch.cuda.default_stream().cuda_stream not in streams


def test_states_cross_between_gpu_and_cpu_in_the_middle_of_a_turn() -> None:
    (request,) = requests(1)
    want = list(Engine(nano(), config=EngineConfig(decoder="torch")).generate([request]))
    engine = Engine(nano(), config=GRAPHS)
    engine.submit(request)
    first = [token for _ in range(3) for token in engine.step()]
    saved = engine.snapshot(request.generation_id)
    rest = GenerationRequest((), request.sampling, DeliberationConfig(), 64, "rest", start=saved)
    tokens = first + list(Engine(nano(), config=EngineConfig(decoder="torch")).generate([rest]))
    assert [t.token for t in tokens] == [t.token for t in want]


def test_a_step_that_cannot_be_recorded_is_launched_and_that_is_said_once(caplog: Any) -> None:
    class Asking(TorchDecoder):
        def step(self, token_B: torch.Tensor, state: ModelState, donate: bool = False) -> StepOutput:
            assert int(token_B[0]) >= 0  # waits for the device, which no graph can
            return super().step(token_B, state, donate)

    model, device = nano_there().model, pick_device("cuda")
    with torch.inference_mode():
        _, hidden_BLD, state = model.prefill(torch.arange(6, device=device).expand(2, 6))
    graphed = GraphedSlots(model, Asking(model), 2, CudaRecorder(device))
    plain = TorchSlots(model, TorchDecoder(model), 2)
    with caplog.at_level(logging.WARNING, "crsm.step_graphs"):
        for slots in (graphed, plain):
            slots.put([0, 1], state, hidden_BLD)
        for named in ([0], [0, 1], [1]):
            found, want = (slots.step([7] * len(named), named, 2) for slots in (graphed, plain))
            torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-3)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("leaves", [1, 4])
def test_a_search_with_several_leaves_comes_to_the_cpus_lines(leaves: int) -> None:
    kept: list[PlanRequest] = []

    class Keeper(InlinePlanners):
        def submit(self, requests: Any) -> None:
            kept.extend(requests)
            super().submit(requests)

    list(Engine(nano(), Keeper(Deliberator.from_checkpoint(nano()))).generate(requests(8, lag=1, max_plans=1)))
    settings = nano().config.search.model_copy(update={"leaves": leaves, "virtual_loss": 1})
    want, found = (Deliberator.from_checkpoint(where, search=settings)(kept) for where in (nano(), nano_there()))
    assert sum(mine.line == theirs.line for mine, theirs in zip(found, want, strict=True)) >= 7


def test_the_benchmark_of_both_systems_runs_on_the_gpu(tmp_path: Path) -> None:
    arguments = ["device", "--quick", "--device", "cuda", "--json", str(tmp_path / "r.json")]
    assert invoke(benchmark_speed.app, arguments) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["results"]["rows"]
    assert all(row["ours"] > 0 for row in rows)
    assert any(row.get("peer_name") == "the native core on the CPU" for row in rows)


@pytest.mark.ray
def test_actors_share_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    arguments = ["nonblocking", "--quick", "--device", "cuda", "--json", str(tmp_path / "r.json")]
    assert invoke(benchmark_speed.app, arguments) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["results"]["rows"]
    assert any(row.get("requests", 0) > 0 for row in rows)
