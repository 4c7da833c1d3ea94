"""What this machine and its cluster have, what is missing, and the command that mends it.

:func:`look` asks the machine (thin, one function a subject), :func:`diagnose` judges what was found (pure): a finding
is ``ok``, ``note`` (works, but slower or less), or ``missing`` (what was asked for cannot work, exit status 1).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crsm.config import Config
    from jobs.storage import StoragePath

GB = 1 << 30
PORTS = {6379: "head of a cluster", 8265: "Ray's dashboard, job submit", 8000: "crsm serve"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class State(str, Enum):
    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report."""

    subject: str
    name: str
    state: State
    found: str
    mend: str = ""
    """A command, where there is one; empty if nothing is to be done."""


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    asked: str
    """Versions that ``pyproject.toml`` allows; empty: any."""
    found: str | None
    fits: bool


@dataclass(frozen=True, slots=True)
class Node:
    address: str
    resources: dict[str, float]


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. Sizes are bytes."""

    python: tuple[int, int, int]
    packages: tuple[Package, ...]
    torch: str | None
    torch_cuda: str | None
    """The CUDA that torch was built for."""
    gpus: tuple[str, ...]
    driver: bool
    """Whether the machine has an NVIDIA driver."""
    gpu_kernels: str
    """Why the kernels for a GPU cannot be used; empty: they can."""
    native: str
    """Why there is no native core; empty: there is."""
    native_runs: str
    cpu: frozenset[str]
    """Flags of the processor."""
    compiler: str | None
    browser: str | None
    cores: int
    memory: int
    shared_memory: int
    disk: dict[str, int]
    """Free bytes below a path."""
    open_files: int
    ports: dict[int, bool]
    """Whether nobody listens."""
    auth_mode: str | None
    token: str | None
    """Where the token comes from."""
    token_is_open: bool
    """Whether others can read its file."""
    address: str | None
    cluster: tuple[Node, ...]
    cluster_problem: str | None
    storage_problem: str | None
    trackers_problem: str | None
    workers: int
    needs_gpu: bool


# ------------------------------------------------------------------------------------------------------------ judging


def diagnose(facts: Facts) -> list[Finding]:
    """Judges what was found; pure."""
    return [
        *_python(facts),
        *_compute(facts),
        *_machine(facts),
        *_cluster(facts),
        *_tools(facts),
    ]


def _finding(subject: str, name: str, good: bool, found: str, mend: str, otherwise: State = State.NOTE) -> Finding:
    return Finding(subject, name, State.OK if good else otherwise, found, "" if good else mend)


def _python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    yield _finding("python", "version", facts.python >= (3, 11), version, "install Python 3.11 or newer", State.MISSING)
    wrong = [package for package in facts.packages if not package.fits]
    for package in wrong:
        asked = f"asked: {package.name}{package.asked}"
        found = f"{package.found or 'not installed'} ({asked})"
        yield Finding("python", package.name, State.MISSING, found, f"pip install '{package.name}{package.asked}'")
    right = len(facts.packages) - len(wrong)
    yield Finding("python", "packages", State.OK, f"{right} of {len(facts.packages)} as pyproject.toml asks")


def _compute(facts: Facts) -> Iterator[Finding]:
    mend = "rm -f .venv/.installed && make setup" if facts.compiler else "apt-get install g++, then make setup"
    yield _finding(
        "compute", "native core", not facts.native, facts.native or f"built: {facts.native_runs}",
        mend + " (without it all runs in Python, more slowly)",
    )  # fmt: skip
    vector = "AVX-512" if "avx512f" in facts.cpu else "AVX2" if "avx2" in facts.cpu else None
    yield _finding("compute", "vectors", vector is not None, vector or "neither AVX-512 nor AVX2: portable code", "")
    if facts.gpus:
        yield Finding("compute", "GPU", State.OK, f"{', '.join(facts.gpus)}; torch for CUDA {facts.torch_cuda}")
        yield _finding(
            "compute", "GPU kernels", not facts.gpu_kernels, facts.gpu_kernels or "mamba-ssm, causal-conv1d",
            "scripts/gpu_checks.sh build",
        )  # fmt: skip
    else:
        seen = "a driver, and torch sees no GPU" if facts.driver else "none"
        if facts.driver and facts.torch_cuda is None:
            mend = "pip install --force-reinstall torch (this build is for CPUs)"
        else:
            mend = "nvidia-smi" if facts.driver else ""
        needed = State.MISSING if facts.needs_gpu else State.NOTE if facts.driver else State.OK
        yield Finding("compute", "GPU", needed, seen, mend or ("--set train.use_gpu=false" if facts.needs_gpu else ""))


def _machine(facts: Facts) -> Iterator[Finding]:
    yield _finding("machine", "cores", facts.cores >= 2, str(facts.cores), "System 2 shares the core of System 1")
    yield _finding(
        "machine", "memory", facts.memory >= 4 * GB, f"{facts.memory / GB:.1f} GB free", "end other programs"
    )
    # Ray puts its object store there, 30 % of the memory by default, or else on disk.
    good = facts.shared_memory >= GB
    mend = "mount -o remount,size=4g /dev/shm (docker: --shm-size=4g)"
    yield _finding("machine", "/dev/shm", good, f"{facts.shared_memory / GB:.1f} GB free", mend)
    for path, free in facts.disk.items():
        yield _finding("machine", f"disk at {path}", free >= 5 * GB, f"{free / GB:.0f} GB free", f"make room at {path}")
    yield _finding("machine", "open files", facts.open_files >= 8192, str(facts.open_files), "ulimit -n 65536")
    if facts.storage_problem:
        mend = "--set train.storage_path=PLACE, one that can be written"
        yield Finding("machine", "storage", State.MISSING, facts.storage_problem, mend)
    if facts.trackers_problem:
        found, _, mend = facts.trackers_problem.partition("; allowed: ")
        yield Finding("machine", "trackers", State.MISSING, found, mend)


def _cluster(facts: Facts) -> Iterator[Finding]:
    yield from _token(facts)
    if facts.address is None:
        for port, free in facts.ports.items():
            found = "free" if free else "somebody listens (a cluster of this machine, perhaps)"
            mend = {6379: "ray start --head --port=PORT", 8265: "ray start --head --dashboard-port=PORT"}.get(port)
            yield _finding("cluster", f"port {port}", free, f"{found}: {PORTS[port]}", mend or "crsm serve --port PORT")
        yield Finding("cluster", "address", State.OK, "RAY_ADDRESS is not set: jobs start Ray on this machine")
        return
    if facts.cluster_problem:
        mend = "unset RAY_ADDRESS, or start a head there: ray start --head"
        if "allowed: the same versions" in facts.cluster_problem:
            mend = "install here what the cluster runs, or there what this is"
        elif "token" in facts.cluster_problem:
            mend = "copy the cluster's token to ~/.ray/auth_token, export RAY_AUTH_MODE=token"
        yield Finding("cluster", "address", State.MISSING, facts.cluster_problem, mend)
        return
    total = {name: sum(node.resources.get(name, 0.0) for node in facts.cluster) for name in ("CPU", "GPU")}
    nodes = f"{len(facts.cluster)} node{'' if len(facts.cluster) == 1 else 's'}"
    found = f"{facts.address}: {nodes}, {total['CPU']:g} CPU, {total['GPU']:g} GPU"
    need = {"CPU": facts.workers, "GPU": facts.workers if facts.needs_gpu else 0}
    short = [f"{amount} {name}" for name, amount in need.items() if total[name] < amount]
    mend = "--set train.workers=N, or more nodes: ray up cluster.yaml"
    text = found + (f"; train.workers = {facts.workers} asks {', '.join(short)}" if short else "")
    yield _finding("cluster", "address", not short, text, mend, State.MISSING)


def _token(facts: Facts) -> Iterator[Finding]:
    mode = facts.auth_mode or "unset"
    if facts.token is None:
        state = State.MISSING if facts.auth_mode == "token" else State.NOTE
        yield Finding("cluster", "token", state, f"none; RAY_AUTH_MODE is {mode}", "ray get-auth-token --generate")
    elif facts.auth_mode == "disabled":
        found = f"{facts.token}; RAY_AUTH_MODE is disabled: who reaches a port can run code"
        yield Finding("cluster", "token", State.NOTE, found, "export RAY_AUTH_MODE=token")
    else:
        mend = f"chmod 600 {facts.token}"
        text = f"{facts.token}; RAY_AUTH_MODE is {mode}" + (", others can read the file" if facts.token_is_open else "")
        yield _finding("cluster", "token", not facts.token_is_open, text, mend)


def _tools(facts: Facts) -> Iterator[Finding]:
    yield _finding("tools", "C++ compiler", facts.compiler is not None, facts.compiler or "none", "apt-get install g++")
    mend = "apt-get install chromium (only make test-browser needs it)"
    yield _finding("tools", "browser", facts.browser is not None, facts.browser or "none", mend)


# ------------------------------------------------------------------------------------------------------------ looking


def look(settings: Config, address: str | None = None) -> Facts:
    """Asks this machine, and a cluster: that of ``address``, else of ``RAY_ADDRESS``."""
    from jobs.storage import StoragePath

    torch_version, torch_cuda, gpus, gpu_kernels = _torch()
    native, native_runs = _native()
    address = address or os.environ.get("RAY_ADDRESS")
    address = None if address in (None, "", "local") else address
    nodes, problem = ((), None) if address is None else ask_cluster(address)
    token, is_open = _token_source()
    try:
        place = StoragePath.of(settings.train.storage_path)
        local = place.local
        storage_wrong = storage_problem(local) if local is not None else bucket_problem(place)
    except ValueError as error:
        local, storage_wrong = None, str(error)
    paths = (_existing(local or Path("/")), os.environ.get("RAY_TMPDIR", "/tmp"))
    return Facts(
        python=sys.version_info[:3],
        packages=tuple(_packages()),
        torch=torch_version,
        torch_cuda=torch_cuda,
        gpus=gpus,
        driver=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        gpu_kernels=gpu_kernels,
        native=native,
        native_runs=native_runs,
        cpu=_flags(),
        compiler=_first(os.environ.get("CXX", "c++"), "g++", "clang++"),
        browser=_first(*BROWSERS),
        cores=len(os.sched_getaffinity(0)),
        memory=_available_memory(),
        shared_memory=_free("/dev/shm"),
        disk={path: _free(path) for path in dict.fromkeys(paths)},
        open_files=_open_files(),
        ports={port: port_is_free(port) for port in PORTS},
        auth_mode=os.environ.get("RAY_AUTH_MODE"),
        token=token,
        token_is_open=is_open,
        address=address,
        cluster=nodes,
        cluster_problem=problem,
        storage_problem=storage_wrong,
        trackers_problem=trackers_problem(settings, local is not None),
        workers=settings.train.workers,
        needs_gpu=settings.train.use_gpu,
    )


def _packages() -> Iterator[Package]:
    from importlib import metadata

    from packaging.requirements import Requirement

    for text in _requirements():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = None
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        yield Package(requirement.name, str(requirement.specifier), found, fits)


def _requirements() -> list[str]:
    """From ``pyproject.toml``, or from the installed package where that is not at hand."""
    import tomllib
    from importlib import metadata

    from jobs.command import ROOT

    with contextlib.suppress(OSError):
        return list(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])
    return list(metadata.requires("crsm") or ())


def _torch() -> tuple[str | None, str | None, tuple[str, ...], str]:
    try:
        import torch

        from crsm.kernels import cuda
    except ImportError:
        return None, None, (), "torch is not installed"
    names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return torch.__version__, torch.version.cuda, names, cuda.missing() if names else ""


def _native() -> tuple[str, str]:
    from crsm import native

    return native.MISSING, "" if native.core is None else f"{native.core.isa()}, {native.core.num_threads()} threads"


def _flags() -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _first(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _available_memory() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 0


def _free(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _existing(path: Path) -> str:
    path = path.resolve()
    return str(next(folder for folder in (path, *path.parents) if folder.exists()))


def _open_files() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def port_is_free(port: int) -> bool:
    """Whether nobody listens on it, on this machine or for others."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _token_source() -> tuple[str | None, bool]:
    """Where Ray finds the token, in Ray's order, and whether others can read it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", False
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return (str(path), bool(path.stat().st_mode & 0o077)) if path.read_text().strip() else (None, False)
    except OSError:
        return None, False


def ask_cluster(address: str) -> tuple[tuple[Node, ...], str | None]:
    """The nodes that live, or why none is to be seen. Nothing is started and nothing is joined."""
    from actors.reachability import check_address, living_nodes

    try:
        check_address(address)
        return tuple(Node(where, resources) for where, resources in living_nodes(address)), None
    except (ValueError, OSError) as error:
        return (), str(error)


def storage_problem(storage: Path) -> str | None:
    """Why runs cannot be written there; nothing is created."""
    import tempfile

    folder = Path(_existing(storage))
    if not folder.is_dir():
        return f"{folder} is no folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"


def bucket_problem(place: StoragePath) -> str | None:
    """Why runs cannot be written there; an empty object is written and deleted."""
    try:
        place.check_writable()
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def trackers_problem(settings: Config, local: bool) -> str | None:
    from jobs.trackers import check_trackers

    try:
        check_trackers(settings.train.trackers, "train.trackers", local)
    except ValueError as error:
        return str(error)
    return None


# ----------------------------------------------------------------------------------------------------------- reporting


def show(findings: list[Finding]) -> None:
    """A table on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {State.OK: "green", State.NOTE: "yellow", State.MISSING: "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "found", "to mend it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        state = Text(finding.state.value, colours[finding.state])
        table.add_row(state, f"{finding.subject}: {finding.name}", finding.found, finding.mend)
    Console(highlight=False).print(table)
