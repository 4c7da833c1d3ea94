"""Events, logs and cancellation over a real engine with real plans."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from actors.serving.app import build_app
from actors.serving.local import LocalBackend
from actors.serving.settings import ServeSettings
from crsm.engine import Engine
from crsm.event_log import read_log
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint
from crsm.tasks import build_task
from tests.serving.fakes import payloads, serving, streamed, wait_until


@pytest.fixture(scope="module")
def prompts(nano: Checkpoint) -> list[str]:
    task = build_task(nano.config.tasks[0])
    return [task.generate(nano.config.seed, "test", index).prompt for index in range(8)]


@pytest.fixture
def wall_clock(nano: Checkpoint) -> Iterator[tuple[LocalBackend, str]]:
    backend = LocalBackend(nano, "nano", 1, nano.config.engine.model_copy(update={"clock": "wall"}))
    with serving(build_app(backend, ServeSettings(stream_interval=0))) as address:
        yield backend, address
    backend.close()


def test_every_request_of_a_plan_ends_once_and_the_log_says_the_same_text_again(
    nano: Checkpoint, nano_address: str, prompts: list[str], tmp_path: Path
) -> None:
    lines: list[str] = []
    said: dict[str, str] = {}
    for prompt in prompts:
        body = {"model": "nano", "prompt": prompt, "stream": True, "crsm": {"events": True, "log": True, "trees": True}}
        events = payloads(httpx.post(f"{nano_address}/v1/completions", json=body, timeout=60).text)
        log = [line for event in events for line in event["crsm"]["log"]]
        told = [each for event in events for each in event["crsm"]["events"]]
        asked = [each["request"] for each in told if each["type"] == "crsm.request"]
        ended = [each["request"] for each in told if each["type"] in ("crsm.inject", "crsm.reject")]
        assert len(asked) == len(set(asked)) and len(ended) == len(set(ended)) and set(ended) <= set(asked)
        injected = [token["position"] - 1 for event in events for token in event["crsm"]["tokens"] if token["injected"]]
        written = [each["position"] for each in told if each["type"] == "crsm.inject" and any(each["alpha"])]
        # The token that ends an answer is not among those of the text.
        assert injected == written[: len(injected)] and len(written) - len(injected) <= 1
        said[json.loads(log[0])["generation"]] = streamed(events)
        lines += log
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join(lines) + "\n")
    for logged in read_log(file):
        engine = Engine(nano, injection_source=lambda _, position, logged=logged: logged.injections.get(position))  # type: ignore[misc]
        (again,) = engine.generate_all([GenerationRequest(logged.prompt, logged.sampling, logged.deliberation)])
        assert again == logged.tokens and logged.injections
        assert nano.tokenizer.decode(again[:-1]) == said[logged.generation_id]


def test_system_1_alone_asks_for_no_plan(nano_address: str, prompts: list[str]) -> None:
    body = {"model": "nano", "prompt": prompts[0], "crsm": {"events": True, "channel": "off", "injection_rate": 0}}
    (note,) = httpx.post(f"{nano_address}/v1/completions", json=body, timeout=60).json()["crsm"]["choices"]
    assert note["events"] == [] == note["injections"]


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_frees_the_slots_of_the_engine(
    wall_clock: tuple[LocalBackend, str], prompts: list[str], stream: bool
) -> None:
    backend, address = wall_clock

    def speaking() -> int:
        counts = asyncio.run(backend.metrics())["generations"]
        return int(counts["speaking"] + counts["reading"] + counts["waiting"])

    body = {"model": "nano", "prompt": prompts[0], "stream": stream, "n": 3, "crsm": {"pace": 0.5}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json=body, timeout=1.5)
    wait_until(lambda: speaking() == 0)


def test_a_pace_is_kept_through_the_stream(wall_clock: tuple[LocalBackend, str], prompts: list[str]) -> None:
    body = {"model": "nano", "prompt": prompts[0], "stream": True, "crsm": {"pace": 20, "events": True}}
    events = payloads(httpx.post(f"{wall_clock[1]}/v1/completions", json=body, timeout=60).text)
    times = [event["crsm"]["t"] for event in events if event["crsm"]["tokens"]]
    tokens = sum(len(event["crsm"]["tokens"]) for event in events)
    # Not faster; how much slower, the machine decides.
    assert times == sorted(times) and times[-1] - times[0] >= (tokens - 2) / 20
