"""What HTTP costs: the served application beside its own engine, under load, and beside clients that misbehave.

``ours`` is the application through HTTP, ``peer`` the same settings through the generator actor alone, in the same run.
The generator has a core of its own; replica, proxy, Ray's daemons and the client share the others. Loopback only.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.long_lived import freeze_memory
from actors.service_args import MOST_OPEN, PROXY_MARGIN, SERVE_ENVIRONMENT, ServiceArgs
from crsm.config import EngineConfig, SamplingConfig
from crsm.data.sequences import encode_prompt
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint, load_checkpoint
from crsm.tasks import build_tasks
from jobs.speed.actor_rig import Load, Rig
from jobs.speed.http_load import HOST, Answer, Asked, Client, Spoken, read, read_slowly
from jobs.speed.pinned_ray import pin
from jobs.speed.rows import Row, make_row
from jobs.speed.timing import percentile

if TYPE_CHECKING:
    from jobs.command import Progress

OWN = "its own engine"
APPLICATION = "crsm"
PACE = 50.0
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25)
"""Arrivals over those that saturate the server."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    streams: int = 16
    unpaced_tokens: int = 2000
    paced_tokens: int = 1000
    repeats: int = 3
    rounds: int = 12
    """Answers of each stream, one after the other, for the time to first token."""
    answer: int = 100
    """Tokens of such an answer, and of those that arrive by themselves."""
    crowd: int = 64
    too_many: int = 256
    places: int = 128
    """Generations that the server lets in; fewer than the greatest crowd."""
    crowd_tokens: int = 200
    profile_seconds: float = 10.0
    half_open: int = 200


QUICK = Sizes(2, 30, 10, 1, 2, 5, 4, 8, 4, 10, 0.5, 5)


def serve_rows(core: int | None, *, seed: int, progress: Progress, quick: bool = False) -> list[Row]:
    """All rows of ``benchmark_speed serve``.

    Args:
        core: for the generator; None: whatever there is.
        quick: tiny loads: whether it runs.
    """
    sizes = QUICK if quick else Sizes()
    nano = load_checkpoint("nano")
    task = build_tasks(nano.config.tasks)[0]
    prompts = [
        tuple(encode_prompt(task.generate(seed, "test", index), nano.tokenizer)) for index in range(sizes.streams)
    ]
    with _served(sizes, core) as port:
        bench = Bench(Client(port, nano.config.name), port, nano, prompts, sizes, seed)
        rig = Rig(nano, 0, core, engine=EngineConfig(clock="wall"))
        rows: list[Row] = []
        try:
            asyncio.run(bench.client.together([Asked(prompt, 5) for prompt in prompts]))  # warm-up
            for measure in (bench.unpaced, bench.paced):
                rows += measure(rig)
                progress.update(len(rows))
        finally:
            rig.close()
        for rest in (bench.first_tokens, bench.crowds, bench.profile, bench.misbehaviour):
            rows += rest()
            progress.update(len(rows))
    return rows


@contextmanager
def _served(sizes: Sizes, core: int | None) -> Iterator[int]:
    """The application on a free port of the Ray that runs, with its generator on its core."""
    from ray import serve

    from actors.service import application

    args = ServiceArgs(
        planners=0,
        replica_cpus=0.0,
        generator_cpus=0.5,
        set=("sampling.ignore_eos=true",),
        drain_seconds=5.0,
        server=ServiceArgs().server.model_copy(update={"max_concurrent": sizes.places, "max_n": 1}),
    )
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(http_options={"host": HOST, "port": port}, logging_config=quiet)
    serve.run(application(args), name=APPLICATION)
    try:
        if core is not None:
            found = serve.get_app_handle(APPLICATION).metrics.remote().result(timeout_s=30)
            pin(found["pid"], [core])
        yield port
    finally:
        serve.shutdown()


