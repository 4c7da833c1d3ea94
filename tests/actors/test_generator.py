"""The generator actor on a local Ray: streams, cancelling, metrics, faults, and the end."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from actors.client import GeneratorDied, stream_tokens
from actors.decode_loop import Refused
from actors.generator import GenerationFailed, start_generator, stop_generator
from actors.state_store import StateHandle
from actors.weights import share
from crsm.config import DeliberationConfig, EngineConfig, PlannersConfig, SamplingConfig
from crsm.engine import Engine, QueueFull
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.types import Token
from tests.actors.helpers import WALL, generations, is_running, run, slow_planner_class, until
from tests.fixtures import PROMPT, tiny_checkpoint, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ENDLESS = SamplingConfig(max_tokens=10**9)
OFTEN = DeliberationConfig(lag=0, injection_rate=0.9)


class Stream:
    """One generation, token by token."""

    def __init__(self, generator: Any, *arguments: Any, **named: Any) -> None:
        self.references = generator.generate.remote(*arguments, **named)

    def __iter__(self) -> Iterator[Token]:
        return (token for reference in self.references for token in ray.get(reference))


@pytest.fixture(scope="module")
def generator(cluster: None, checkpoint: Checkpoint) -> Iterator[Any]:
    """One for the tests that leave it as it was: virtual clock, one planner."""
    actor = start_generator(checkpoint, PlannersConfig(count=1))
    yield actor
    stop_generator(actor)


def processes(generator: Any) -> list[int]:
    """The generator's and its planners', once they are all there."""
    pids: list[int] = []

    def all_there() -> bool:
        pool = ray.get(generator.metrics.remote())["pool"]
        pids[:] = [ray.get(generator.ping.remote()), *pool["pids"]]
        return set(pool["planners"]) == {"ready"}

    until(all_there)
    return pids


def test_two_streams_at_a_time_say_what_the_engine_says_alone(checkpoint: Checkpoint, generator: Any) -> None:
    requests = generations(tokens=40, lag=0)[:2]
    threads = ThreadPlanners(Deliberator.from_checkpoint(checkpoint))
    # Each alone: who shares the batch when is a matter of time here, and changes the last bits of log-probabilities.
    expected = [run(Engine(checkpoint, threads), [request])[request.generation_id] for request in requests]
    threads.close()
    before = ray.get(generator.metrics.remote())
    streams = [
        iter(
            Stream(
                generator,
                request.prompt,
                request.sampling,
                request.deliberation,
                request.simulations,
                request.generation_id,
            )
        )
        for request in requests
    ]
    said: list[list[Token]] = [[], []]
    for _ in range(40):  # by turns: both are under way
        for mine, stream in zip(said, streams, strict=True):
            mine.append(next(stream))
    for mine, stream, request, tokens in zip(said, streams, requests, expected, strict=True):
        assert next(stream, None) is None and mine[-1].finished
        assert {token.generation_id for token in mine} == {request.generation_id}
        assert [token.position for token in mine] == list(range(len(request.prompt), len(request.prompt) + 40))
        assert [token.token for token in mine] == [token for token, _ in tokens]
    assert any(token.injection is not None for token in said[0])
    after = ray.get(generator.metrics.remote())
    assert after["tokens"] - before["tokens"] == 80
    assert after["steps"] - before["steps"] < 80, "the two were never decoded together"
    assert after["requests"] - before["requests"] == 2 * 39 and after["outcomes"].keys() <= {"on_time", "shut", "ended"}
    assert after["pool"]["plans"] >= after["pool"]["requests"] > 0 and after["streams"] == 0


def test_one_of_two_is_cancelled(generator: Any) -> None:
    endless = iter(Stream(generator, PROMPT, ENDLESS, OFTEN, generation_id="endless"))
    other = Stream(generator, PROMPT, SamplingConfig(max_tokens=30), OFTEN)
    assert next(endless).generation_id == "endless"
    ray.get(generator.cancel.remote("endless"))
    ray.get(generator.cancel.remote("never heard of"))
    *_, last = endless
    assert last.finish_reason == "cancelled"
    assert [token.finish_reason for token in other][-1] == "length"


def test_a_call_that_is_cancelled_ends_its_generation(generator: Any) -> None:
    stream = Stream(generator, PROMPT, ENDLESS, OFTEN)
    assert isinstance(next(iter(stream)), Token)
    ray.cancel(stream.references)
    until(lambda: ray.get(generator.metrics.remote())["streams"] == 0)
    tokens = ray.get(generator.metrics.remote())["tokens"]
    ended = ray.get(generator.metrics.remote())
    assert ended["tokens"] <= tokens + 1
    assert sum(1 for _ in Stream(generator, PROMPT, SamplingConfig(max_tokens=5))) == 5


@pytest.mark.parametrize(
    ("prompt", "message"), [((), "prompt is empty"), ((1, 10**6), "prompt holds token 1000000; allowed: 0 to 30")]
)
def test_what_cannot_be_said_is_refused(generator: Any, prompt: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(Stream(generator, prompt)))


def test_an_id_in_use_is_refused_and_its_owner_not_disturbed(generator: Any) -> None:
    owner = iter(Stream(generator, PROMPT, ENDLESS, OFTEN, generation_id="mine"))
    next(owner)
    with pytest.raises(ValueError, match="'mine' is in use"):
        next(iter(Stream(generator, PROMPT, generation_id="mine")))
    next(owner)
    ray.get(generator.cancel.remote("mine"))
    assert [token.finish_reason for token in owner][-1] == "cancelled"


def test_stalled_planners_and_then_dead_ones_change_nothing_and_closing_leaves_no_process(
    checkpoint: Checkpoint,
) -> None:
    actor = start_generator(
        checkpoint, PlannersConfig(count=2, max_batch=1), WALL, planner_class=slow_planner_class(), planner_cpus=0.5
    )
    expected = [token for token, _ in run(Engine(checkpoint), generations(tokens=30)[:1])["g0"]]
    request = generations(tokens=30)[0]
    pids = processes(actor)
    for name in ("slow-1", "slow-2"):
        stream = Stream(actor, request.prompt, request.sampling, request.deliberation, 8, name)
        assert [token.token for token in stream] == expected
        for pid in pids[1:]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    until(lambda: ray.get(actor.metrics.remote())["pool"]["deaths"] == 2)
    pids += processes(actor)  # with two new planners
    metrics = ray.get(actor.metrics.remote())
    assert metrics["pool"]["restarts"] == 2 and metrics["pool"]["plans"] == 0 and metrics["injections"] == 0
    endless = iter(Stream(actor, PROMPT, ENDLESS, OFTEN, generation_id="slow-3"))
    next(endless)
    stop_generator(actor)
    with pytest.raises((GenerationFailed, ray.exceptions.RayActorError)):
        list(endless)
    until(lambda: not any(map(is_running, pids)), 15)


def test_closing_reaches_a_decode_thread_that_waits_for_a_plan_and_names_the_generation(
    checkpoint: Checkpoint,
) -> None:
    actor = start_generator(
        checkpoint, PlannersConfig(count=1), EngineConfig(clock="virtual"), planner_class=slow_planner_class()
    )
    stream = iter(Stream(actor, PROMPT, ENDLESS, OFTEN, generation_id="slow-and-waiting"))
    next(stream)
    pids: list[int] = [ray.get(actor.ping.remote())]
    ray.get(actor.close.remote(), timeout=60)
    with pytest.raises(GenerationFailed, match="slow-and-waiting"):
        list(stream)
    with pytest.raises(GenerationFailed, match="closed"):
        next(iter(Stream(actor, PROMPT)))
    assert ray.get(actor.metrics.remote())["pool"]["pids"] == ()
    ray.kill(actor)
    until(lambda: not any(map(is_running, pids)), 15)


def test_planners_end_with_their_generator(checkpoint: Checkpoint) -> None:
    actor = start_generator(checkpoint, PlannersConfig(count=1), WALL)
    pids = processes(actor)
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: not any(map(is_running, pids)), 15)


# Load, states and resumption ------------------------------------------------------------------------------------------


def test_many_generations_are_read_as_one_stream_and_a_refusal_disturbs_nobody(generator: Any) -> None:
    requests = [*generations(tokens=9), GenerationRequest((), generation_id="empty")]
    said: dict[str, list[Token]] = {request.generation_id: [] for request in requests}
    refused: list[Refused] = []
    for reference in generator.generate_many.remote(requests):
        for item in (found,) if isinstance(found := ray.get(reference), Refused) else found:
            refused.append(item) if isinstance(item, Refused) else said[item.generation_id].append(item)
    assert [(refusal.generation_id, refusal.full) for refusal in refused] == [("empty", False)]
    for request in requests[:-1]:
        mine = said[request.generation_id]
        assert [token.position - len(request.prompt) for token in mine] == list(range(9))
        assert [token.finished for token in mine] == [False] * 8 + [True]
    with pytest.raises(ValueError, match="generation_id is missing or given twice"):
        ray.get(next(iter(generator.generate_many.remote([requests[0], requests[0]]))))


def test_a_full_queue_is_refused_clearly(checkpoint: Checkpoint) -> None:
    actor = start_generator(
        checkpoint, PlannersConfig(count=0), EngineConfig(clock="wall", max_batch=1, max_waiting=1), num_cpus=0.5
    )
    running = [iter(Stream(actor, PROMPT, ENDLESS, generation_id=name)) for name in ("a",)]
    next(running[0])
    waiting = actor.generate.remote(PROMPT, ENDLESS, generation_id="b")
    until(lambda: ray.get(actor.metrics.remote())["generations"]["waiting"] == 1)
    with pytest.raises(QueueFull, match=r"1 generations wait; allowed: engine.max_waiting = 1"):
        list(Stream(actor, PROMPT, generation_id="c"))
    ray.cancel(waiting)
    stop_generator(actor)


def test_a_state_is_kept_forked_and_moved_to_another_generator(checkpoint: Checkpoint, generator: Any) -> None:
    """Saved in the middle, gone on from twice here and once on another generator: the same tokens everywhere."""
    request = generations(tokens=40, lag=0)[0]
    whole = [token.token for token in Stream(generator, request.prompt, request.sampling, request.deliberation, 8)]
    stream = iter(Stream(generator, request.prompt, request.sampling, request.deliberation, 8, "source", pace=None))
    next(stream)
    handle = ray.get(generator.snapshot.remote("source"))
    assert isinstance(handle, StateHandle) and handle.generation_id == "source"
    list(stream)
    rest = whole[handle.position + 1 - len(request.prompt) :]
    for _ in range(2):
        assert [token.token for token in Stream(generator, start=handle.handle)] == rest
    other = start_generator(checkpoint, PlannersConfig(count=1), num_cpus=0.5, planner_cpus=0.5)
    moved = ray.get(other.import_state.remote(generator.export_state.remote(handle.handle)))
    assert moved.num_bytes == handle.num_bytes
    assert [token.token for token in Stream(other, start=moved.handle)] == rest
    assert ray.get(generator.drop_state.remote(handle.handle))
    with pytest.raises(ValueError, match="is not known, or its time is over"):
        list(Stream(generator, start=handle.handle))
    stop_generator(other)


def test_a_chat_is_parked_and_goes_on_where_it_was(checkpoint: Checkpoint, generator: Any) -> None:
    few = SamplingConfig(max_tokens=4)
    first = [token.token for token in Stream(generator, PROMPT, few, OFTEN, generation_id="chat", park=True)]
    assert ray.get(generator.metrics.remote())["generations"]["parked"] == 1
    second = list(Stream(generator, (4, 9), few, DeliberationConfig(lag=9), generation_id="chat"))
    alone = Engine(checkpoint).generate_all([GenerationRequest((*PROMPT, *first, 4, 9), few)])[0]
    assert [token.token for token in second] == alone and second[0].position == len(PROMPT) + 4 + 2
    assert ray.get(generator.metrics.remote())["generations"]["parked"] == 0


@pytest.mark.parametrize("tokens_before", [2, 40])
def test_a_generator_that_is_killed_is_resumed_with_the_same_tokens(checkpoint: Checkpoint, tokens_before: int) -> None:
    """System 2 on, virtual clock; killed before and after the first snapshot."""
    request = generations(tokens=400, lag=1)[2]  # sampled
    request = dataclasses.replace(request, sampling=request.sampling.model_copy(update={"ignore_eos": True}))
    inline = InlinePlanners(Deliberator.from_checkpoint(checkpoint))
    expected = Engine(checkpoint, inline).generate_all([request])[0]
    actor = start_generator(checkpoint, PlannersConfig(count=1), num_cpus=0.5, planner_cpus=0.5, max_restarts=-1)
    stream = stream_tokens(
        actor,
        request.prompt,
        resume=True,
        snapshot_every=16,
        sampling=request.sampling,
        deliberation=request.deliberation,
        simulations=8,
        generation_id="resumed",
    )
    said = [next(stream) for _ in range(tokens_before)]
    os.kill(ray.get(actor.ping.remote()), signal.SIGKILL)
    said += stream
    assert [token.token for token in said] == expected
    assert [token.position for token in said] == list(range(len(request.prompt), len(request.prompt) + 400))
    assert {token.generation_id for token in said} == {"resumed"}
    ray.kill(actor)


def test_without_resumption_the_error_names_the_generation(checkpoint: Checkpoint) -> None:
    actor = start_generator(checkpoint, PlannersConfig(count=0), WALL, num_cpus=0.5)
    stream = stream_tokens(actor, PROMPT, sampling=ENDLESS, generation_id="mine")
    next(stream)
    os.kill(ray.get(actor.ping.remote()), signal.SIGKILL)
    with pytest.raises(GeneratorDied, match="generation mine: the generator died after"):
        list(stream)


def test_new_weights_reach_generator_and_planners(checkpoint: Checkpoint) -> None:
    actor = start_generator(checkpoint, PlannersConfig(count=1), num_cpus=0.5, planner_cpus=0.5)
    few = SamplingConfig(max_tokens=12)
    before = [token.token for token in Stream(actor, PROMPT, few, OFTEN, 8)]
    newer = dataclasses.replace(tiny_checkpoint(seed=5), model_version=4)
    shared = share(newer)
    assert ray.get(actor.update_weights.remote(shared, [shared])) == 4
    until(lambda: ray.get(actor.metrics.remote())["pool"]["versions"] == (4,))
    after = [token.token for token in Stream(actor, PROMPT, few, OFTEN, 8)]
    inline = InlinePlanners(Deliberator.from_checkpoint(newer))
    expected = Engine(newer, inline).generate_all([GenerationRequest(PROMPT, few, OFTEN, 8)])[0]
    assert after == expected != before
    with pytest.raises(ValueError, match="a model of other shapes"):
        other = share(tiny_checkpoint(tiny_config(n_layer=3)))
        ray.get(actor.update_weights.remote(other, [other]))
    stop_generator(actor)
