"""The live page on a loopback port, and a headless Chromium to look at it: what the tests of the page share.

By the virtual clock what is said and what becomes of each plan depend on no machine's speed, and no pace holds; by the
wall clock a race lasts as long as its pace says.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx
import uvicorn
from fastapi import FastAPI

from actors.serving.app import build_app
from actors.serving.backend import PlannerCount, ServedModel
from actors.serving.local import LocalBackend
from actors.serving.settings import ServeSettings
from crsm.model import load_checkpoint

START_SECONDS = 60.0


class AdjustableBackend(LocalBackend):
    """A local backend of ``nano`` that says its planners can be counted anew; keeps the numbers that were asked for."""

    def __init__(self, clock: Literal["virtual", "wall"], maximum: int) -> None:
        nano = load_checkpoint("nano")
        self._engine = nano.config.engine.model_copy(update={"clock": clock})
        super().__init__(nano, "nano", engine=self._engine)
        self._now, self._maximum = 1, maximum
        self.wanted: list[int] = []

    @property
    def model(self) -> ServedModel:
        served = super().model
        return replace(served, config=served.config.model_copy(update={"engine": self._engine}))

    async def planners(self) -> PlannerCount:
        return PlannerCount(self._now, self._maximum)

    async def set_planners(self, count: int) -> PlannerCount:
        if not 0 <= count <= self._maximum:
            raise ValueError(f"planners = {count}; allowed: 0 to {self._maximum}")
        self._now = count
        self.wanted.append(count)
        return await self.planners()


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs."""

    url: str
    app: FastAPI
    backend: AdjustableBackend

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{self.url}{path}", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def get(self, path: str) -> Any:
        answer = httpx.get(f"{self.url}{path}", timeout=60)
        answer.raise_for_status()
        return answer.json()

    @property
    def running(self) -> int:
        """Generations that run or wait."""
        return len(self.app.state.front.admission)


@contextmanager
def serve_page(
    clock: Literal["virtual", "wall"] = "virtual", maximum_planners: int = 0, port: int = 0, **settings: Any
) -> Iterator[Served]:
    """Serves ``nano`` with its page until the block is left."""
    backend = AdjustableBackend(clock, maximum_planners)
    app = build_app(backend, ServeSettings(**settings))
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until = time.monotonic() + START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the server of the page did not start")
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", app, backend)
    finally:
        server.should_exit = True
        thread.join()
        backend.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium, of the system.

    Raises:
        RuntimeError: saying what to install.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise RuntimeError("no Chromium on PATH; install one (Debian, Ubuntu: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise RuntimeError("playwright is missing; install it (pip install -e '.[browser]')") from None
    with sync_playwright() as playwright:
        # Its sandbox needs name spaces that containers seldom give; the only page it opens is ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
