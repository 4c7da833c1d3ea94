"""What a served application is told: the ``args`` of a Serve config file, and the options of ``crsm serve``.

Imports neither torch nor Ray, so that a command can parse and complain in a moment.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from actors.serving.settings import Seconds, ServeSettings
from crsm.config import Positive, Settings

SERVE_ENVIRONMENT = {
    # The replica's app and its Ray calls share a loop, and so does the proxy's router: no message changes threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Proxy and replica talk by gRPC: half of what a Ray object for every chunk costs both.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Errors in OpenAI's form, and a stated end for streams whose replica dies.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "actors.service_edge.middlewares",
}
"""Set in every process of a cluster that serves; streams are cheap with it, and right without it but for the last."""

MOST_OPEN = "CRSM_PROXY_REQUESTS"
"""The environment variable that tells a proxy how many requests that generate it passes on at a time."""
PROXY_MARGIN = 64
"""Requests that a proxy passes on beyond what all replicas let in: some have not sent their bodies yet."""
DRAIN_MARGIN = 10.0
"""Seconds that a replica has for its own end, after its last stream."""


class AutoscalingArgs(Settings):
    """Replicas by load; Serve's own policy."""

    min_replicas: Positive = 1
    max_replicas: Positive = 4
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 32.0
    """Requests that one replica is to have at a time."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> AutoscalingArgs:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas = {self.max_replicas}; allowed: at least min_replicas = {self.min_replicas}"
            )
        return self


class ServiceArgs(Settings):
    """One application: a model, its replicas, and what its front allows."""

    checkpoint: str = "nano"
    """A checkpoint's folder, which every node can read, or the name of a shipped one."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """What clients call the model; None: the name in the checkpoint's settings."""
    config: str | None = None
    """A YAML file of settings on top of the checkpoint's own."""
    set: tuple[str, ...] = ()
    """Single settings, ``section.key=value``, on top of that."""
    planners: Annotated[int, Field(ge=0)] | None = None
    """Planners of each replica; None: the settings'; 0: System 1 alone."""
    max_planners: Positive | None = None
    """Planners that a client may set at most; None: twice as many as there are, at least 4."""
    scale_planners: bool = False
    """As many planners, up to ``max_planners``, as answer in time; else so many as said, until a client sets another
    number."""
    threads: Positive = 1
    """Threads of each generator."""
    generator_cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that Ray reserves for each generator; of a planner: ``planners.num_cpus`` of the settings."""
    generator_gpus: Annotated[float, Field(ge=0)] = 0.0
    replica_cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that Ray reserves for each replica, which speaks HTTP and passes tokens on."""
    replicas: Positive = 1
    autoscaling: AutoscalingArgs | None = None
    """Replicas by load instead."""
    sessions: bool | None = None
    """Requests with the same ``x-session-id`` go to the same replica; None: with several replicas."""
    drain_seconds: Seconds | None = None
    """Within which a replica that is replaced ends its streams; None: as long as a request may take."""
    start_seconds: Seconds = 300.0
    """Within which a generator and its planners are to be ready."""
    restart_seconds: Seconds = 60.0
    """Within which a generator that died is to be back; else its replica is replaced."""
    metrics_interval: Seconds = 5.0
    """Seconds between two looks at the generator's counters."""
    server: ServeSettings = ServeSettings()

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> ServiceArgs:
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError(f"replicas = {self.replicas} with autoscaling; allowed: one of them")
        return self

    @property
    def pins_sessions(self) -> bool:
        return (self.replicas > 1 or self.autoscaling is not None) if self.sessions is None else self.sessions

    @property
    def proxy_requests(self) -> int:
        """Requests that generate, of all replicas together, beyond which a proxy need not ask them."""
        replicas = self.autoscaling.max_replicas if self.autoscaling else self.replicas
        return replicas * self.server.max_concurrent + PROXY_MARGIN

    @property
    def graceful_seconds(self) -> float:
        """What Serve gives a replica to end."""
        return (self.server.max_deadline if self.drain_seconds is None else self.drain_seconds) + DRAIN_MARGIN

    @property
    def places(self) -> int:
        """Requests at a time that Serve hands to a replica: far more than it lets in, since it is the replica that
        says 429, in OpenAI's form; and a request whose body never comes takes up a place as well."""
        return 4096 + 4 * self.server.max_concurrent


def parse_args(tree: dict[str, Any], source: str = "args") -> ServiceArgs:
    """The arguments from plain data.

    Raises:
        ValueError: in one line per fault, each naming key, value and what is allowed.
    """
    try:
        return ServiceArgs.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(fault, source) for fault in error.errors())) from None


def _describe(fault: Any, source: str) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{source}: unknown key {path!r}; allowed: {', '.join(_siblings(fault['loc']))}"
    message = fault["msg"].removeprefix("Value error, ")
    # A key must not reach a log by way of a complaint about it.
    hidden = isinstance(fault["input"], dict) or "api_keys" in fault["loc"]
    shown = "" if hidden else f" = {fault['input']!r}"
    return f"{source}: {path or 'arguments'}{shown}: {message}"


def _siblings(location: tuple[Any, ...]) -> list[str]:
    groups: dict[str, type[Settings]] = {"server": ServeSettings, "autoscaling": AutoscalingArgs}
    return sorted(groups.get(str(location[0]) if len(location) > 1 else "", ServiceArgs).model_fields)


def check_exposure(host: str, settings: ServeSettings) -> None:
    """Nobody listens to the world without keys.

    Raises:
        ValueError: the address is not this machine's own alone, and there is no key.
    """
    if not is_loopback(host) and not settings.keys():
        raise ValueError(
            f"host = {host!r} is open to others, and there is no API key; allowed: 127.0.0.1, or keys "
            "(--api-key-file, server.api_key_file, or the environment variable CRSM_API_KEYS)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
