"""The Ray Serve application: replicas that speak HTTP, each with a generator and planners of its own.

Invariants:

* the front (:mod:`actors.serving`) knows nothing of Ray: this file hands it a backend and takes note of what it counts;
* a replica is there for nobody before its generator and its planners are; nobody listens to the world without keys;
* a generator that dies is started again by Ray, one that cannot be costs its replica, which Serve replaces;
* states lie in the application's vault: any replica goes on from any of them;
* a replica that is replaced ends its streams first (Serve waits for them), then its generator; what Serve has to cut
  off ends with an error event all the same (:mod:`actors.service_edge`).

``serve run actors.service:build checkpoint=nano``, or ``import_path: actors.service:build`` in a config file, with
``args`` as in :class:`~actors.service_args.ServiceArgs`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from actors.generator import start_generator, stop_generator
from actors.long_lived import freeze_memory
from actors.metrics import Counts, GeneratorCounts
from actors.ray_backend import RayBackend
from actors.service_args import ServiceArgs, check_exposure, parse_args
from actors.service_metrics import ServiceTelemetry
from actors.serving.app import build_app
from actors.serving.served_model import chat_template_of, served_model
from actors.state_vault import VISIT_INTERVAL, open_vault
from crsm.config import PlannersConfig
from crsm.model import Checkpoint, load_checkpoint, use_settings
from crsm.overrides import merge_settings

logger = logging.getLogger(__name__)

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
PING_SECONDS = 10.0
"""Within which a generator that is well answers."""


@serve.deployment(
    name="crsm",
    health_check_period_s=5.0,
    health_check_timeout_s=30.0,
    graceful_shutdown_wait_loop_s=0.5,
    max_constructor_retry_count=3,
    # A replacement is ready before the replica that it replaces begins to end.
    max_surge_percent=100,
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)
@serve.ingress()
class Service:
    """One replica."""

    async def __init__(self, args: ServiceArgs) -> None:  # type: ignore[misc]
        self._args = args
        await asyncio.to_thread(check_exposure, _listening_host(), args.server)
        checkpoint = open_checkpoint(args)
        planners = planners_config(args, checkpoint)
        self._planners = planners.count
        engine = checkpoint.config.engine
        self._generator = start_generator(
            checkpoint,
            planners,
            engine,
            threads=args.threads,
            num_cpus=args.generator_cpus,
            num_gpus=args.generator_gpus,
            planner_cpus=planners.num_cpus,
            max_restarts=-1,
            application=None,  # the replica counts for it
        )
        self._vault = open_vault(serve.get_replica_context().app_name, engine.max_state_bytes)
        self._max_state_bytes = engine.max_state_bytes
        name = args.name or checkpoint.config.name
        model = served_model(checkpoint, name, chat_template_of(args.checkpoint))
        self._backend = RayBackend(self._generator, self._vault, model)
        context = serve.get_replica_context()
        self._counts = Counts(context.app_name, context.deployment, context.replica_tag)
        self._telemetry = ServiceTelemetry(self._counts)
        self._app: FastAPI | None = None
        self._pid = 0
        """Of the generator that was last seen."""
        self._well_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        await self._begin()

    async def _begin(self) -> None:
        """Waits until the generator and its planners are ready."""
        try:
            async with asyncio.timeout(self._args.start_seconds):
                await self._vault.visit.remote(self._max_state_bytes)
                await self._meet()
                await self._generator.wait_until_ready.remote(self._args.start_seconds)
                self._backend.start()
                while not await self._backend.is_ready():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise TimeoutError(
                f"the generator was not ready within start_seconds = {self._args.start_seconds:g}; has the cluster "
                "the CPUs that it, its planners and a replica need?"
            ) from None
        freeze_memory()
        self._tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._visit())]

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._app = build_app(self._backend, self._args.server, self._telemetry)
        return self._app

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises several times."""
        if self._backend.failed:
            raise RuntimeError(self._backend.failed)
        try:
            async with asyncio.timeout(PING_SECONDS):
                await self._meet()
            if await self._backend.is_ready():
                self._well_at = time.monotonic()
        except (TimeoutError, ray.exceptions.RayError):
            pass  # being restarted, or stuck
        away = time.monotonic() - self._well_at
        if away > self._args.restart_seconds:
            raise RuntimeError(f"the generator has not answered for {away:.0f} s")

    async def metrics(self) -> dict[str, Any]:
        """The counters of this replica's generator, and the processes: ``get_app_handle(…).metrics.remote()``."""
        return {**await self._backend.metrics(), "pid": self._pid, "replica_pid": os.getpid()}

    async def __del__(self) -> None:
        if (app := getattr(self, "_app", None)) is not None:
            app.state.draining = True
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if (backend := getattr(self, "_backend", None)) is not None:
            await backend.close()
        if (generator := getattr(self, "_generator", None)) is not None:
            await asyncio.to_thread(stop_generator, generator, 5.0)

    async def _meet(self) -> None:
        """Sets the number of planners of a generator that is new."""
        pid = await self._generator.ping.remote()
        if pid != self._pid:
            if self._planners and not self._args.scale_planners:
                await self._generator.resize_planners.remote(self._planners)
            self._pid = pid

    async def _look(self) -> None:
        """Hands on counters."""
        generator = GeneratorCounts(self._counts)
        while True:
            await asyncio.sleep(self._args.metrics_interval)
            self._telemetry.flush()
            with contextlib.suppress(Exception):  # it is being restarted; its health is looked at elsewhere
                generator.look(await self._backend.metrics())
                generator.states(await self._vault.size.remote())

    async def _visit(self) -> None:
        """Tells the vault that the application is still there."""
        while True:
            with contextlib.suppress(ray.exceptions.RayError):  # it is being restarted
                await self._vault.visit.remote(self._max_state_bytes)
            await asyncio.sleep(VISIT_INTERVAL)


