"""Speed of the search: simulations a second beside mctx with the same network, and what one deliberation takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crsm.config import SearchConfig
from crsm.data.sequences import encode_answer, encode_prompt
from crsm.devices import CPU, device_of
from crsm.evaluation.compute import costs
from crsm.latent_dynamics import ExactDynamics, Snapshot, WorldModel, take_snapshot
from crsm.model import CRSM, Checkpoint, load_checkpoint
from crsm.reasoning import Deliberator
from crsm.tasks import build_task
from crsm.tasks.base import problems as draw
from crsm.types import PlanRequest
from jobs.speed.peers.mctx import MctxPeer
from jobs.speed.peers.process import PeerError
from jobs.speed.roofline import Roofline
from jobs.speed.rows import Row, make_row
from jobs.speed.shapes import SMALL, TINY, Shape, build
from jobs.speed.timing import interleave, median, percentile, rates, timed

if TYPE_CHECKING:
    from jobs.command import Progress

TOLERANCE = 1e-3
"""Largest difference between the two networks, logits and values, before the comparison is called one of unlike ones:
fp32 sums in another order."""


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison with mctx."""

    shape: Shape
    width: int
    """G"""
    trees: int
    simulations: int = 64
    num_actions: int = 16
    """A of ours; mctx expands all V."""

    @property
    def name(self) -> str:
        trees = "1 tree" if self.trees == 1 else f"{self.trees} trees"
        return (
            f"search, {trees}, {self.simulations} simulations, V = {self.shape.vocab_size}, top "
            f"{min(self.num_actions, self.shape.vocab_size)}"
        )


CASES = (
    Case(SMALL, 256, 1),
    Case(SMALL, 256, 64),
    Case(replace(SMALL, vocab_size=32), 256, 16),
)
QUICK_CASES = (Case(TINY, 16, 1, simulations=4, num_actions=4), Case(TINY, 16, 3, simulations=4, num_actions=4))


def search_rows(
    roofline: Roofline, *, seed: int, peer_python: str, checkpoint: str, progress: Progress, quick: bool = False
) -> list[Row]:
    """All rows of ``benchmark_speed search``."""
    rows: list[Row] = []
    cases = QUICK_CASES if quick else CASES
    jobs: list[Callable[[], list[Row]]] = [partial(_compare, case, roofline, seed, peer_python) for case in cases]
    loaded = load_checkpoint(checkpoint)
    jobs.append(lambda: _latency(loaded, roofline, seed, 10 if quick else 200))
    jobs.append(lambda: _several_leaves(loaded, roofline, seed, quick))
    for trees in (1, 3) if quick else (1, 16):
        jobs.append(partial(_exact, loaded, roofline, seed, trees, 4 if quick else 128))
    for number, job in enumerate(jobs):
        progress.update(number)
        roofline.measure_gemm()
        rows += job()
    progress.update(len(jobs))
    return rows


# ------------------------------------------------------------------------------------------------------- beside mctx


def _compare(case: Case, roofline: Roofline, seed: int, python: str) -> list[Row]:
    model = build(case.shape, seed, width=case.width)
    settings = SearchConfig(
        policy="puct",
        q_transform="minmax",  # mctx's
        simulations=case.simulations,
        num_actions=min(case.num_actions, case.shape.vocab_size),
        max_depth=case.simulations,
    )
    deliberator = Deliberator(model, settings, plan_length=4, terminal_tokens=())
    snapshot, token_B = random_roots(model, case.trees, seed)
    requests = requests_of(snapshot, token_B, case.simulations)
    total = case.trees * case.simulations
    candidates = {"ours": timed(lambda: deliberator.look_ahead(requests, lag=0, hypotheses=1))}
    figures: dict[str, Any] = {"trees": case.trees, "simulations": case.simulations}
    note = None
    with ExitStack() as stack:
        try:
            peer = stack.enter_context(MctxPeer(python, model, roofline.threads))
            figures["peer_versions"] = peer.versions
            difference = network_difference(model, peer, snapshot, seed)
            figures["network_difference"] = difference
            if not difference <= TOLERANCE:
                raise PeerError(f"its network differs from ours by {difference:.2g}; allowed: {TOLERANCE}")
            note = f"mctx expands all {case.shape.vocab_size} actions; the two networks differ by {difference:.1e}"
            peer.prepare(snapshot, token_B, case.simulations, case.simulations)
            candidates["peer"] = peer.search
        except PeerError as error:
            candidates.pop("peer", None)
            note = f"without mctx: {error}"
        seconds = interleave(candidates, repeats=5 if case.trees > 1 else 9, warm_up=2)
    multiply_adds, weight_bytes = network_cost(model)
    row = make_row(
        case.name,
        "simulations/s",
        roofline.threads,
        rates(seconds["ours"], total),
        peer_name="mctx",
        peer=rates(seconds.get("peer", ()), total),
        limit=roofline.products_per_second(multiply_adds, weight_bytes, case.trees),
        limit_by="the network's matrix products and reads",
        note=note,
        **figures,
    )
    return [row]


