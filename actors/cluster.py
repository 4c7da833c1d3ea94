"""Connects to a Ray cluster, or starts a local one.

Invariants:

* a Ray that this process has already initialised is used as it is, and left as it is;
* an address, given or in ``RAY_ADDRESS``, is connected to, and only disconnected from;
* only a local cluster that was started here is shut down here;
* a worker imports the ``crsm`` and ``actors`` that its driver imports: a local cluster inherits the path of a source
  tree, a remote one gets the packages of a source tree uploaded; installed packages are left to the cluster's nodes,
  and a submitted job brings its working directory along;
* an address where no cluster answers, or one that refuses the token, is one line at once.
"""

from __future__ import annotations

import logging
import os
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.job_environment import as_no_submitted_job, check_imported_code, working_directory
from actors.reachability import check_address
from crsm.config import core_count

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the packages: a source tree, or ``site-packages``."""
PACKAGES = ("crsm", "actors", "jobs")
MIN_CPUS = 4
"""Logical CPUs of a local cluster at least: a small machine is shared rather than an actor left without a place."""


@contextmanager
def start_ray(
    address: str | None = None,
    num_cpus: int | None = None,
    object_store_memory: int | None = None,
    system_config: dict[str, Any] | None = None,
) -> Iterator[None]:
    """Ray for the time of a ``with`` block.

    Args:
        address: the cluster; None: ``RAY_ADDRESS`` if it is set, else a new local cluster.
        num_cpus: logical CPUs of a local cluster; None: the cores of this machine, at least ``MIN_CPUS``.
        object_store_memory: bytes of a local cluster's object store; None: as much as Ray likes.
        system_config: Ray's internal settings of a local cluster, for tests.

    Raises:
        ValueError: no cluster at the address, it refuses the token, or a node has other code than the submitted job.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        check_address(address)
        ray.init(
            address=address,
            runtime_env=upload_env(),
            logging_level=logging.WARNING,
            log_to_driver=bool(os.environ.get("CRSM_DEBUG")),
        )
    else:
        with _inherited_path(), as_no_submitted_job():
            ray.init(
                address="local",
                num_cpus=num_cpus or max(core_count(), MIN_CPUS),
                object_store_memory=object_store_memory,
                _system_config=system_config,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(need: Mapping[str, float], what: str) -> None:
    """Finds out now, and not by waiting for ever, whether the cluster has what is needed, used or not.

    Without a Ray session it is the local cluster to come that is looked at; a cluster behind ``RAY_ADDRESS`` can only
    be asked once it is connected to. Of a cluster that grows it counts what it can grow to.

    Raises:
        ValueError: it has less; what is asked and what is there are named.
    """
    if ray.is_initialized():
        from ray._private.state import state

        there = dict(ray.cluster_resources())
        for resource, most in (state.get_max_resources_from_cluster_config() or {}).items():
            there[resource] = max(there.get(resource, 0.0), float(most))
    elif os.environ.get("RAY_ADDRESS", "local") == "local":
        import torch

        there = {"CPU": float(max(core_count(), MIN_CPUS)), "GPU": float(torch.cuda.device_count())}
    else:
        return
    for resource, amount in need.items():
        if there.get(resource, 0.0) < amount:
            raise ValueError(
                f"{what} asks {amount:g} {resource}; the cluster has {there.get(resource, 0.0):g}. "
                "Allowed: fewer of them, or a larger cluster"
            )


def upload_env() -> dict[str, Any]:
    """The runtime environment that brings the packages to a cluster's workers; empty if they have them already."""
    working = working_directory()
    check_imported_code(ROOT, working, PACKAGES)
    if working is not None or is_installed():
        return {}
    return {"py_modules": [str(ROOT / name) for name in PACKAGES if (ROOT / name).is_dir()]}


def is_installed() -> bool:
    """Whether the packages lie where every worker of the same environment finds them."""
    return ROOT in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}


@contextmanager
def _inherited_path() -> Iterator[None]:
    """``PYTHONPATH`` for the processes started meanwhile: Ray's daemons hand their environment to the workers."""
    before = os.environ.get("PYTHONPATH")
    if not is_installed():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before)))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before
