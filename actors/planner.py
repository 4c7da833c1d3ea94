"""The actor that deliberates.

Invariants:

* it keeps weights and nothing else: an answer depends on the requests alone, so a planner can be replaced any time;
* one search at a time, in the order of the calls; new weights take their turn among them, so that every plan is made
  with one version and names it;
* the methods of the concurrency group ``control`` are answered while a search runs: ``ping``, ``cancel``, ``stop``;
* ``cancel`` ends the running search early, which then answers with what it has; ``stop`` ends every later one too;
* ``watch`` never returns while the planner works: the failure of that call is the news of its death;
* arrays of requests are read-only and are copied into tensors before anything is computed.

A threaded actor, not an async one: a search is a long computation, and an event loop could not answer meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Literal

import ray
import torch

from actors.weights import Weights, open_source
from crsm.config import DeviceName, SearchConfig
from crsm.latent_dynamics import ExactDynamics, WorldModel
from crsm.model import Checkpoint
from crsm.placement import settled
from crsm.reasoning import Deliberator
from crsm.threads import use_threads
from crsm.types import Plan, PlanRequest

CONCURRENCY_GROUPS = {"control": 2, "watch": 1}
"""Threads beside the one that searches."""


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """How planners deliberate, where it is to differ from what the checkpoint says."""

    search: SearchConfig | None = None
    plan_length: int | None = None
    forced_confidence: float | None = None
    """Gate of every layer whatever the calibration says (ablations, roll-outs)."""
    world_model: Literal["latent", "exact"] | None = None
    keep_tree: bool = False
    device: DeviceName | None = None
    """Where the network computes; None: as the checkpoint says. The pool says what Ray reserves."""

    def planning_model(self, checkpoint: Checkpoint) -> WorldModel:
        """The world model that is searched, and for which the engine takes its snapshots."""
        if self.world_model is None:
            return checkpoint.model.planning_model()
        model = checkpoint.model
        return model.world_model if self.world_model == "latent" else ExactDynamics(model.backbone)

    def deliberator(self, checkpoint: Checkpoint, planner_id: str = "") -> Deliberator:
        """The deliberator of a checkpoint under these settings.

        Raises:
            ValueError: a device that cannot be had.
        """
        device = self.device or checkpoint.config.planners.device
        checkpoint = settled(checkpoint, device, "planners.device")
        return Deliberator.from_checkpoint(
            checkpoint,
            search=self.search,
            plan_length=self.plan_length,
            forced_confidence=self.forced_confidence,
            world_model=self.planning_model(checkpoint),
            keep_tree=self.keep_tree,
            planner_id=planner_id,
            device=device,
        )


AS_TRAINED = PlannerSettings()
"""Everything as the checkpoint says."""


@dataclass(frozen=True, slots=True)
class PlannerInfo:
    """What a planner says of itself."""

    planner_id: str
    pid: int
    node_id: str
    """Ray's name of the node; empty outside an actor."""
    model_version: int
    threads: int
    searching: bool


class PlannerActor:
    """Deliberates on batches of requests. A plain class: :class:`~actors.pool.PlannerPool` makes actors of it."""

    def __init__(
        self,
        source: str | Weights,
        settings: PlannerSettings = AS_TRAINED,
        planner_id: str = "planner",
        threads: int = 1,
    ) -> None:
        """
        Args:
            source: a checkpoint's folder, or its weights (Ray hands over the value of a reference).
            settings: how to deliberate.
            planner_id: copied into the plans.
            threads: of torch, in this process.
        """
        use_threads(threads)
        self._settings, self._id = settings, planner_id
        self._deliberator = settings.deliberator(open_source(source), planner_id)
        # The first search packs weights and wakes libraries: none of it may count as what a search takes.
        self._deliberator.warm_up()
        self._cancelled, self._stopped = threading.Event(), threading.Event()
        self._searching = False
        self._behind = float("inf")

    def plan(self, requests: list[PlanRequest], sent_at: float) -> list[Plan]:
        """One search over a batch.

        Args:
            requests: the batch; deadlines are on the sender's clock.
            sent_at: that clock when the batch was sent.

        Raises:
            ValueError: a request does not fit the model; the message names it.
        """
        self._compare_clocks(sent_at)
        self._cancelled.clear()
        self._searching = True
        try:
            return self._deliberator(requests, clock=self._sender_clock, should_stop=self._should_stop)
        finally:
            self._searching = False

    def update_weights(self, source: str | Weights) -> int:
        """Plans with these weights from the next call on. Returns their version."""
        self._deliberator = self._settings.deliberator(open_source(source), self._id)
        return self._deliberator.model_version

    @ray.method(concurrency_group="control")
    def ping(self, sent_at: float) -> PlannerInfo:
        """Who answers; with ``sent_at``, the sender's clock, a better idea of how the clocks differ."""
        self._compare_clocks(sent_at)
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        version, threads = self._deliberator.model_version, torch.get_num_threads()
        return PlannerInfo(self._id, os.getpid(), node, version, threads, self._searching)

    @ray.method(concurrency_group="control")
    def cancel(self) -> None:
        """Ends the running search, which answers with what it has found."""
        self._cancelled.set()

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ends the running search and every later one at once, and the ``watch``."""
        self._stopped.set()

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Returns when the planner is stopped; fails when it dies."""
        self._stopped.wait()

    def _should_stop(self) -> bool:
        return self._cancelled.is_set() or self._stopped.is_set()

    def _compare_clocks(self, sent_at: float) -> None:
        # Monotonic clocks of two machines differ by a constant: the smallest difference ever seen between sending and
        # receiving is that constant and the quickest message's way. A ping waits for no search, so it is quick.
        self._behind = min(self._behind, time.monotonic() - sent_at)

    def _sender_clock(self) -> float:
        return time.monotonic() - self._behind
