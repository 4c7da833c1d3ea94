"""What docs/reliability.md promises of each failure, where no other test proves it; the way is the real one: actors,
processes, an object store of 80 MB that cannot spill."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.cluster import ROOT, start_ray
from actors.generator import start_generator, stop_generator
from actors.planner import PlannerSettings
from actors.pool import PlannerPool
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.engine import Engine
from crsm.event_log import EventLog
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.types import PlanRequest, Reason
from jobs.faults.campaign import system_1
from jobs.faults.invariants import Record, check_generation, check_settled
from jobs.faults.load import stream
from jobs.faults.planner import Orders, faulty_planner, read_ledger, start_clock
from jobs.faults.processes import actors_of, signal_all
from jobs.faults.processes import is_running as alive
from jobs.faults.schedule import BadPlan, Event, EventKind, Phase, fate_of
from tests.actors.helpers import PROMPTS, WALL, is_running, make_requests, run, until
from tests.fixtures import PROMPT

OFTEN = DeliberationConfig(lag=1, injection_rate=0.9)
STORE_BYTES = 80 * 2**20

needs_ray = pytest.mark.ray


@pytest.fixture(scope="module")
def small_store() -> Iterator[None]:
    """Ray with an object store that is full when it is full."""
    with start_ray(
        "local",
        num_cpus=8,
        object_store_memory=STORE_BYTES,
        system_config={
            "automatic_object_spilling_enabled": False,
            "oom_grace_period_s": 1,
            "local_fs_capacity_threshold": 0.01,  # no room on disk either
        },
    ):
        yield


def storm(checkpoint: Checkpoint, ledger: Path, seed: int) -> Any:
    """Planners that make plans bad all the time."""
    start_clock(ledger, 0.0)
    phase = Phase(1e10, True, (Event(0.0, EventKind.STORM, 1e10),), ())
    return faulty_planner(Orders(seed, phase, str(ledger), checkpoint.config.model.backbone.vocab_size))


def requests_of(tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt, SamplingConfig(max_tokens=tokens), OFTEN, 8, f"g{index}")
        for index, prompt in enumerate(PROMPTS)
    ]


def record_all(engine: Engine, requests: list[GenerationRequest]) -> list[Record]:
    records = {request.generation_id: Record(request.generation_id, request.prompt) for request in requests}
    for token in engine.generate(requests):
        records[token.generation_id].tokens.append(token)
    return list(records.values())


def listening(generator: Any, record: Record, settings: DeliberationConfig) -> threading.Thread:
    """A client of a generation without an end; notes how its stream broke off, if it does."""

    def listen() -> None:
        try:
            for token in stream(generator, record, SamplingConfig(max_tokens=10**6), settings):
                record.tokens.append(token)
        except ray.exceptions.RayError as error:
            record.error = type(error).__name__

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    return thread


# ------------------------------------------------------------------------------------------------ plans

REFUSED = {
    **dict.fromkeys((BadPlan.NAN, BadPlan.INFINITY, BadPlan.SHAPE, BadPlan.VOCABULARY), Reason.MALFORMED),
    **dict.fromkeys((BadPlan.CONFIDENCE, BadPlan.GENERATION, BadPlan.POSITION, BadPlan.TARGET), Reason.MALFORMED),
    **dict.fromkeys((BadPlan.LOST, BadPlan.UNKNOWN), Reason.LOST),
    BadPlan.VERSION: Reason.OLD_VERSION,
}


@needs_ray
def test_each_bad_plan_is_refused_by_its_reason_and_each_sound_one_is_used(
    small_store: None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """By the virtual clock, so that every plan is there in time and what becomes of it is no matter of speed."""
    seed, log = 5, io.StringIO()
    pool = PlannerPool(
        checkpoint,
        PlannersConfig(count=1),
        shed=False,
        num_cpus=0.5,
        planner_class=storm(checkpoint, tmp_path, seed),
    )
    try:
        engine = Engine(checkpoint, pool, event_log=EventLog(log))
        records = record_all(engine, requests_of(tokens=60))
    finally:
        pool.close()
    rules = system_1(checkpoint, SamplingConfig(max_tokens=60), OFTEN.max_lag)
    assert [message for record in records for message in check_generation(record, rules)] == []
    assert check_settled(engine.metrics.summary()) == []
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    reasons = {event["request"]: Reason(event["reason"]) for event in events if event["event"] == "reject"}
    asked = [event["request"] for event in events if event["event"] == "request"]
    seen: Counter[BadPlan | None] = Counter()
    for request in asked:
        fate, reason = fate_of(seed, request), reasons.get(request, Reason.ON_TIME)
        if reason is Reason.ENDED:
            continue
        seen[fate] += 1
        if fate in REFUSED:
            assert reason is REFUSED[fate], (request, fate)
        else:
            assert reason in (Reason.ON_TIME, Reason.MISMATCH, Reason.SHUT), (request, fate)
    assert seen.keys() == {*BadPlan, None}, "not every kind was seen: say more tokens"
    deeds = read_ledger(tmp_path)
    assert all(deeds[fate] >= seen[fate] for fate in BadPlan)


@needs_ray
def test_with_every_plan_refused_the_text_is_system_1s(
    small_store: None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = dataclasses.replace(checkpoint, model_version=checkpoint.model_version + 1)
    pool = PlannerPool(other, PlannersConfig(count=1), shed=False, num_cpus=0.5)
    try:
        engine = Engine(checkpoint, pool)
        assert run(engine, requests_of(20)) == run(Engine(checkpoint), requests_of(20))
    finally:
        pool.close()
    assert set(engine.metrics.outcomes) <= {Reason.OLD_VERSION, Reason.ENDED}
    assert engine.metrics.outcomes[Reason.OLD_VERSION] > 0 == engine.metrics.injections


# ------------------------------------------------------------------------------------------------ planners


@needs_ray
def test_a_stopped_process_costs_its_plans_and_comes_back_when_it_goes_on(
    small_store: None, checkpoint: Checkpoint
) -> None:
    pool = PlannerPool(checkpoint, PlannersConfig(count=1, max_batch=1), shed=True, num_cpus=0.5)
    try:
        assert pool.wait_until_ready() == 1
        (pid,) = pool.stats().pids
        os.kill(pid, signal.SIGSTOP)
        engine = Engine(checkpoint, pool, WALL)
        assert run(engine, requests_of(20)) == run(Engine(checkpoint), requests_of(20))
        assert check_settled(engine.metrics.summary()) == []
        assert engine.metrics.injections == 0 and set(engine.metrics.outcomes) <= {
            Reason.SHED,
            Reason.LOST,
            Reason.ENDED,
            Reason.DECLINED,
        }
        asked = engine.metrics.requests - engine.metrics.outcomes[Reason.DECLINED]
        until(lambda: pool.stats().requests == asked)  # the dispatcher has seen them all
        os.kill(pid, signal.SIGCONT)
        until(lambda: pool.stats().in_flight == pool.stats().waiting == 0)
        request = dataclasses.replace(make_requests(checkpoint, 1)[0], request_id=10**6)
        pool.submit([request])
        assert request.request_id in [plan.request_id for plan in pool.wait([request.request_id]).plans]
        assert pool.stats().pids == (pid,) and pool.stats().deaths == 0
    finally:
        pool.close()


@needs_ray
def test_planners_that_die_on_order_in_mid_search_cost_their_plans_only(
    small_store: None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    start_clock(tmp_path, 0.0)
    orders = tuple(Event(0.0, EventKind.KILL, number=number) for number in range(2))
    sizes = checkpoint.config.model.backbone
    planner = faulty_planner(Orders(0, Phase(1e10, True, orders, ()), str(tmp_path), sizes.vocab_size))
    pool = PlannerPool(checkpoint, PlannersConfig(count=2), shed=False, num_cpus=0.5, planner_class=planner)
    try:
        assert pool.wait_until_ready() == 2
        engine = Engine(checkpoint, pool)
        records = record_all(engine, requests_of(20))
        until(lambda: pool.stats().deaths == 2)
        until(lambda: pool.stats().planners == {"ready": 2})
        again = Engine(checkpoint, pool)
        record_all(again, requests_of(20))
    finally:
        pool.close()
    rules = system_1(checkpoint, SamplingConfig(max_tokens=20), OFTEN.max_lag)
    assert [message for record in records for message in check_generation(record, rules)] == []
    assert engine.metrics.outcomes[Reason.LOST] > 0 and check_settled(engine.metrics.summary()) == []
    assert again.metrics.outcomes[Reason.LOST] == 0 < again.metrics.outcomes[Reason.ON_TIME]


# ------------------------------------------------------------------------------------------------ the object store


def large_requests(checkpoint: Checkpoint) -> list[PlanRequest]:
    """Too large to travel along with a call: Ray puts them into the store."""
    (request,) = make_requests(checkpoint, 1)
    return [dataclasses.replace(request, hidden_LD=np.zeros((2, 10**6), np.float32))]


@needs_ray
def test_with_the_object_store_full_requests_are_lost_counted_and_later_ones_planned(
    small_store: None, checkpoint: Checkpoint
) -> None:
    pool = PlannerPool(checkpoint, PlannersConfig(count=1, max_batch=1), shed=False, num_cpus=0.5)
    ballast: list[Any] = []
    try:
        assert pool.wait_until_ready() == 1
        with pytest.raises((ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)):
            for _ in range(2 * STORE_BYTES // 2**22):
                ballast.append(ray.put(np.ones(2**22, np.uint8)))
        pool.submit(large_requests(checkpoint))
        assert len(pool.wait([0]).lost) == 1
        stats = pool.stats()
        assert (stats.undelivered, stats.deaths) == (1, 0) and "full" in stats.last_error
        engine = Engine(checkpoint, pool)  # what is small enough goes along with the call, also now
        record_all(engine, requests_of(12))
        assert engine.metrics.outcomes[Reason.LOST] == 0 < engine.metrics.injections
        ballast.clear()
        (request,) = make_requests(checkpoint, 1)
        pool.submit([request])
        assert len(pool.wait([request.request_id]).plans) == 1
    finally:
        pool.close()


# ------------------------------------------------------------------------------------------------ generator and pool


@needs_ray
def test_a_generator_that_is_killed_breaks_every_stream_and_another_one_says_the_same_again(
    small_store: None, checkpoint: Checkpoint
) -> None:
    config = DeliberationConfig(channel="off", lag=1)
    expected = run(Engine(checkpoint), requests_of(40))
    first = start_generator(checkpoint, PlannersConfig(count=1), EngineConfig(clock="wall", pace=50), planner_cpus=0.5)
    heard = {request.generation_id: Record(request.generation_id, request.prompt) for request in requests_of(40)}
    clients = [listening(first, record, config) for record in heard.values()]
    until(lambda: all(len(record.tokens) > 2 for record in heard.values()))
    metrics = ray.get(first.metrics.remote())
    pids = [ray.get(first.ping.remote()), *metrics["pool"]["pids"]]
    os.kill(pids[0], signal.SIGKILL)
    for client in clients:
        client.join(60)
    assert [record.error for record in heard.values()] == ["ActorDiedError"] * 4
    until(lambda: not any(map(is_running, pids)), 15)
    second = start_generator(checkpoint, PlannersConfig(count=0), WALL)
    try:
        for request in requests_of(40):
            record = Record(request.generation_id, request.prompt)
            said = [token.token for token in stream(second, record, request.sampling, config)]
            before = heard[request.generation_id].said
            assert said == [token for token, _ in expected[request.generation_id]]
            assert before[:40] == said[: len(before)]
    finally:
        stop_generator(second)


@needs_ray
def test_a_pool_process_that_is_killed_costs_its_plans_and_is_replaced(
    small_store: None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The process that dispatches to the planners, known by its title; they end with it."""
    sizes = checkpoint.config.model.backbone
    generator = start_generator(
        checkpoint,
        PlannersConfig(count=1),
        EngineConfig(clock="wall", pace=50),
        PlannerSettings(world_model="exact"),  # it assumes what is then said: plans hit
        planner_cpus=0.5,
        planner_class=faulty_planner(Orders(0, Phase(1.0, True, (), ()), str(tmp_path), sizes.vocab_size)),
    )
    record = Record("g", PROMPT)

    def injections() -> int:
        return sum(token.injection is not None for token in list(record.tokens))

    client = listening(generator, record, OFTEN)
    try:
        until(lambda: injections() > 5)
        before = actors_of(os.getpid())
        pools = [process for process in before if process.role == "pool"]
        if not pools:
            pytest.skip("planners are dispatched in the generator's own process")
        assert signal_all(pools, signal.SIGKILL) == 1
        until(lambda: not any(process.role != "generator" and alive(process) for process in before), 30)
        said, applied = len(record.tokens), injections()
        until(lambda: len(record.tokens) > said + 20)
        until(lambda: injections() > applied + 5)
        record.asked_to_cancel = True
        ray.get(generator.cancel.remote("g"))
        client.join(60)
        assert check_settled(ray.get(generator.metrics.remote())) == []
    finally:
        stop_generator(generator)
    rules = system_1(checkpoint, SamplingConfig(max_tokens=len(record.tokens)), OFTEN.max_lag)
    assert check_generation(record, rules) == []


