"""Ray for the modules that need it, and one thread of torch, as the planners have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from crsm.model import Checkpoint
from tests.fixtures import tiny_checkpoint


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from actors.cluster import start_ray

    with start_ray(num_cpus=8):
        yield