@contextmanager
def serve_environment() -> Iterator[None]:
    """What a cluster that is started meanwhile needs to serve."""
    # Before: it is not for this process, whose handles have no event loop to share. Serve looks when it is imported.
    import ray.serve  # noqa: F401

    environment = {**SERVE_ENVIRONMENT, MOST_OPEN: str(Sizes().places + PROXY_MARGIN)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Bench:
    """The measurements."""

    def __init__(
        self,
        client: Client,
        port: int,
        checkpoint: Checkpoint,
        prompts: Sequence[tuple[int, ...]],
        sizes: Sizes,
        seed: int,
    ) -> None:
        self.client, self._port, self._checkpoint, self._prompts = client, port, checkpoint, prompts
        self._sizes, self._seed = sizes, seed
        longest = max(sizes.unpaced_tokens, sizes.paced_tokens)
        self._said = _engine_says(checkpoint, prompts, longest)

    def _check(self, answers: Sequence[Answer], asked: Sequence[Asked]) -> dict[str, Any]:
        """Lost tokens, garbled streams, and answers by what they were."""
        spoken = [read(answer) if answer.status == 200 else Spoken("", 0, True) for answer in answers]
        lost = sum(
            max(0, mine.tokens - said.tokens)
            for mine, said, answer in zip(asked, spoken, answers, strict=True)
            if answer.status == 200
        )
        garbled = 0
        for mine, said, answer in zip(asked, spoken, answers, strict=True):
            tokens = self._said[self._prompts.index(mine.prompt)][: mine.tokens]
            right = said.text.strip() == self._checkpoint.tokenizer.decode(tokens)
            garbled += answer.status == 200 and not (said.whole and right)
        statuses = Counter(answer.status for answer in answers)
        return {
            "lost_tokens": lost,
            "garbled_streams": garbled,
            "answers_429": statuses[429],
            "answers_5xx": sum(count for status, count in statuses.items() if status >= 500),
            "unanswered": statuses[0],
        }

    # ---------------------------------------------------------------- beside the engine

    def unpaced(self, rig: Rig) -> list[Row]:
        return [self._beside_the_engine(rig, "as fast as it goes", self._sizes.unpaced_tokens, None)]

    def paced(self, rig: Rig) -> list[Row]:
        return [self._beside_the_engine(rig, f"at {PACE:g} tokens/s", self._sizes.paced_tokens, PACE)]

    def _beside_the_engine(self, rig: Rig, name: str, tokens: int, pace: float | None) -> Row:
        deliberation = self._checkpoint.config.deliberation
        load = Load(self._prompts, tokens, deliberation, self._checkpoint.config.search.simulations, pace)
        asked = [Asked(prompt, tokens, pace) for prompt in self._prompts]
        ours, own = [], []
        faults: dict[str, Any] = {}
        for _ in range(self._sizes.repeats):
            own.append(rig.run(load).tokens_per_second)
            answers = asyncio.run(self.client.together(asked))
            found = self._check(answers, asked)
            faults = {name: faults.get(name, 0) + count for name, count in found.items()}
            said = sum(read(answer).tokens for answer in answers)
            ours.append(said / (max(a.ended for a in answers) - min(a.sent for a in answers)))
        note = _faults(faults)
        label = f"{len(asked)} streams {name}"
        return make_row(label, "tokens/s", 1, ours, peer_name=OWN, peer=own, note=note, **faults)

    def first_tokens(self) -> list[Row]:
        sizes = self._sizes
        asked = [Asked(prompt, sizes.unpaced_tokens) for prompt in self._prompts]
        freeze_memory()  # the client's pauses are not the server's
        answers = asyncio.run(self.client.by_turns(asked, sizes.rounds, spread=1.0))
        times = _milliseconds(answer.first_token for answer in answers if answer.first)
        faults = self._check(answers, [mine for mine in asked for _ in range(sizes.rounds)])
        return [
            make_row(
                f"{len(asked)} streams of {sizes.unpaced_tokens:,} tokens, as fast as it goes: first token, {name}",
                "ms",
                1,
                [percentile(times, share)],
                note=_faults(faults),
                **faults,
            )
            for name, share in (("p50", 0.5), ("p95", 0.95))
        ]

    # ---------------------------------------------------------------- under load

    def crowds(self) -> list[Row]:
        """Every token of every stream, also of those that have to come again."""
        return [asyncio.run(self._crowd(self._sizes.crowd)), asyncio.run(self._crowd(self._sizes.too_many))]

    async def _crowd(self, count: int) -> Row:
        sizes = self._sizes
        asked = [
            Asked(self._prompts[index % len(self._prompts)], sizes.crowd_tokens, events=True) for index in range(count)
        ]
        began = time.perf_counter()
        found = await asyncio.gather(*(self.client.ask_until_served(mine, 60.0) for mine in asked))
        seconds = time.perf_counter() - began
        answers = [answer for answer, _ in found]
        faults = self._check(answers, asked)
        turned_away = sum(times for _, times in found)
        said = sum(read(answer).tokens for answer in answers)
        return make_row(
            f"{count} streams at once, {sizes.places} places",
            "tokens/s",
            1,
            [said / seconds],
            note=f"{_faults(faults)}; turned away and served later {turned_away} times",
            turned_away=turned_away,
            **faults,
        )

    def profile(self) -> list[Row]:
        """Arrivals by chance, up to more than the server can bear."""
        sizes = self._sizes
        asked = [Asked(prompt, sizes.answer) for prompt in self._prompts]
        crowd = [asked[index % len(asked)] for index in range(max(sizes.crowd // 2, 2))]
        began = time.perf_counter()
        answers = asyncio.run(self.client.by_turns(crowd, 4))
        saturation = len(answers) / (time.perf_counter() - began)
        rows = [make_row(f"answers of {sizes.answer} tokens, {len(crowd)} at a time", "answers/s", 1, [saturation])]
        for share in SHARES:
            rate = share * saturation
            began = time.perf_counter()
            answers = asyncio.run(self.client.arriving(asked, rate, sizes.profile_seconds, self._seed))
            seconds = time.perf_counter() - began
            mine = [asked[index % len(asked)] for index in range(len(answers))]
            faults = self._check(answers, mine)
            served = [answer for answer in answers if answer.status == 200 and answer.first]
            times = _milliseconds(answer.first_token for answer in served)
            rows.append(
                make_row(
                    f"arrivals at {share:.0%} of that: first token, p95",
                    "ms",
                    1,
                    [percentile(times, 0.95)] if times else [],
                    note=(
                        f"p50 {percentile(times, 0.5) if times else float('nan'):.0f} ms, "
                        f"{sizes.answer * len(served) / seconds:,.0f} tokens/s, {_faults(faults)}"
                    ),
                    arrivals_per_second=rate,
                    arrivals=len(answers),
                    p50_ms=percentile(times, 0.5) if times else None,
                    tokens_per_second=sizes.answer * len(served) / seconds,
                    **faults,
                )
            )
        return rows

    # ---------------------------------------------------------------- beside others

    def misbehaviour(self) -> list[Row]:
        """What others feel of a client that reads a byte a second and of connections on which nothing more is said."""
        return [asyncio.run(self._misbehaviour())]

    async def _misbehaviour(self) -> Row:
        sizes = self._sizes
        asked = [Asked(prompt, sizes.answer, PACE) for prompt in self._prompts]
        slow = Asked(self._prompts[0], sizes.unpaced_tokens, events=True)

        async def p95() -> float:
            answers = await self.client.by_turns(asked, max(2, sizes.rounds // 4))
            return percentile(_milliseconds(answer.ended - answer.sent for answer in answers), 0.95)

        quiet, beside = [], []
        for _ in range(sizes.repeats):
            quiet.append(await p95())
            stop = asyncio.Event()
            reader = asyncio.create_task(read_slowly(self._port, slow.encode(self._checkpoint.config.name), stop))
            open_ = await self.client.half_open(sizes.half_open // 2, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
            waiting = asked[0].encode(self._checkpoint.config.name)[:-1]
            open_ += await self.client.half_open(sizes.half_open - len(open_), waiting)
            beside.append(await p95())
            stop.set()
            await reader
            for writer in open_:
                writer.close()
        return make_row(
            f"{len(asked)} streams at {PACE:g} tokens/s: whole answer, p95, beside a slow client and "
            f"{sizes.half_open} half-open connections",
            "ms",
            1,
            beside,
            peer_name="without them",
            peer=quiet,
            higher_is_better=False,
        )


def _engine_says(checkpoint: Checkpoint, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[list[int]]:
    """What the model says to these, by an engine of this process."""
    engine, sampling = Engine(checkpoint), SamplingConfig(max_tokens=tokens, ignore_eos=True)
    deliberation = checkpoint.config.deliberation
    requests = [
        GenerationRequest(prompt, sampling, deliberation, generation_id=str(index))
        for index, prompt in enumerate(prompts)
    ]
    said: dict[str, list[int]] = {request.generation_id: [] for request in requests}
    for token in engine.generate(requests):
        said[token.generation_id].append(token.token)
    return [said[request.generation_id] for request in requests]


def _milliseconds(seconds: Any) -> list[float]:
    return [1e3 * value for value in seconds]


def _faults(found: Any) -> str:
    return (
        f"lost {found['lost_tokens']}, garbled {found['garbled_streams']}, 429 {found['answers_429']}, "
        f"5xx {found['answers_5xx']}, unanswered {found['unanswered']}"
    )
