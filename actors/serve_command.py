"""``crsm serve``: the Serve application on a local Ray, until somebody stops it.

Invariants:

* whatever is wrong with the options, the checkpoint, the keys or the port is said before anything is started;
* the first SIGINT or SIGTERM lets streams end, for a bounded time, and the command then ends with status 0; the second
  ends everything at once;
* nothing that was started is left behind: the local Ray ends with the command.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.service_args import MOST_OPEN, SERVE_ENVIRONMENT, ServiceArgs, check_exposure, is_loopback, parse_args
from actors.serving.settings import ServeSettings
from crsm.config import Config, apply_override

APPLICATION = "crsm"
SERVER = "server."
"""Keys of ``--set`` that are the front's, not the checkpoint's."""


def args_of_options(
    checkpoint: str,
    *,
    name: str | None = None,
    planners: int | None = None,
    replicas: int = 1,
    api_key_file: Path | None = None,
    drain: float = 30.0,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> ServiceArgs:
    """The arguments of the application that the command's options describe.

    Raises:
        ValueError: one of them is not allowed.
    """
    server = {"server": ServeSettings().model_dump(mode="json")}
    for override in overrides:
        if override.startswith(SERVER):
            apply_override(server, override)
    if api_key_file is not None:
        server["server"]["api_key_file"] = str(api_key_file.resolve())
    return parse_args(
        {
            "checkpoint": str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint,
            "name": name,
            "config": None if config is None else str(config.resolve()),
            "set": [override for override in overrides if not override.startswith(SERVER)],
            "planners": planners,
            "replicas": replicas,
            "drain_seconds": drain,
            # On one machine the CPUs are shared rather than reserved.
            "replica_cpus": 0.0,
            **server,
        },
        source="crsm serve",
    )


def serve_until_stopped(
    args: ServiceArgs,
    host: str,
    port: int,
    *,
    tracing: bool = False,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Serves, and returns when it was stopped and all has ended.

    Args:
        args: what is served.
        host: address to listen on.
        port: of HTTP.
        tracing: a span of OpenTelemetry for every request, written into Serve's logs.
        report: takes lines for the user.

    Raises:
        ValueError: an option, a setting or the checkpoint is wrong.
        OSError: the application did not start; in one line.
    """
    args.server.keys()
    check_exposure(host, args.server)
    check_port(host, port)
    if tracing:
        _check_tracing()
    environment = {**SERVE_ENVIRONMENT, MOST_OPEN: str(args.proxy_requests)}
    os.environ.update({name: os.environ.get(name, value) for name, value in environment.items()})

    from actors.service import application, open_checkpoint, planners_config  # torch, Ray

    checkpoint = open_checkpoint(args)
    planners = planners_config(args, checkpoint)
    most = args.autoscaling.max_replicas if args.autoscaling else args.replicas
    each = args.replica_cpus + args.generator_cpus + planners.num_cpus * (planners.max_count or planners.count)

    import ray
    from ray import serve

    from actors.cluster import start_ray

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _stop_signals() as stop, start_ray("local", num_cpus=int(most * each) + 2):
        report(f"starting {args.replicas} × {args.name or checkpoint.config.name}, {planners.count} planners each")
        quiet = {"enable_access_log": False, "log_level": "WARNING"}
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=quiet,
            tracing_config={"enabled": True, "sampling_ratio": 1.0} if tracing else None,
        )
        target = serve.RunTarget(application(args), name=APPLICATION)
        serve.run_many([target], wait_for_applications_running=False)
        if _wait_until_running(stop):
            for line in _welcome(args, host, port, checkpoint.config, _metrics_port(ray)):
                report(line)
            stop.first.wait()
        report(f"stopping: streams have {args.drain_seconds:g} s to end; once more stops at once")
        _drain(args.graceful_seconds, stop)


def check_port(host: str, port: int) -> None:
    """Whether one can listen there.

    Raises:
        ValueError: it is taken, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"host = {host!r}: {error.strerror}; allowed: an address of this machine") from None
    with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(found[0][4])
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port = {port} is in use on {host}; allowed: a free one (--port)") from None
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from None


class _Stop:
    """Whether the command was told to stop, and whether at once."""

    def __init__(self) -> None:
        self.first, self.second = threading.Event(), threading.Event()

    def tell(self, *_: Any) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM as events, also while Ray, which has handlers of its own, starts."""
    stop = _Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    install = signal.signal
    try:
        for number in before:
            install(number, stop.tell)
        yield stop
    finally:
        for number, handler in before.items():
            install(number, handler)


def _wait_until_running(stop: _Stop) -> bool:
    """Whether the application runs; False: it was told to stop before.

    Raises:
        OSError: it failed to start.
    """
    from ray import serve

    while not stop.first.is_set():
        # Ray has set a handler of its own meanwhile.
        signal.signal(signal.SIGTERM, stop.tell)
        status = serve.status().applications.get(APPLICATION)
        if status is not None and status.status == "RUNNING":
            return True
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [deployment.message for deployment in status.deployments.values()]
            raise OSError(_reason(" ".join([status.message, *messages])))
        stop.first.wait(0.1)
    return False


def _reason(text: str) -> str:
    """The error's own line out of Serve's report, which holds a traceback."""
    lines = [line.strip() for line in text.splitlines() if "Error: " in line and not line.lstrip().startswith("File")]
    return f"the application did not start: {lines[-1] if lines else ' '.join(text.split())}"


def _drain(seconds: float, stop: _Stop) -> None:
    from ray import serve

    serve.delete(APPLICATION, _blocking=False)
    until = time.monotonic() + seconds + 5.0
    while time.monotonic() < until and not stop.second.wait(0.1):
        if APPLICATION not in serve.status().applications:
            return


def _check_tracing() -> None:
    try:
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        raise ValueError("--tracing needs opentelemetry-sdk, which is not installed") from None


def _example(config: Config) -> str:
    """A prompt that the model knows what to do with."""
    from crsm.tasks import build_task

    closed = config.tokenizer.kind == "closed"
    return build_task(config.tasks[0]).generate(config.seed, "test", 0).prompt if closed and config.tasks else "Hello"


def _metrics_port(ray: Any) -> int:
    return int(ray.nodes()[0].get("MetricsExportPort", 0))


def _welcome(args: ServiceArgs, host: str, port: int, config: Config, metrics_port: int) -> list[str]:
    model = args.name or config.name
    shown = host if is_loopback(host) else socket.gethostname()
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    body = json.dumps({"model": model, "prompt": _example(config), "stream": True})
    key = ' -H "Authorization: Bearer $CRSM_API_KEY"' if args.server.keys() else ""
    return [
        f"API      {url}/v1   (base_url of any OpenAI client; model {model!r})",
        f"page     {url}/",
        *([f"metrics  http://127.0.0.1:{metrics_port}/metrics"] if metrics_port else []),
        f"try      curl -N {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        "Ctrl-C stops",
    ]
