"""The Serve application on a local Ray, through its HTTP: OpenAI's client, faults, updates, clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve

from actors.service import _listening_host, application
from actors.service_args import SERVE_ENVIRONMENT, ServiceArgs
from actors.serving.settings import ServeSettings
from crsm.config import DeliberationConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint, save_checkpoint
from tests.actors.helpers import until
from tests.actors.http_streams import HANG, Heard, disturbed, listen, request, together
from tests.fixtures import PROMPT, tiny_checkpoint

pytestmark = pytest.mark.ray

HOST = "127.0.0.1"
PROMPTS = tuple((7 + i % 8, 9, 22, 24, 5 + i % 3, 26) for i in range(16))


@dataclass(frozen=True, slots=True)
class Service:
    port: int
    args: ServiceArgs
    checkpoint: Checkpoint

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def deploy(self, **changes: Any) -> None:
        """Rolls out a new version, and returns when it runs."""
        serve.run(application(self.args.model_copy(update=changes)), name="crsm")

    def metrics(self) -> dict[str, Any]:
        """Of the generator; waits while it is away."""
        until_answered: list[dict[str, Any]] = []

        def answered() -> bool:
            with contextlib.suppress(Exception):
                until_answered.append(serve.get_app_handle("crsm").metrics.remote().result(timeout_s=5))
            return bool(until_answered)

        until(answered, 60)
        return until_answered[0]

    def until_ready(self) -> None:
        """Nobody hangs while there is no replica: the proxy says so."""
        until(lambda: httpx.get(f"{self.url}/readyz", timeout=2 * HANG).status_code == 200, 60)

    def said_alone(self, prompt: tuple[int, ...], sampling: SamplingConfig) -> list[int]:
        """What an engine says by itself."""
        off = DeliberationConfig(max_plans=None, injection_rate=0.0)
        engine = Engine(self.checkpoint)
        return [token.token for token in engine.generate([GenerationRequest(prompt, sampling, off)])]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from actors.cluster import start_ray

    checkpoint = tiny_checkpoint()
    folder = tmp_path_factory.mktemp("service") / "tiny"
    save_checkpoint(checkpoint, folder)
    args = ServiceArgs(
        checkpoint=str(folder),
        planners=1,
        replica_cpus=0.0,
        generator_cpus=0.5,
        set=("planners.num_cpus=0.5", "deliberation.max_lag=4"),
        drain_seconds=60.0,
        server=ServeSettings(max_concurrent=64, max_tokens=10_000),
    )
    before = {name: os.environ.get(name) for name in SERVE_ENVIRONMENT}
    os.environ.update(SERVE_ENVIRONMENT)
    try:
        with start_ray("local", num_cpus=16):
            found = Service(free_port(), args, checkpoint)
            serve.start(http_options={"host": HOST, "port": found.port}, logging_config={"enable_access_log": False})
            found.deploy()
            yield found
            serve.shutdown()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=30, max_retries=0)


def test_openais_client_completes_and_streams_what_the_engine_says(service: Service, client: openai.OpenAI) -> None:
    wanted = service.said_alone(PROMPT, SamplingConfig(max_tokens=12))
    text = service.checkpoint.tokenizer.decode(wanted)
    off = {"crsm": {"channel": "off"}}
    whole = client.completions.create(model="tiny", prompt=list(PROMPT), max_tokens=12, extra_body=off)
    assert whole.choices[0].text.strip() == text and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    stream = client.completions.create(
        model="tiny",
        prompt=list(PROMPT),
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=off,
    )
    *chunks, usage = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert usage.usage is not None and usage.usage.total_tokens == len(PROMPT) + 12
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_chat_is_answered_whole_and_as_a_stream(service: Service, client: openai.OpenAI) -> None:
    words = service.checkpoint.tokenizer.decode(PROMPT)
    messages: Any = [{"role": "user", "content": words}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=3, temperature=0)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, seed=3, temperature=0, stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said and len(said.split()) == len((whole.choices[0].message.content or "").split()) == 8


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="another", prompt=list(PROMPT))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt=list(PROMPT), max_tokens=10**6)


def test_a_state_is_kept_forked_and_gone_on_from(service: Service, client: openai.OpenAI) -> None:
    off = {"channel": "off"}
    wanted = service.said_alone(PROMPT, SamplingConfig(max_tokens=10))
    first = together([listen(service.url, request(PROMPT, 4, save_state=True, **off))])[0]
    forked = httpx.post(f"{service.url}/v1/states/{first.crsm['state']}/fork", timeout=30).json()
    for state in (first.crsm["state"], forked["id"]):
        rest = together([listen(service.url, request((), 6, state=state, **off))])[0]
        assert [token["id"] for token in first.tokens + rest.tokens] == wanted
    assert httpx.delete(f"{service.url}/v1/states/{forked['id']}", timeout=30).status_code == 200
    assert httpx.get(f"{service.url}/v1/states/{forked['id']}", timeout=30).status_code == 404


def test_sixteen_streams_at_a_time_say_what_each_would_say_alone(service: Service) -> None:
    samplings = [SamplingConfig(max_tokens=60, temperature=0.8 * (i % 2), seed=i) for i in range(16)]
    bodies = [
        request(prompt, 60, channel="off") | {"seed": sampling.seed, "temperature": sampling.temperature}
        for prompt, sampling in zip(PROMPTS, samplings, strict=True)
    ]
    heard = together([listen(service.url, body) for body in bodies])
    for prompt, sampling, stream in zip(PROMPTS, samplings, heard, strict=True):
        wanted = service.said_alone(prompt, sampling)
        if stream.finish == "stop":  # the token that ends an answer is not part of its text
            assert wanted.pop() in service.checkpoint.tokenizer.terminal_ids
        assert [token["id"] for token in stream.tokens] == wanted and stream.done
        stream.check_order(prompt)


def test_a_client_that_leaves_has_its_generation_cancelled(service: Service) -> None:
    async def leave() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(listen(service.url, request(PROMPT, 10_000, pace=50), begun.set))
        await asyncio.wait_for(begun.wait(), 30)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    until(lambda: service.metrics()["generations"] == {**service.metrics()["generations"], "speaking": 0}, 10)


def test_a_planner_that_is_killed_costs_no_stream_a_token(service: Service) -> None:
    pids = service.metrics()["pool"]["pids"]
    heard = disturbed(
        service.url,
        [request(prompt, 60, pace=40) for prompt in PROMPTS[:8]],
        lambda: [os.kill(pid, signal.SIGKILL) for pid in pids],
    )
    for prompt, stream in zip(PROMPTS, heard, strict=False):
        stream.check_whole(prompt, 60)
    until(lambda: service.metrics()["pool"]["planners"].get("ready") == 1, 60)


def test_a_generator_that_is_killed_ends_its_streams_with_an_error_and_is_back(service: Service) -> None:
    found = service.metrics()
    heard = disturbed(
        service.url,
        [request(prompt, 2000, pace=40) for prompt in PROMPTS[:8]],
        lambda: os.kill(found["pid"], signal.SIGKILL),
    )
    for prompt, stream in zip(PROMPTS, heard, strict=False):
        stream.check_ended(prompt, 2000)
        assert stream.error is not None and stream.error["code"] == "generation_failed"
    service.until_ready()
    assert service.metrics()["replica_pid"] == found["replica_pid"], "the replica lives on"
    together([listen(service.url, request(PROMPT, 10))])[0].check_whole(PROMPT, 10)


def test_a_replica_that_is_killed_ends_its_streams_with_an_error_and_costs_no_state(service: Service) -> None:
    kept = together([listen(service.url, request(PROMPT, 4, save_state=True, channel="off"))])[0]
    heard = disturbed(
        service.url,
        [request(prompt, 2000, pace=40) for prompt in PROMPTS[:8]],
        lambda: os.kill(service.metrics()["replica_pid"], signal.SIGKILL),
    )
    for prompt, stream in zip(PROMPTS, heard, strict=False):
        stream.check_ended(prompt, 2000)
        assert stream.error is not None and stream.error["code"] == "replica_gone"
    service.until_ready()
    rest = together([listen(service.url, request((), 6, state=kept.crsm["state"], channel="off"))])[0]
    wanted = service.said_alone(PROMPT, SamplingConfig(max_tokens=10))
    assert [token["id"] for token in kept.tokens + rest.tokens] == wanted


def test_an_update_rolls_without_dropping_a_stream_turning_anybody_away_or_losing_a_state(service: Service) -> None:
    kept = together([listen(service.url, request(PROMPT, 4, save_state=True, channel="off"))])[0]
    old = service.metrics()["replica_pid"]
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.1):
            statuses.append(
                httpx.post(
                    f"{service.url}/v1/completions",
                    json={"model": "tiny", "prompt": list(PROMPT), "max_tokens": 2},
                    timeout=30,
                ).status_code
            )

    others = threading.Thread(target=ask)
    others.start()
    try:
        # Long enough to be under way when the new replica takes over, and when the old one is told to end.
        heard = disturbed(
            service.url, [request(prompt, 400, pace=25) for prompt in PROMPTS[:4]], lambda: service.deploy(threads=2)
        )
    finally:
        stop.set()
        others.join()
    for prompt, stream in zip(PROMPTS, heard, strict=False):
        stream.check_whole(prompt, 400)
    assert set(statuses) == {200} and len(statuses) > 10
    until(lambda: not is_alive(old), 60)
    rest = together([listen(service.url, request((), 6, state=kept.crsm["state"], channel="off"))])[0]
    assert [token["id"] for token in kept.tokens + rest.tokens] == service.said_alone(
        PROMPT, SamplingConfig(max_tokens=10)
    )


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def connections(port: int, count: int, text: bytes) -> Iterator[list[socket.socket]]:
    """Connections on which somebody said this and then nothing."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(stack.enter_context(socket.create_connection((HOST, port), timeout=10)))
            opened[-1].sendall(text)
        yield opened


