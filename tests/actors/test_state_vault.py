"""The vault on a local Ray: states outlive who made them, belong to their owner, and end with the application."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray

from actors.state_vault import NAMESPACE, open_vault, vault_name
from tests.actors.helpers import until
from tests.actors.test_state_store import SAVED

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def there_is(application: str) -> bool:
    try:
        ray.get_actor(vault_name(application), namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def test_a_state_outlives_the_process_that_kept_it_and_is_found_by_another() -> None:
    @ray.remote(num_cpus=0)
    class Replica:
        def keep(self) -> str:
            vault = open_vault("outlived", 10**8)
            ray.get(vault.visit.remote(10**8))
            return ray.get(vault.put.remote(SAVED, 60.0, "mine")).handle

    replica = Replica.remote()
    handle = ray.get(replica.keep.remote())
    ray.kill(replica)
    vault = open_vault("outlived", 10**8)
    saved, found = ray.get(vault.get.remote(handle, "mine"))
    assert saved.tokens == SAVED.tokens and np.array_equal(saved.ssm_LHPN, SAVED.ssm_LHPN)
    assert found.handle == handle and 0 < found.seconds <= 60 and found.position == SAVED.position
    assert ray.get(vault.size.remote()) == {"count": 1, "bytes": SAVED.num_bytes}
    with pytest.raises(ValueError, match="is not known"):
        ray.get(vault.get.remote(handle, "yours"))
    assert not ray.get(vault.drop.remote(handle, "yours")) and ray.get(vault.drop.remote(handle, "mine"))
    ray.kill(vault)


def test_it_ends_when_nobody_visits_any_more_and_not_before() -> None:
    vault = open_vault("left", 10**8, linger=1.0)
    handle = ray.get(vault.put.remote(SAVED, 60.0, "")).handle
    end = time.monotonic() + 2.0  # longer than it lingers
    while time.monotonic() < end:
        ray.get(vault.visit.remote(10**8))
        time.sleep(0.1)
    assert ray.get(vault.get.remote(handle, ""))[0].tokens == SAVED.tokens
    until(lambda: not there_is("left"), 20)


def test_two_applications_have_two_vaults() -> None:
    first, second = open_vault("first", 10**8), open_vault("second", 10**8)
    handle = ray.get(first.put.remote(SAVED, 60.0, "")).handle
    with pytest.raises(ValueError, match="is not known"):
        ray.get(second.get.remote(handle, ""))
    with pytest.raises(ValueError, match="allowed: at most"):
        ray.get(open_vault("small", 10).put.remote(SAVED, 60.0, ""))
    for vault in (first, second, open_vault("small", 10)):
        ray.kill(vault)