def network_difference(model: CRSM, peer: MctxPeer, snapshot: Snapshot, seed: int, steps: int = 3) -> float:
    """Largest difference of logits and consensus values between our network and the peer's, along some tokens."""
    vocabulary = model.config.model.backbone.vocab_size
    batch = len(snapshot.hidden_BLD)
    tokens_BT = np.random.default_rng(seed).integers(vocabulary, size=(batch, steps))
    logits_BTV, values_BT = peer.advance(snapshot, tokens_BT)
    worst = 0.0
    with torch.inference_mode():
        latent = model.world_model.begin(snapshot)
        for position in range(steps):
            latent, hidden_BLD = model.world_model.advance(latent, snapshot, torch.from_numpy(tokens_BT[:, position]))
            mine_BV = model.logits(hidden_BLD).numpy()
            mine_B = model.critic.consensus(model.critic(hidden_BLD)).numpy()
            worst = max(worst, float(np.abs(mine_BV - logits_BTV[:, position]).max()))
            worst = max(worst, float(np.abs(mine_B - values_BT[:, position]).max()))
    return worst


def network_cost(model: CRSM) -> tuple[float, float]:
    """Multiply-adds of one simulation (the world model's step, the memory reads, the head), and bytes of weights."""
    world, backbone = model.world_model, model.config.model.backbone
    layers = (world.query, world.read, world.decoder_linear, world.decoder_in, world.decoder_out, model.lm_head)
    weights = sum(layer.weight.numel() for layer in layers)
    weights += world.cell.weight_ih.numel() + world.cell.weight_hh.numel()
    memory = len(world.read_layers) * backbone.d_inner * backbone.d_state
    return float(weights + memory), 4.0 * weights


def random_roots(
    model: CRSM, count: int, seed: int, length: int = 24, world_model: WorldModel | None = None
) -> tuple[Snapshot, np.ndarray]:
    """Snapshots after random prompts for a world model (None: the latent one), on the CPU, and the token that follows
    each."""
    vocabulary = model.config.model.backbone.vocab_size
    tokens_BT = np.random.default_rng(seed).integers(vocabulary, size=(count, length + 1))
    with torch.inference_mode():
        _, hidden_BLD, state = model.prefill(torch.from_numpy(tokens_BT[:, :-1]).to(device_of(model)))
        return take_snapshot(hidden_BLD, state, world_model or model.world_model).on(CPU), tokens_BT[:, -1]


def requests_of(snapshot: Snapshot, token_B: np.ndarray, simulations: int) -> list[PlanRequest]:
    """A synchronous plan request (lag 0) for every root."""
    return [
        PlanRequest(
            request_id=row,
            generation_id=f"speed-{row}",
            position=24,
            target=24,
            token=int(token_B[row]),
            hidden_LD=snapshot.hidden_BLD[row].numpy(),
            ssm_LHPN=snapshot.memory_BMHPN[row].numpy(),
            conv_LCK=None if snapshot.conv_BLCK is None else snapshot.conv_BLCK[row].numpy(),
            simulations=simulations,
            seed=row,
        )
        for row in range(len(token_B))
    ]


# ----------------------------------------------------------------------------------------------------------- latency


def _latency(checkpoint: Checkpoint, roofline: Roofline, seed: int, repeats: int) -> list[Row]:
    """One deliberation at a time, projection and writing included: what stands between a request and its plan."""
    model = checkpoint.model
    deliberator = Deliberator.from_checkpoint(checkpoint)
    simulations = 64
    snapshot, token_B = random_roots(model, 16, seed)
    requests = requests_of(snapshot, token_B, simulations)
    turn = 0

    def deliberate() -> None:
        nonlocal turn
        turn += 1
        deliberator([requests[turn % len(requests)]])

    milliseconds = [1e3 * value for value in interleave({"ours": timed(deliberate)}, repeats, warm_up=5)["ours"]]
    multiply_adds, weight_bytes = network_cost(model)
    fastest = 1e3 * simulations / roofline.products_per_second(multiply_adds, weight_bytes)
    return [
        make_row(
            f"deliberation, shipped checkpoint, 1 tree, {simulations} simulations, memory reads",
            "ms",
            roofline.threads,
            milliseconds,
            limit=fastest,
            limit_by="the network's matrix products and reads",
            higher_is_better=False,
            note=f"95th percentile {percentile(milliseconds, 0.95):.3g} ms",
            percentile_95=percentile(milliseconds, 0.95),
        )
    ]


