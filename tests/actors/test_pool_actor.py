"""The pool in a process of its own: the bits of planners in threads, and pools and planners that are killed."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from actors.planner import PlannerSettings
from actors.pool_actor import RemotePool, mailbox_geometry, start_pool
from actors.records import write_plans, write_request
from actors.scheduling import RestartPolicy
from actors.weights import share
from crsm.config import EngineConfig, PlannersConfig, SearchConfig
from crsm.engine import Engine
from crsm.model import Checkpoint
from crsm.planners import Arrivals, Planners, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.types import Reason
from tests.actors.helpers import WALL, generations, is_running, make_requests, run, slow_planner_class, until
from tests.fixtures import make_plan, tiny_checkpoint, tiny_config

NEVER_RESTART = RestartPolicy(max_restarts=0)


@contextmanager
def pool_of(checkpoint: Checkpoint, count: int = 1, *, max_batch: int = 2, **options: Any) -> Iterator[RemotePool]:
    """A pool whose planners are ready; afterwards its processes must be gone, and no memory be left."""
    segments = mapped_segments()
    pool = start_pool(
        checkpoint,
        PlannersConfig(count=count, max_batch=max_batch),
        options.pop("settings", PlannerSettings()),
        **({"num_cpus": 0.5, "shed": False} | options),
    )
    pids: set[int] = set()
    try:
        assert pool.wait_until_ready() == count
        pids = processes(pool)
        yield pool
        pids |= processes(pool)
    finally:
        pool.close()
    until(lambda: not any(map(is_running, pids)), 15)
    assert pool.poll() == Arrivals()
    assert pool.pid is None and pool.stats().pids == () and mapped_segments() <= segments
    assert not [name for name in os.listdir("/dev/shm") if "crsm" in name]


def processes(pool: RemotePool) -> set[int]:
    return {*pool.stats().pids, *([pool.pid] if pool.pid else [])}


def mapped_segments() -> int:
    """Mailboxes in the memory of this process."""
    gc.collect()
    with open("/proc/self/maps") as file:
        return file.read().count("memfd:crsm-mailbox")


def slow(request: Any, request_id: int) -> Any:
    return dataclasses.replace(request, generation_id="slow", request_id=request_id)


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def back(pool: RemotePool, attached: int, ready: int) -> None:
    """Waits for another pool with its planners."""
    until(lambda: pool.poll() is not None and pool.mailbox_stats()["attached"] == attached)
    assert pool.wait_until_ready() == ready


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
class TestOnRay:
    @pytest.mark.parametrize(("world_model", "lag", "count"), [("latent", 0, 2), ("exact", 2, 1)])
    def test_virtual_clock_the_bits_are_those_of_threads(
        self, checkpoint: Checkpoint, world_model: Any, lag: int, count: int
    ) -> None:
        settings = PlannerSettings(world_model=world_model)

        def engine_with(planners: Planners | None) -> Engine:
            return Engine(checkpoint, planners, world_model=settings.planning_model(checkpoint))

        threads = ThreadPlanners(settings.deliberator(checkpoint), count=2, max_batch=3)
        expected = run(engine_with(threads), generations(lag=lag))
        threads.close()
        with pool_of(checkpoint, count, max_batch=3, settings=settings) as pool:
            engine = engine_with(pool)
            assert run(engine, generations(lag=lag)) == expected
            until(lambda: pool.stats().plans == engine.metrics.requests)
        assert engine.metrics.injections > 0 and not engine.metrics.outcomes[Reason.LOST]
        assert pool.mailbox_stats()["malformed"] == pool.mailbox_stats()["refused"] == 0

    def test_the_pool_killed_in_mid_search_costs_what_it_had_its_planners_die_and_another_comes(
        self, checkpoint: Checkpoint
    ) -> None:
        first, second, third = make_requests(checkpoint, 3)
        with pool_of(checkpoint, count=2, planner_class=slow_planner_class()) as pool:
            planners, before = pool.stats().pids, pool.pid
            pool.submit([slow(first, 10)])
            until(lambda: pool.stats().in_flight == 1)
            pool.submit([second])
            assert [plan.request_id for plan in pool.wait([second.request_id]).plans] == [second.request_id]
            kill(before)
            assert [lost.request_id for lost in pool.wait([10]).lost] == [10]
            pool.submit([second])  # there is no pool: nobody waits for one
            assert pool.wait([second.request_id]).lost == [second]
            until(lambda: not any(map(is_running, planners)))
            back(pool, attached=2, ready=2)
            assert pool.pid != before and not set(pool.stats().pids) & set(planners)
            pool.submit([third])
            assert [plan.request_id for plan in pool.wait([third.request_id]).plans] == [third.request_id]
            stats = pool.mailbox_stats()
            assert (stats["pool_deaths"], stats["lost_with_peer"], stats["unattached"]) == (1, 1, 1)

    @pytest.mark.parametrize("config", [EngineConfig(clock="virtual"), WALL])
    def test_killed_in_the_middle_of_a_generation_the_rest_is_said(
        self, checkpoint: Checkpoint, config: EngineConfig
    ) -> None:
        with pool_of(checkpoint, count=1, shed=config is WALL, pool_restart=NEVER_RESTART) as pool:
            engine = Engine(checkpoint, pool, config)
            said = 0
            for _ in engine.generate(generations(tokens=24, lag=0)):
                said += 1
                if said == 20:
                    kill(pool.pid)
            assert said == 4 * 24
            assert sum(engine.metrics.outcomes.values()) == engine.metrics.requests
            assert config is WALL or engine.metrics.outcomes[Reason.LOST] > 0
            until(lambda: pool.stats().planners != {"ready": 1})
            until(lambda: pool.poll() is not None and pool.mailbox_stats()["open"] == 0)
            assert run(Engine(checkpoint, pool, config), generations()) == run(Engine(checkpoint), generations())

    def test_planners_killed_one_and_all_are_the_pools_affair(self, checkpoint: Checkpoint) -> None:
        with pool_of(checkpoint, count=2, restart=NEVER_RESTART) as pool:
            requests = make_requests(checkpoint, 3)
            for left, request in zip((1, 0), requests, strict=False):
                kill(pool.stats().pids[0])
                until(lambda left=left: pool.stats().planners.get("ready", 0) == left)
                pool.submit([request])
                found = pool.wait([request.request_id])
                assert len(found.plans if left else found.lost) == 1
            assert run(Engine(checkpoint, pool), generations()) == run(Engine(checkpoint), generations())
            assert pool.mailbox_stats()["pool_deaths"] == 0 and pool.pid is not None

    def test_new_weights_reach_the_planners_also_of_a_pool_that_replaces_another(self, checkpoint: Checkpoint) -> None:
        newer = dataclasses.replace(tiny_checkpoint(seed=11), model_version=4)
        requests = make_requests(checkpoint, 2)
        with pool_of(checkpoint, count=1, shared=share(checkpoint)) as pool:
            assert pool.stats().versions == (3,)
            pool.update_weights(newer)
            pool.submit(requests)
            plans = pool.wait([request.request_id for request in requests]).plans
            assert {plan.model_version for plan in plans} == {4}
            kill(pool.pid)
            back(pool, attached=2, ready=1)
            until(lambda: pool.stats().versions == (4,))

    def test_a_pool_that_cannot_start_leaves_nobody_waiting(self, checkpoint: Checkpoint) -> None:
        """Its constructor fails: no actor can have a negative number of CPUs."""
        pool = start_pool(checkpoint, PlannersConfig(count=1), shed=False, num_cpus=-1, pool_restart=NEVER_RESTART)
        requests = make_requests(checkpoint, 2)
        pool.submit(requests)
        assert pool.wait([request.request_id for request in requests]).lost == requests
        assert pool.wait_until_ready(0.1) == 0 and pool.mailbox_stats()["pool_deaths"] == 1
        pool.close()

    def test_closing_in_mid_search_wakes_who_waits_and_afterwards_requests_are_lost_at_once(
        self, checkpoint: Checkpoint
    ) -> None:
        first, second = make_requests(checkpoint, 2)
        with pool_of(checkpoint, count=1, planner_class=slow_planner_class()) as pool:
            pool.submit([slow(first, 5)])
            found: list[Any] = []
            waiter = threading.Thread(target=lambda: found.append(pool.wait([5])))
            waiter.start()
            until(lambda: pool.stats().in_flight == 1)
        waiter.join(60)
        assert [lost.request_id for lost in found[0].lost] == [5]
        pool.submit([second])
        assert pool.wait([second.request_id]).lost == [second]
        pool.close()

    def test_the_decode_thread_makes_no_ray_call(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: set[str] = set()

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                calls.add(threading.current_thread().name)
                return function(*arguments, **named)

            return call

        with pool_of(checkpoint, count=1) as pool:
            for name in ("get", "put", "wait", "kill", "cancel"):
                monkeypatch.setattr(ray, name, watched(getattr(ray, name)))
            handle = ray.actor.ActorHandle
            monkeypatch.setattr(handle, "_actor_method_call", watched(handle._actor_method_call))
            thread = threading.Thread(target=lambda: run(Engine(checkpoint, pool), generations(lag=0)), name="decode")
            thread.start()
            thread.join(60)
            assert pool.mailbox_stats()["answered"] > 0
            assert calls == set()

    def test_a_generator_that_is_killed_takes_pool_and_planners_with_it(self, checkpoint: Checkpoint) -> None:
        class Holder:
            def __init__(self, shared: list[Any]) -> None:
                import dataclasses as dc

                from actors.pool_actor import start_pool
                from actors.weights import open_source
                from crsm.config import PlannersConfig

                source = ray.get(shared[0])
                self._pool = start_pool(
                    open_source(source), PlannersConfig(count=1), shared=shared[0], shed=False, num_cpus=0.5
                )
                assert dc.is_dataclass(source) and self._pool.wait_until_ready() == 1

            def pids(self) -> list[int]:
                return [os.getpid(), self._pool.pid, *self._pool.stats().pids]

        holder = ray.remote(num_cpus=0.5, max_restarts=0)(Holder).remote([share(checkpoint)])
        pids = ray.get(holder.pids.remote(), timeout=120)
        assert len(pids) == 3
        kill(pids[0])
        until(lambda: not any(map(is_running, pids)), 60)


@pytest.mark.parametrize("kind", ["latent", "exact"])
def test_a_mailbox_has_room_for_the_messages_of_its_model(kind: Any) -> None:
    checkpoint = tiny_checkpoint(tiny_config(kind=kind, rank=2))
    planners = PlannersConfig(count=3, max_batch=4)
    geometry = mailbox_geometry(checkpoint.config, planners)
    assert geometry.slots == 3 * 3 * 4
    (request,) = make_requests(checkpoint, 1)
    assert request.ssm_LHPN.shape[0] == 2 and (request.conv_LCK is None) == (kind == "latent")
    slot = memoryview(bytearray(geometry.slot_bytes))
    named = dataclasses.replace(request, generation_id="x" * 200)
    assert write_request(slot, named)
    actions = Deliberator.from_checkpoint(checkpoint)([request])[0]
    assert write_plans(slot, [make_plan(request, checkpoint, line=(1,) * 20), *[actions] * 7])


def test_a_large_model_gets_fewer_slots_but_always_a_batch_of_them() -> None:
    from crsm.config import BackboneConfig, Config, ModelConfig

    sizes = BackboneConfig(vocab_size=50288, d_model=2048, n_layer=48, d_state=128, headdim=64, expand=2)
    config = Config(model=ModelConfig(backbone=sizes))
    geometry = mailbox_geometry(config, PlannersConfig(count=4, max_batch=8), PlannerSettings(search=SearchConfig()))
    assert geometry.slot_bytes > 101_056_512 and geometry.slots == 21
    assert mailbox_geometry(config, PlannersConfig(count=4, max_batch=64)).slots == 64
