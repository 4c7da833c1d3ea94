"""The shipped model behind a backend in this process, and behind a socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actors.serving.app import build_app
from actors.serving.local import LocalBackend
from actors.serving.settings import ServeSettings
from crsm.model import Checkpoint, load_checkpoint
from tests.serving.fakes import serving


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def nano() -> Checkpoint:
    return load_checkpoint("nano")


@pytest.fixture(scope="module")
def nano_address(nano: Checkpoint) -> Iterator[str]:
    """A server with one planner and the virtual clock: what it says does not depend on the machine's speed."""
    backend = LocalBackend(nano, "nano", 1, nano.config.engine)
    with serving(build_app(backend, ServeSettings())) as address:
        yield address
    backend.close()