def open_checkpoint(args: ServiceArgs) -> Checkpoint:
    """The checkpoint with the application's settings on top of its own, and the wall clock: a server waits for no plan.

    Raises:
        ValueError: there is none, or a setting is not allowed.
    """
    checkpoint = load_checkpoint(args.checkpoint)
    planners = [] if args.planners is None else [f"planners.count={args.planners}"]
    overrides = [*args.set, *planners, "engine.clock=wall"]
    use_settings(checkpoint, merge_settings(checkpoint.config, args.config, overrides))
    return checkpoint


def planners_config(args: ServiceArgs, checkpoint: Checkpoint) -> PlannersConfig:
    """The planners of one replica.

    Raises:
        ValueError: there are to be more than at most.
    """
    planners = checkpoint.config.planners
    most = max(args.max_planners or planners.max_count or max(4, 2 * planners.count), 1)
    if planners.count > most:
        raise ValueError(f"max_planners = {most}; allowed: at least planners = {planners.count}")
    return planners.model_copy(update={"max_count": most})


def build(args: dict[str, Any]) -> serve.Application:
    """The application, for ``serve run``, ``serve deploy`` and :func:`ray.serve.run`.

    Raises:
        ValueError: an argument is unknown or not allowed.
    """
    return application(parse_args(args))


def application(args: ServiceArgs) -> serve.Application:
    options: dict[str, Any] = {
        "max_ongoing_requests": args.places,
        # What waits for a replica is bounded as well.
        "max_queued_requests": args.places,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1.0),
        "graceful_shutdown_timeout_s": args.graceful_seconds,
        "ray_actor_options": {"num_cpus": args.replica_cpus},
    }
    if args.autoscaling is None:
        options["num_replicas"] = args.replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(**args.autoscaling.model_dump())
    if args.pins_sessions:
        options["request_router_config"] = RequestRouterConfig(request_router_class=ROUTER)
    deployment: Any = Service
    return deployment.options(**options).bind(args)


def _listening_host() -> str:
    """The address of Serve's proxies."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return str(ray.get(controller.get_http_config.remote()).host)
