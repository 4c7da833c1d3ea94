"""The decode loop, with planners in threads or none: no Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from actors.decode_loop import Closed, DecodeLoop, Message, Refused
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.planners import InlinePlanners, ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.types import Token
from tests.actors.helpers import generations, run


class Caller:
    """Collects what a loop delivers."""

    def __init__(self, engine: Engine) -> None:
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.threads: set[str] = set()
        self.loop = DecodeLoop(engine, self._deliver)
        self.loop.start()

    def _deliver(self, messages: Sequence[Message]) -> None:
        self.threads.add(threading.current_thread().name)
        for message in messages:
            self.messages.put(message)

    def heard(self, names: Sequence[str]) -> dict[str, list[Token]]:
        """Everything up to the last token of these generations."""
        said: dict[str, list[Token]] = {name: [] for name in names}
        left = set(names)
        while left:
            message = self.messages.get(timeout=60)
            assert isinstance(message, Token), message
            said[message.generation_id].append(message)
            left -= {message.generation_id} if message.finished else set()
        return said

    def metrics(self) -> dict[str, Any]:
        answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.loop.metrics(answer.put)
        return answer.get(timeout=60)


@pytest.fixture
def caller(checkpoint: Checkpoint) -> Iterator[Caller]:
    planners = ThreadPlanners(Deliberator.from_checkpoint(checkpoint))
    caller = Caller(Engine(checkpoint, planners))
    yield caller
    caller.loop.stop()
    assert caller.loop.wait(60)
    planners.close()


def endless(name: str) -> GenerationRequest:
    return GenerationRequest(
        (7, 9, 22), generations()[0].sampling.model_copy(update={"max_tokens": 10**9}), generation_id=name
    )


def test_generations_that_come_at_any_time_are_said_as_if_alone(checkpoint: Checkpoint, caller: Caller) -> None:
    requests = generations()
    alone = {
        name: tokens
        for request in requests
        for name, tokens in run(
            Engine(checkpoint, InlinePlanners(Deliberator.from_checkpoint(checkpoint))), [request]
        ).items()
    }
    for request in requests:
        caller.loop.join(request)
    said = caller.heard([request.generation_id for request in requests])
    for name, tokens in said.items():
        assert [token.token for token in tokens] == [token for token, _ in alone[name]]
    assert caller.threads == {"decode"}
    metrics = caller.metrics()
    assert metrics["tokens"] == sum(map(len, said.values())) and metrics["steps"] > 0 and metrics["injections"] > 0


def test_a_cancelled_generation_ends_and_the_others_go_on(caller: Caller) -> None:
    caller.loop.join(endless("a"))
    caller.loop.join(generations()[0])
    caller.loop.cancel("a")
    caller.loop.cancel("unknown")
    said = caller.heard(["a", "g0"])
    assert said["a"][-1].finish_reason == "cancelled" and len(said["g0"]) == 12


def test_a_request_that_is_refused_disturbs_nobody(checkpoint: Checkpoint, caller: Caller) -> None:
    caller.loop.join(GenerationRequest((), generation_id="empty"))
    message = caller.messages.get(timeout=60)
    assert isinstance(message, Refused) and message.generation_id == "empty" and "prompt is empty" in message.reason
    caller.loop.join(generations()[1])
    assert len(caller.heard(["g1"])["g1"]) == 12


def test_after_the_end_every_command_is_still_answered(caller: Caller) -> None:
    caller.loop.join(endless("a"))
    assert isinstance(caller.messages.get(timeout=60), Token)
    caller.loop.stop()
    assert caller.loop.wait(60)
    while isinstance(message := caller.messages.get(timeout=60), Token):
        pass
    assert message == Closed("the generator was closed")
    caller.loop.join(endless("b"))
    assert caller.messages.get(timeout=60) == Refused("b", "the generator was closed")
    assert caller.metrics()["tokens"] > 0


def test_an_engine_that_fails_is_heard_of(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(checkpoint)

    def fail() -> list[Token]:
        raise FloatingPointError("no such luck")

    monkeypatch.setattr(engine, "step", fail)
    caller = Caller(engine)
    caller.loop.join(endless("a"))
    message = caller.messages.get(timeout=60)
    assert message == Closed("the decode loop failed: FloatingPointError: no such luck")