def test_others_are_served_beside_a_slow_reader_and_half_open_connections(service: Service) -> None:
    body = b'{"model":"tiny","prompt":[7,9,22],"max_tokens":9000,"stream":true,"crsm":{"events":true}}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with (
        connections(service.port, 1, head % len(body) + body) as (slow,),
        connections(service.port, 100, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le"),
        connections(service.port, 100, head % 50 + b'{"model'),
    ):
        assert slow.recv(1) == b"H"  # and then it sleeps
        for stream, prompt in zip(
            together([listen(service.url, request(prompt, 40)) for prompt in PROMPTS]), PROMPTS, strict=True
        ):
            stream.check_whole(prompt, 40)
        assert slow.recv(1) == b"T"
    until(lambda: sum(service.metrics()["generations"].values()) == 0, 20)


def test_who_is_one_too_many_is_told_when_to_come_again(service: Service) -> None:
    async def run() -> list[Heard]:
        return list(await asyncio.gather(*(listen(service.url, request(PROMPT, 50, pace=25)) for _ in range(100))))

    heard = asyncio.run(run())
    refused = [stream for stream in heard if stream.status == 429]
    assert refused and all(stream.error is not None for stream in refused)
    served = [stream for stream in heard if stream.status == 200]
    assert len(served) + len(refused) == 100 and len(served) >= service.args.server.max_concurrent
    for stream in served:
        stream.check_whole(PROMPT, 50)


