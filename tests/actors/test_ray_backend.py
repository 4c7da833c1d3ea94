"""The backend over Ray: every generation's items reach its reader and no other's, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import ray

from actors.generator import start_generator, stop_generator
from actors.ray_backend import RayBackend
from actors.serving.backend import GenerationFailed, Item, PlannerCount
from actors.serving.served_model import served_model
from actors.state_store import StateStore
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.engine import Engine, QueueFull
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.plan_events import PlanEvent
from crsm.saved_generation import SavedGeneration
from crsm.types import Token
from tests.actors.helpers import WALL, until
from tests.fixtures import PROMPT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ENDLESS = 10**6
SYSTEM_1 = DeliberationConfig(max_plans=0)


def ask(name: str, tokens: int = 12, **fields: Any) -> GenerationRequest:
    sampling = SamplingConfig(max_tokens=tokens, temperature=0.9, seed=len(name), ignore_eos=tokens == ENDLESS)
    deliberation = fields.pop("deliberation", SYSTEM_1)
    return GenerationRequest(fields.pop("prompt", PROMPT), sampling, deliberation, 8, name, **fields)


class Vault:
    """States in an actor."""

    def __init__(self) -> None:
        self._store = StateStore(2**20)

    def put(self, *arguments: Any) -> Any:
        return self._store.put(*arguments)

    def get(self, handle: str, owner: str) -> Any:
        return self._store.get(handle, owner), self._store.describe(handle, owner)

    def drop(self, *arguments: Any) -> bool:
        return self._store.drop(*arguments)


@pytest.fixture(scope="module")
def generator(cluster: None, checkpoint: Checkpoint) -> Iterator[Any]:
    actor = start_generator(checkpoint, PlannersConfig(count=1, max_count=2, num_cpus=0.5), WALL, max_restarts=-1)
    ray.get(actor.wait_until_ready.remote())
    yield actor
    stop_generator(actor)


def with_backend(generator: Any, checkpoint: Checkpoint, main: Callable[[RayBackend], Awaitable[None]]) -> None:
    """Runs ``main`` beside a backend that is ready."""

    async def run() -> None:
        vault = ray.remote(num_cpus=0)(Vault).remote()
        backend = RayBackend(generator, vault, served_model(checkpoint, "tiny"))
        backend.start()
        try:
            await eventually(backend.is_ready)
            await asyncio.wait_for(main(backend), 120)
        finally:
            await backend.close()
            ray.kill(vault)

    asyncio.run(run())


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(3000):
        if await condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("not true within a minute")


async def all_of(backend: RayBackend, request: GenerationRequest) -> list[Item]:
    return [item async for items in backend.generate(request) for item in items]


def said(items: list[Item]) -> list[tuple[int, int]]:
    return [(item.position, item.token) for item in items if isinstance(item, Token)]


def test_each_of_many_generations_has_the_tokens_that_the_engine_says(generator: Any, checkpoint: Checkpoint) -> None:
    requests = [ask("g" * (i + 1), tokens=5 + i) for i in range(20)]
    alone = Engine(checkpoint, config=EngineConfig()).generate_all(requests)

    async def main(backend: RayBackend) -> None:
        found = await asyncio.gather(*(all_of(backend, request) for request in requests))
        for items, tokens in zip(found, alone, strict=True):
            assert said(items) == list(enumerate(tokens, len(PROMPT)))
        assert backend.open_generations == 0

    with_backend(generator, checkpoint, main)


def test_events_trees_and_states_come_with_the_tokens(generator: Any, checkpoint: Checkpoint) -> None:
    async def main(backend: RayBackend) -> None:
        deliberation = DeliberationConfig(lag=1, injection_rate=0.9)
        request = ask("a", 20, deliberation=deliberation, pace=50.0, watch=True, trees=True, keep=True)
        items = await all_of(backend, request)
        kinds = [item.kind for item in items if isinstance(item, PlanEvent)]
        plans = [item.plan for item in items if isinstance(item, PlanEvent) and item.kind == "plan"]
        assert "request" in kinds and all(plan is not None and plan.sketch_S6 is not None for plan in plans)
        assert isinstance(items[-1], Token) and items[-1].finished
        (saved,) = [item for item in items if isinstance(item, SavedGeneration)]
        handle = await backend.put_state(saved, 60.0, "me")
        with pytest.raises(ValueError, match="is not known"):
            await backend.get_state(handle.handle, "you")
        again, described = await backend.get_state(handle.handle, "me")
        assert again.position == saved.position == described.position and 0 < described.seconds <= 60
        assert said(await all_of(backend, ask("b", 3, prompt=(9,), start=again)))[0][0] == saved.position + 2
        assert await backend.drop_state(handle.handle, "me") and not await backend.drop_state(handle.handle, "me")

    with_backend(generator, checkpoint, main)


def test_who_leaves_has_the_generation_cancelled(generator: Any, checkpoint: Checkpoint) -> None:
    async def main(backend: RayBackend) -> None:
        stream = backend.generate(ask("endless", ENDLESS))
        async for _ in stream:
            break
        await stream.aclose()

        async def quiet() -> bool:
            return not any((await backend.metrics())["generations"].values())

        await eventually(quiet)

    with_backend(generator, checkpoint, main)


def test_what_cannot_be_carried_out_is_refused_to_its_reader_alone(generator: Any, checkpoint: Checkpoint) -> None:
    async def main(backend: RayBackend) -> None:
        good = asyncio.ensure_future(all_of(backend, ask("good", 40)))
        with pytest.raises(ValueError, match="token 999"):
            await all_of(backend, ask("bad", prompt=(999,)))
        with pytest.raises(ValueError, match="missing or in use"):
            await all_of(backend, ask(""))
        with pytest.raises(ValueError, match="is not known"):
            await backend.snapshot("nobody")
        assert len(said(await good)) == 40

    with_backend(generator, checkpoint, main)


def test_the_number_of_planners_follows_what_is_asked_for(generator: Any, checkpoint: Checkpoint) -> None:
    async def main(backend: RayBackend) -> None:
        assert await backend.planners() == PlannerCount(1, 2)
        assert await backend.set_planners(2) == PlannerCount(2, 2)

        async def ready(count: int) -> bool:
            return (await backend.metrics())["pool"]["planners"].get("ready", 0) == count

        await eventually(lambda: ready(2))
        with pytest.raises(ValueError, match="planners = 3; allowed: 0 to 2"):
            await backend.set_planners(3)
        await backend.set_planners(1)
        await eventually(lambda: ready(1))

    with_backend(generator, checkpoint, main)


def test_a_generator_that_dies_fails_what_is_open_at_once_and_is_found_again(
    generator: Any, checkpoint: Checkpoint
) -> None:
    async def main(backend: RayBackend) -> None:
        open_ = [asyncio.ensure_future(all_of(backend, ask(name, ENDLESS))) for name in ("x", "y")]
        await asyncio.sleep(0.3)
        os.kill(await generator.ping.remote(), signal.SIGKILL)
        for task in open_:
            with pytest.raises(GenerationFailed, match="generator is gone"):
                await asyncio.wait_for(task, 5)
        with pytest.raises(GenerationFailed, match="being restarted"):
            await all_of(backend, ask("too early"))
        await eventually(backend.is_ready)
        assert len(said(await all_of(backend, ask("again")))) == 12

    with_backend(generator, checkpoint, main)


def test_a_generator_that_stays_dead_is_named_so(cluster: None, checkpoint: Checkpoint) -> None:
    actor = start_generator(checkpoint, PlannersConfig(count=0), WALL)

    async def main(backend: RayBackend) -> None:
        ray.kill(actor)

        async def failed() -> bool:
            return bool(backend.failed)

        await eventually(failed)
        assert not await backend.is_ready()
        with pytest.raises(GenerationFailed, match="dead"):
            await all_of(backend, ask("g"))

    with_backend(actor, checkpoint, main)


def test_a_full_queue_is_named_so(cluster: None, checkpoint: Checkpoint) -> None:
    settings = EngineConfig(clock="wall", max_batch=1, max_waiting=1)
    actor = start_generator(checkpoint, PlannersConfig(count=0), settings)

    async def main(backend: RayBackend) -> None:
        first = backend.generate(ask("first", ENDLESS))
        await anext(first)
        second = asyncio.ensure_future(all_of(backend, ask("second", ENDLESS)))

        async def waiting() -> bool:
            return bool((await backend.metrics())["generations"]["waiting"])

        await eventually(waiting)
        with pytest.raises(QueueFull, match="max_waiting = 1"):
            await all_of(backend, ask("third"))
        await first.aclose()
        second.cancel()

    with_backend(actor, checkpoint, main)
    stop_generator(actor)


def test_a_front_end_that_is_gone_takes_its_generations_along(generator: Any, checkpoint: Checkpoint) -> None:
    async def main(backend: RayBackend) -> None:
        await anext(backend.generate(ask("left behind", ENDLESS)))

    with_backend(generator, checkpoint, main)
    until(lambda: not any(ray.get(generator.metrics.remote())["generations"].values()), 30)
