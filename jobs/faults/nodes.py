"""Nodes of a cluster on this machine that are lost in the middle of a training run, and come back.

A node is lost when work of a kind runs on it: training workers, or the actors that roll out. It is killed as a machine
is whose power fails, or drained first, with a deadline, as a spot instance is; a new one takes its place later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

WORKER, ROLL_OUT = "RayTrainWorker", "LocalRolloutActor"
"""Names of the actors' classes."""
STORE_BYTES = 80 * 2**20
DETECTED = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""How soon a node that says nothing counts as dead: 2 s instead of half a minute."""
_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Loss:
    """What is to happen to one node."""

    on: str
    """Class of an actor: the node is one on which such an actor lives."""
    when: Callable[[], bool] = lambda: True
    """Asked as soon as there is such an actor."""
    notice: float = 0.0
    """Seconds between the announcement and the loss; 0: none is made."""
    absence: float = 60.0
    """A new node takes the place as soon as the work goes on without it, at the latest after so many seconds."""


@dataclass(frozen=True, slots=True)
class Happened:
    """A loss, in seconds since the start."""

    on: str
    lost_at: float
    actors: int
    """How many of the class died with the node."""
    back_at: float | None = None


class LocalNodes:
    """Nodes beside a head without CPUs, on which the driver and Ray Train's controller are."""

    def __init__(self, count: int, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        from actors.cluster import _inherited_path

        self._cpus = cpus
        with _inherited_path():
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "_system_config": DETECTED, **self._small()},
            )
            for _ in range(count):
                self._cluster.add_node(num_cpus=cpus, wait=False, **self._small())
        self.address: str = self._cluster.address

    @staticmethod
    def _small() -> dict[str, Any]:
        return {"object_store_memory": STORE_BYTES, "include_dashboard": False}

    def wait(self) -> None:
        self._cluster.wait_for_nodes(60)

    def add(self) -> None:
        from actors.cluster import _inherited_path

        # Not in the main thread: no handlers of signals. ``close`` ends it, or the end of the head.
        self._cluster._shutdown_at_exit = False
        with _inherited_path():
            self._cluster.add_node(num_cpus=self._cpus, **self._small())

    def lose(self, node_id: str) -> None:
        (node,) = (node for node in self._cluster.worker_nodes if node.node_id == node_id)
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node_id: str, seconds: float) -> None:
        """What ``ray drain-node`` does, and an autoscaler that hears of a preemption."""
        import ray
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = ray._raylet.GcsClient(address=self.address).drain_node(
            node_id, reason, "spot", int((time.time() + seconds) * 1000)
        )
        if not accepted:
            raise RuntimeError(f"the node is not drained: {why}")

    def close(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def local_nodes(count: int, cpus: int) -> Iterator[LocalNodes]:
    """Nodes for the time of a ``with`` block, and this process connected to their head."""
    import ray
    from ray._private import worker

    # Of every lost node Ray prints the last lines of its log on the driver's standard output, whatever it is told.
    loud, worker.print_to_stdstream = worker.print_to_stdstream, lambda *_, **__: None
    nodes = LocalNodes(count, cpus)
    try:
        ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
        nodes.wait()
        yield nodes
    finally:
        ray.shutdown()
        nodes.close()
        worker.print_to_stdstream = loud


def homes(class_name: str) -> dict[str, int]:
    """Nodes on which live actors of a class are, with their number."""
    from ray._private.state import actors

    found: dict[str, int] = {}
    for actor in actors().values():
        if actor["State"] == "ALIVE" and actor["ActorClassName"].rpartition(".")[2] == class_name:
            node = actor["Address"]["NodeID"]
            found[node] = found.get(node, 0) + 1
    return found


@contextlib.contextmanager
def losing(nodes: LocalNodes, losses: list[Loss]) -> Iterator[list[Happened]]:
    """Loses nodes one after the other while the block runs; gives what has happened so far."""
    happened: list[Happened] = []
    ended = threading.Event()
    failure: list[BaseException] = []
    started = time.monotonic()

    def lose(loss: Loss) -> None:
        while not (there := homes(loss.on)) or not loss.when():
            if ended.wait(_PAUSE):
                return
        node = sorted(there)[0]
        if loss.notice:
            nodes.drain(node, loss.notice)
            ended.wait(loss.notice)
        dying = homes(loss.on).get(node, 0)
        nodes.lose(node)
        lost_at = time.monotonic()
        happened.append(Happened(loss.on, lost_at - started, dying))
        while time.monotonic() < lost_at + loss.absence and not homes(loss.on).keys() - {node}:
            if ended.wait(_PAUSE):
                return
        nodes.add()
        happened[-1] = dataclasses.replace(happened[-1], back_at=time.monotonic() - started)

    def run() -> None:
        try:
            for loss in losses:
                lose(loss)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="losses", daemon=True)
    thread.start()
    try:
        yield happened
    finally:
        ended.set()
        thread.join(60)
    if failure:
        raise failure[0]
