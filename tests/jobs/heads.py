"""A Ray head as ``ray start --head`` makes it, with a token of its own, for tests; nothing else on the machine is
touched."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RAY = (sys.executable, "-m", "ray.scripts.scripts")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    environment: dict[str, str]
    """With it a process is let in."""

    def ray(self, *args: object, timeout: float = 60, **changes: str) -> subprocess.CompletedProcess[str]:
        """``ray ...`` in the root of the project; standard error joins standard output."""
        return subprocess.run(
            [*RAY, *map(str, args)],
            cwd=ROOT,
            env=self.environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, *entrypoint: object, options: tuple[str, ...] = (), timeout: float = 400):
        """``ray job submit`` as the documentation has it."""
        return self.ray(
            *("job", "submit", "--address", self.dashboard, "--working-dir", ".", *options),
            *("--runtime-env", "configs/runtime_env.yaml", "--", *entrypoint),
            timeout=timeout,
        )


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def start_head(cpus: int = 4) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="crsm-", dir="/tmp"))  # sockets below it must have short names
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "ray-client-server-port", "runtime-env-agent-port")
    ports = dict(zip(names, _ports(len(names)), strict=True))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment.pop("PYTHONPATH", None)  # the working directory must do
    environment |= {
        # An activated environment: the `python` of a job is the one that the head finds.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [*RAY, "start", "--head", "--block", "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}"]
    command += ["--object-store-memory=100000000", *(f"--{name}={port}" for name, port in ports.items())]
    log = folder / "head.log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        head = Head(f"127.0.0.1:{ports['port']}", dashboard, environment)
        end = time.monotonic() + 120
        while head.ray("job", "list", "--address", dashboard).returncode:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for pid in _started_for(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _started_for(folder: Path) -> list[int]:
    """What is left of a cluster: processes whose environment names its folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"RAY_TMPDIR={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found