# ------------------------------------------------------------------------------------------------ the head

WITHOUT_HEAD = """
    import os, signal, sys, threading, time
    import ray
    from actors.cluster import start_ray
    from actors.generator import start_generator
    from crsm.config import EngineConfig, PlannersConfig, SamplingConfig
    from jobs.faults.invariants import Record
    from jobs.faults.load import stream
    from jobs.faults.processes import actors_of, children_of
    from tests.fixtures import PROMPT, tiny_checkpoint

    with start_ray("local", num_cpus=4):
        pace = EngineConfig(clock="wall", pace=50)
        generator = start_generator(tiny_checkpoint(), PlannersConfig(count=1), pace, planner_cpus=0.5)
        deliberation = tiny_checkpoint().config.deliberation
        tokens = stream(generator, Record("g", PROMPT), SamplingConfig(max_tokens=10**6), deliberation)
        next(tokens)
        while not ray.get(generator.metrics.remote())["pool"]["pids"]:
            time.sleep(0.05)
        (head,) = children_of(os.getpid(), "gcs_server")
        print("pids", *(process.pid for process in actors_of(os.getpid())), flush=True)
        os.kill(head, signal.SIGKILL)
        # Many have been said and not been heard yet: what counts is what is said from now on.
        said = ray.get(generator.metrics.remote())["tokens"]
        while ray.get(generator.metrics.remote())["tokens"] < said + 25:
            next(tokens)
        print("said 25 more", flush=True)
        for _ in tokens:
            pass
"""


@needs_ray
def test_without_a_head_tokens_go_on_for_a_grace_and_then_everything_ends(tmp_path: Path) -> None:
    """The head of a local cluster dies and stays dead; Ray's grace of 60 s is cut to 2."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "2",
    }
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_HEAD)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode != 0
    assert "said 25 more" in ended.stdout, ended.stderr
    pids = [int(pid) for pid in ended.stdout.split("\n")[0].split()[1:]]
    assert len(pids) >= 2
    until(lambda: not any(map(is_running, pids)), 30)


# ------------------------------------------------------------------------------------------------ the event log


def test_a_full_disk_ends_the_generation_whose_log_it_is_with_an_error(checkpoint: Checkpoint) -> None:
    """``/dev/full`` refuses every byte."""
    file = open("/dev/full", "w", encoding="utf-8")
    engine = Engine(checkpoint, event_log=EventLog(file))
    with pytest.raises(OSError, match="No space left"):
        engine.generate_all([GenerationRequest(PROMPT, SamplingConfig(max_tokens=3))])
    with contextlib.suppress(OSError):  # it has not forgotten what it could not write
        file.close()