# ----------------------------------------------------------------------------------------------------------- exact


def _exact(checkpoint: Checkpoint, roofline: Roofline, seed: int, trees: int, simulations: int) -> list[Row]:
    """The backbone as its own world model: branches of the snapshot's state in C++, a state a node in PyTorch."""
    model = checkpoint.model
    exact = ExactDynamics(model.backbone)
    requests = requests_of(*random_roots(model, trees, seed, world_model=exact), simulations)
    searches = {
        engine: Deliberator.from_checkpoint(checkpoint, world_model=exact, engine=engine)
        for engine in ("native", "python")
    }
    seconds = interleave(
        {engine: timed(partial(made.look_ahead, requests, 0, 1)) for engine, made in searches.items()},
        repeats=5,
        warm_up=1,
    )
    backbone = costs(model).backbone + costs(model).policy
    sizes = model.config.model.backbone
    # A branch reads the state of its snapshot once, where a state of its own is decayed, added to and read.
    saved = 2 * sizes.n_layer * sizes.d_inner * sizes.d_state
    weights = sum(parameter.numel() for parameter in model.backbone.parameters())
    count = "1 tree" if trees == 1 else f"{trees} trees"
    return [
        make_row(
            f"search, shipped checkpoint, exact world model, {count}, {simulations} simulations",
            "simulations/s",
            roofline.threads,
            rates(seconds["native"], trees * simulations),
            peer_name="PyTorch, a state a node",
            peer=rates(seconds["python"], trees * simulations),
            limit=roofline.products_per_second(backbone - saved, 4.0 * weights, trees),
            limit_by="the backbone's matrix products and reads",
        )
    ]


# ----------------------------------------------------------------------------------------------------- several leaves


def _several_leaves(checkpoint: Checkpoint, roofline: Roofline, seed: int, quick: bool) -> list[Row]:
    """What evaluating several leaves of a tree together brings in speed, and costs in right plans."""
    requests, answers = decision_requests(checkpoint, seed, 4 if quick else 256)
    rows = []
    one = Deliberator.from_checkpoint(checkpoint)
    base = right_plans(one, requests, answers)
    for leaves in (4, 8):
        settings = one.config.model_copy(update={"leaves": leaves, "virtual_loss": 1})
        several = Deliberator.from_checkpoint(checkpoint, search=settings)
        name = f"search, shipped checkpoint, 1 tree, {leaves} leaves in flight"
        try:
            right = right_plans(several, requests, answers)
        except ValueError as error:
            rows.append(make_row(name, "simulations/s", roofline.threads, (), note=f"not offered: {error}"))
            continue
        together = {key: timed(partial(made, requests[:1])) for key, made in (("one", one), ("several", several))}
        seconds = interleave(together, repeats=5 if quick else 30, warm_up=3)
        simulations = requests[0].simulations
        speed, alone = (rates(seconds[key], simulations) for key in ("several", "one"))
        gain = (median(speed) or 0.0) / (median(alone) or 1.0)
        rows.append(
            make_row(
                name,
                "simulations/s",
                roofline.threads,
                speed,
                note=f"{gain:.2f} × one leaf; plans wholly right: {right:.3f}, with one leaf {base:.3f}",
                over_one_leaf=gain,
                right_plans=right,
                right_plans_with_one_leaf=base,
                problems=len(requests),
            )
        )
    return rows


def decision_requests(checkpoint: Checkpoint, seed: int, count: int) -> tuple[list[PlanRequest], list[list[int]]]:
    """Requests just before the first decision of fresh problems of the checkpoint's first task, and the right answers
    from there on."""
    task = build_task(checkpoint.config.tasks[0])
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    requests, answers = [], []
    for number, problem in enumerate(draw(task, seed, "test", count)):
        answer = [*encode_answer(problem.solution, tokenizer), tokenizer.verdict_id(True)]
        decision = max(1, task.decision_positions(problem)[0])
        before = [*encode_prompt(problem, tokenizer), *answer[: decision - 1]]
        with torch.inference_mode():
            _, hidden_BLD, state = model.prefill(torch.tensor([before]))
            snapshot = take_snapshot(hidden_BLD, state, model.world_model)
        (request,) = requests_of(snapshot, np.array([answer[decision - 1]]), 64)
        requests.append(replace(request, request_id=number, seed=number))
        answers.append(answer[decision:])
    return requests, answers


def right_plans(deliberator: Deliberator, requests: list[PlanRequest], answers: list[list[int]]) -> float:
    """Share of plans whose line is, from its first to its last token, the right answer's."""
    plans = deliberator(requests)
    right = [
        len(plan.line) > 0 and list(plan.line) == answer[: len(plan.line)]
        for plan, answer in zip(plans, answers, strict=True)
    ]
    return float(np.mean(right))
