"""The states of a served application in an actor of their own, so that any replica can go on from any of them.

Invariants:

* it outlives replicas: neither a rolling update nor the death of a replica or a generator costs a state;
* it ends with the application: every replica visits it, and when none has for a while it ends itself;
* only its owner finds a state; bytes and times are bounded (:mod:`actors.state_store`);
* what it keeps is its own memory: no state depends on the process that made it.

It is not written to disk: the death of its process costs the states, and handles are then unknown, as if expired.
"""

from __future__ import annotations

import asyncio
import copy
import time
from typing import Any

import ray

from actors.state_store import StateHandle, StateStore
from crsm.saved_generation import SavedGeneration

NAMESPACE = "crsm"
"""Ray's namespace of the vaults."""
VISIT_INTERVAL = 20.0
"""Seconds between two visits of a replica."""
LINGER = 300.0
"""Seconds without a visit after which there is no application any more."""


class StateVault:
    """Keeps states. A plain class: :func:`open_vault` makes an actor of it."""

    def __init__(self, max_bytes: int, linger: float) -> None:
        self._store = StateStore(max_bytes)
        self._linger = linger
        self._visited = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def visit(self, max_bytes: int) -> None:
        """A replica is there, and so many bytes are allowed from now on."""
        self._visited = time.monotonic()
        self._store.resize(max_bytes)
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._leave_when_alone())

    async def put(self, saved: SavedGeneration, seconds: float, owner: str) -> StateHandle:
        """Keeps a state for a time.

        Raises:
            ValueError: ``seconds`` is not above 0, or the state is larger than the vault.
        """
        # Its arrays are views of a message that belongs to the sender's process.
        return self._store.put(copy.deepcopy(saved), seconds, owner)

    async def get(self, handle: str, owner: str) -> tuple[SavedGeneration, StateHandle]:
        """A state, and what is left of its time.

        Raises:
            ValueError: there is none, its time is over, or it is another owner's.
        """
        return self._store.get(handle, owner), self._store.describe(handle, owner)

    async def drop(self, handle: str, owner: str) -> bool:
        """Forgets a state; whether there was one of this owner's."""
        return self._store.drop(handle, owner)

    async def size(self) -> dict[str, int]:
        """How many states there are, and their bytes."""
        return {"count": len(self._store), "bytes": self._store.num_bytes}

    async def _leave_when_alone(self) -> None:
        while (left := self._visited + self._linger - time.monotonic()) > 0:
            await asyncio.sleep(left)
        ray.kill(ray.get_runtime_context().current_actor)


def open_vault(application: str, max_bytes: int, linger: float = LINGER) -> Any:
    """The vault of an application: the one there is, or a new one. Returns the actor's handle at once.

    Whoever opens it must :func:`visit <StateVault.visit>` it every :data:`VISIT_INTERVAL` seconds.
    """
    actor_class = ray.remote(num_cpus=0, max_restarts=-1)(StateVault)
    return actor_class.options(
        name=vault_name(application), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(max_bytes, linger)


def vault_name(application: str) -> str:
    return f"states of {application}"
