"""Both systems on one device: simulations a second at many trees, and what System 2 costs System 1 that shares it.

The trees of a search are C++ on the CPU, the network is on the device, and a wave of leaves crosses once each way. On a
GPU the peer of a search is the native core on the CPU of the same machine. ``ours`` of decoding is System 2 on,
``peer`` is off, and ``ratio`` is on over off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig, SearchConfig
from crsm.data.sequences import encode_prompt
from crsm.devices import pick_device
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.model import Checkpoint, load_checkpoint
from crsm.placement import placed
from crsm.planners import ThreadPlanners
from crsm.reasoning import Deliberator
from crsm.tasks import build_tasks
from jobs.speed.nonblocking_speed import random_checkpoint
from jobs.speed.rows import Row, make_row
from jobs.speed.search_speed import network_cost, random_roots, requests_of
from jobs.speed.shapes import PUBLIC_130M, SMALL, TINY, Shape, build
from jobs.speed.timing import interleave, percentile, rates, synchronized, timed

if TYPE_CHECKING:
    from jobs.command import Progress
    from jobs.speed.roofline import Roofline

SEARCH_BAR = 100_000
"""Simulations a second at 256 trees."""
DECODE_BAR = 0.95
"""Of the rate without System 2."""
OFF = "System 2 off"


@dataclass(frozen=True, slots=True)
class Search:
    shape: Shape
    trees: int
    width: int = 256
    """G"""
    leaves: int = 1
    simulations: int = 64
    num_actions: int = 16
    read_layers: tuple[int, ...] | None = None
    beside_cpu: bool = True
    bar: int | None = None
    repeats: int = 7

    @property
    def name(self) -> str:
        trees = "1 tree" if self.trees == 1 else f"{self.trees} trees"
        leaves = "" if self.leaves == 1 else f", {self.leaves} leaves in flight"
        return f"search {self.shape.name}, {trees}, {self.simulations} simulations{leaves}"


@dataclass(frozen=True, slots=True)
class Decode:
    shape: Shape | None
    """None: the checkpoint."""
    streams: int
    tokens: int
    repeats: int = 5
    bar: float | None = DECODE_BAR


_READS = (5, 11, 17, 23)
"""Of the 130m shape, as in configs/baseline_170m.yaml."""
LARGE = replace(PUBLIC_130M, name="130m layers")
"""With the vocabulary of the shipped checkpoint."""

SEARCHES = (
    Search(SMALL, 256, bar=SEARCH_BAR),
    Search(SMALL, 64),
    Search(SMALL, 64, leaves=4),
    Search(SMALL, 1),
    Search(SMALL, 1, leaves=8),
    Search(PUBLIC_130M, 256, width=512, num_actions=8, read_layers=_READS, beside_cpu=False, repeats=5),
)
DECODES = (Decode(LARGE, 1, 256), Decode(LARGE, 64, 128), Decode(None, 1, 512), Decode(None, 64, 128))
QUICK_SEARCHES = (
    Search(TINY, 3, width=16, simulations=4, num_actions=4, bar=SEARCH_BAR, repeats=1),
    Search(TINY, 2, width=16, simulations=4, num_actions=4, leaves=2, repeats=1),
)
QUICK_DECODES = (Decode(replace(TINY, n_layer=15), 2, 8, repeats=1), Decode(None, 2, 8, repeats=1))


def device_rows(
    roofline: Roofline, *, seed: int, checkpoint: str, progress: Progress, quick: bool = False
) -> list[Row]:
    """All rows of ``benchmark_speed device``."""
    loaded = load_checkpoint(checkpoint)
    jobs = [partial(_search, case, roofline, seed) for case in (QUICK_SEARCHES if quick else SEARCHES)]
    jobs += [partial(_latency, loaded, roofline, seed, 3 if quick else 100)]
    jobs += [partial(_decode, case, loaded, roofline, seed) for case in (QUICK_DECODES if quick else DECODES)]
    rows = []
    for number, job in enumerate(jobs):
        progress.update(number)
        rows.append(job())
    progress.update(len(jobs))
    return rows


# ------------------------------------------------------------------------------------------------------------- search


def _search(case: Search, roofline: Roofline, seed: int) -> Row:
    def candidate(device: str) -> Any:
        model = build(case.shape, seed, width=case.width, device=device, read_layers=case.read_layers)
        settings = SearchConfig(
            policy="puct",
            simulations=case.simulations,
            num_actions=min(case.num_actions, case.shape.vocab_size),
            max_depth=case.simulations,
            leaves=case.leaves,
            virtual_loss=1,
        )
        # On the CPU the benchmark is of what serves there too: the native network.
        deliberator = Deliberator(model, settings, plan_length=4, terminal_tokens=())
        requests = requests_of(*random_roots(model, case.trees, seed), case.simulations)
        run = synchronized(lambda: deliberator.look_ahead(requests, lag=0, hypotheses=1), device)
        return timed(run), network_cost(model)

    ours, (multiply_adds, weight_bytes) = candidate(roofline.device)
    candidates = {"ours": ours}
    on_gpu = roofline.device == "cuda"
    if on_gpu and case.beside_cpu:
        candidates["peer"], _ = candidate("cpu")
    seconds = interleave(candidates, case.repeats, warm_up=2)
    total = case.trees * case.simulations
    return make_row(
        case.name + (", one GPU" if on_gpu else ""),
        "simulations/s",
        roofline.threads,
        rates(seconds["ours"], total),
        peer_name="the native core on the CPU" if "peer" in candidates else None,
        peer=rates(seconds.get("peer", ()), total),
        limit=roofline.products_per_second(multiply_adds, weight_bytes, case.trees * case.leaves),
        limit_by="the network's matrix products and reads",
        note=None if case.bar is None else f"the bar is {case.bar:,}",
        trees=case.trees,
        leaves=case.leaves,
        bar=case.bar,
    )


def _latency(checkpoint: Checkpoint, roofline: Roofline, seed: int, repeats: int) -> Row:
    """One deliberation at a time, from the request on the host to the plan on the host."""
    there = placed(checkpoint, pick_device(roofline.device))
    deliberator = Deliberator.from_checkpoint(there, device=roofline.device)  # type: ignore[arg-type]
    requests = requests_of(*random_roots(there.model, 16, seed), 64)
    turn = 0

    def deliberate() -> None:
        nonlocal turn
        turn += 1
        deliberator([requests[turn % len(requests)]])

    milliseconds = [1e3 * value for value in interleave({"ours": timed(deliberate)}, repeats, warm_up=3)["ours"]]
    tail = percentile(milliseconds, 0.95)
    name = f"deliberation, {checkpoint.config.name}, 1 tree, 64 simulations"
    return make_row(
        name,
        "ms",
        roofline.threads,
        milliseconds,
        higher_is_better=False,
        note=f"95th percentile {tail:.3g} ms",
        percentile_95=tail,
    )


# ------------------------------------------------------------------------------------------------------------- decode


def _decode(case: Decode, loaded: Checkpoint, roofline: Roofline, seed: int) -> Row:
    checkpoint = loaded if case.shape is None else random_checkpoint(case.shape, seed)
    there = placed(checkpoint, pick_device(roofline.device))
    requests = _requests(case, checkpoint, seed)
    with _engine(there, roofline.device, planners=False) as off, _engine(there, roofline.device, planners=True) as on:
        seconds = interleave(
            {name: timed(partial(_say, engine, requests)) for name, engine in (("on", on), ("off", off))}, case.repeats
        )
        figures = on.metrics.summary()
    total = case.streams * case.tokens
    streams = "1 stream" if case.streams == 1 else f"{case.streams} streams"
    hit = figures["plan_hit_rate"]
    return make_row(
        f"decode {checkpoint.config.name}, {streams}, System 2 on",
        "tokens/s",
        roofline.threads,
        rates(seconds["on"], total),
        peer_name=OFF,
        peer=rates(seconds["off"], total),
        note=f"{figures['requests']:,} requests, {figures['injections']:,} plans written, hit rate "
        f"{'none' if hit is None else f'{hit:.3f}'}" + ("" if case.bar is None else f"; the bar is {case.bar} ×"),
        bar=case.bar,
        requests=figures["requests"],
        injections=figures["injections"],
        plan_hit_rate=hit,
        outcomes=figures["outcomes"],
    )


@contextmanager
def _engine(there: Checkpoint, device: str, planners: bool) -> Iterator[Engine]:
    """An engine by the wall clock; planners in a thread of this process share its device and its weights."""
    config = EngineConfig.model_validate({"clock": "wall", "wire": "bf16", "device": device})
    if not planners:
        yield Engine(there, None, config)
        return
    threads = ThreadPlanners(Deliberator.from_checkpoint(there), 1, max_in_flight=2)
    try:
        yield Engine(there, threads, config)
    finally:
        threads.close()


def _requests(case: Decode, checkpoint: Checkpoint, seed: int) -> list[GenerationRequest]:
    """Fresh problems of the first task, a plan every 4 tokens."""
    task = build_tasks(checkpoint.config.tasks)[0]
    deliberation: DeliberationConfig = checkpoint.config.deliberation.model_copy(update={"lag": 2, "plan_every": 4})
    return [
        GenerationRequest(
            tuple(encode_prompt(task.generate(seed, "test", index), checkpoint.tokenizer)),
            SamplingConfig(max_tokens=case.tokens, ignore_eos=True),
            deliberation,
            checkpoint.config.search.simulations,
            str(index),
        )
        for index in range(case.streams)
    ]


def _say(engine: Engine, requests: list[GenerationRequest]) -> None:
    said = sum(1 for _ in engine.generate(requests))
    assert said == sum(request.sampling.max_tokens for request in requests), "every token, once"