def test_prometheus_finds_the_metrics(service: Service) -> None:
    together([listen(service.url, request(PROMPT, 20))])
    endpoint = f"http://{ray.nodes()[0]['NodeManagerAddress']}:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    def exported() -> bool:
        found = httpx.get(endpoint, timeout=10).text
        names = (
            "ray_crsm_tokens_total",
            'path="/v1/completions"',
            "ray_crsm_first_token_seconds_bucket",
            "ray_crsm_inter_token_seconds_bucket",
            "ray_crsm_plan_outcomes_total",
            "ray_crsm_planners_ready",
            "ray_crsm_planner_utilisation",
            "ray_crsm_generations_running",
        )
        return all(name in found for name in names) and 'application="crsm"' in found

    until(exported, 60)


def test_a_replica_knows_where_the_proxies_listen(service: Service) -> None:
    """So that it refuses to stand open, whatever a config file says."""
    assert _listening_host() == HOST


def test_an_application_that_is_deleted_ends_with_its_generator(service: Service) -> None:
    """The last test of this file."""
    found = service.metrics()
    serve.delete("crsm")
    until(lambda: not is_alive(found["pid"]) and not is_alive(found["replica_pid"]), 30)
    answer = httpx.get(f"{service.url}/v1/models", timeout=HANG)
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
