"""Three nodes on one machine: planners beside the generator's node, one of which goes away in mid-run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from actors.cluster import _inherited_path
from actors.generator import start_generator, stop_generator
from actors.planner import PlannerSettings
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.model import Checkpoint
from crsm.types import Reason
from jobs.faults.campaign import system_1
from jobs.faults.invariants import Record, check_generation, check_settled
from jobs.faults.load import stream
from jobs.faults.planner import Orders, faulty_planner
from jobs.faults.schedule import Phase
from tests.actors.helpers import PROMPTS, until

pytestmark = pytest.mark.ray

SETTINGS = DeliberationConfig(lag=1, injection_rate=0.9)
SAMPLING = SamplingConfig(max_tokens=10**6)
DETECTED = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""How soon a node that says nothing counts as dead: 2 s instead of half a minute."""


@pytest.fixture
def nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """A head with room for a generator only, and two nodes with room for one planner each."""
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    with _inherited_path():
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "_system_config": DETECTED, **small},
        )
        others = [cluster.add_node(num_cpus=1, wait=False, **small) for _ in range(2)]
        try:
            ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
            cluster.wait_for_nodes(60)
            yield cluster, others
        finally:
            ray.shutdown()
            cluster.shutdown()


def hits(metrics: dict[str, Any]) -> int:
    return sum(metrics["outcomes"].get(reason.value, 0) for reason in Reason if reason.is_hit)


def test_a_node_that_is_lost_costs_its_plans_only_and_a_new_one_takes_its_place(
    nodes: tuple[Cluster, list[Any]], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    cluster, others = nodes
    sizes = checkpoint.config.model.backbone
    # Planners that do nothing wrong, and put a note on every plan.
    planner_class = faulty_planner(Orders(0, Phase(1.0, True, (), ()), str(tmp_path), sizes.vocab_size))
    generator = start_generator(
        checkpoint,
        PlannersConfig(count=2, max_batch=1),
        EngineConfig(clock="wall", pace=20),
        PlannerSettings(world_model="exact"),  # it assumes what is then said: plans hit
        num_cpus=1,
        planner_class=planner_class,
    )
    records = [Record(f"g{index}", prompt) for index, prompt in enumerate(PROMPTS)]

    def listen(record: Record) -> None:
        for token in stream(generator, record, SAMPLING, SETTINGS):
            record.tokens.append(token)

    def metrics() -> dict[str, Any]:
        answer: dict[str, Any] = ray.get(generator.metrics.remote())
        return answer

    until(lambda: metrics()["pool"]["planners"].get("ready") == 2)
    where = {actor["Address"]["NodeID"] for actor in actors().values() if "Planner" in actor["ActorClassName"]}
    assert where == {node.node_id for node in others}, "a planner on each of the other nodes"
    clients = [threading.Thread(target=listen, args=(record,), daemon=True) for record in records]
    for client in clients:
        client.start()
    until(lambda: hits(metrics()) > 20)

    cluster.remove_node(others[0], allow_graceful=False)
    said = [len(record.tokens) for record in records]
    until(lambda: metrics()["pool"]["deaths"] == 1)
    until(lambda: all(len(record.tokens) > before + 20 for record, before in zip(records, said, strict=True)))
    before = hits(metrics())
    until(lambda: hits(metrics()) > before + 20)  # by the planner that is left
    assert metrics()["pool"]["planners"].get("ready") == 1

    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    until(lambda: metrics()["pool"]["planners"].get("ready") == 2)
    before = hits(metrics())
    until(lambda: hits(metrics()) > before + 20)
    for record in records:
        record.asked_to_cancel = True
        ray.get(generator.cancel.remote(record.generation_id))
    for client in clients:
        client.join(60)

    # Before any plan System 1 says the same whatever comes later: a few tokens are enough to compare with.
    longest = max(len(record.said) for record in records)
    rules = system_1(checkpoint, SamplingConfig(max_tokens=longest), SETTINGS.max_lag)
    for record in records:
        assert check_generation(record, rules) == []
    last = metrics()
    assert check_settled(last) == []
    assert last["outcomes"].get("lost", 0) == last["pool"]["lost_with_planner"] + last["pool"]["stranded"]
    stop_generator(generator)
