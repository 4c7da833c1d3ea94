"""Speed of training: forward, backward and AdamW step, beside the libraries that a user would train with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.mamba_ssm import Mixer
from jobs.speed.peers import mamba_ssm, transformers
from jobs.speed.peers.process import PeerError
from jobs.speed.roofline import Roofline
from jobs.speed.rows import Row, make_row
from jobs.speed.shapes import NANO, PUBLIC_130M, SMALL, TINY, Shape, build
from jobs.speed.timing import Candidate, interleave, rates, synchronized, timed

if TYPE_CHECKING:
    from crsm.model import CRSM
    from jobs.command import Progress

FLOPS_PER_PARAMETER = 6
"""Of a token in training: 2 forward, 4 backward, per parameter of a dense layer (arXiv 2001.08361). The limit counts
nothing else: not the recurrence, not the optimizer."""
Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    shape: Shape
    batch: int
    length: int
    peer: bool = True
    repeats: int = 5

    @property
    def tokens(self) -> int:
        return self.batch * self.length


CASES = (
    Case(SMALL, 32, 128, repeats=7),
    Case(NANO, 64, 64, peer=False, repeats=11),
    Case(PUBLIC_130M, 1, 512),
)
QUICK_CASES = (Case(TINY, 2, 12), Case(TINY, 2, 12, peer=False))
GPU_CASE = Case(PUBLIC_130M, 64, 1024, repeats=10)
"""Half as many sequences, and half of that, until both models have room."""
QUICK_GPU_CASE = Case(replace(SMALL, name="small on a GPU"), 2, 128)


def train_rows(roofline: Roofline, *, seed: int, progress: Progress, quick: bool = False) -> list[Row]:
    """All rows of ``benchmark_speed train`` for the roofline's device."""
    if roofline.device == "cuda":
        return [_gpu_row(QUICK_GPU_CASE if quick else GPU_CASE, roofline, seed)]
    rows = []
    cases = QUICK_CASES if quick else CASES
    for number, case in enumerate(cases):
        progress.update(number)
        roofline.measure_gemm()
        rows.append(_cpu_row(case, roofline, seed))
    progress.update(len(cases))
    return rows


def _cpu_row(case: Case, roofline: Roofline, seed: int) -> Row:
    tokens_BT = random_tokens(case, seed)
    model = build(case.shape, seed, planners=False)
    steps = {"ours": training_step(trainable(model), lambda: our_loss(model, tokens_BT))}
    note, figures = None, sizes_of(case)
    with ExitStack() as stack:
        peer = None
        if case.peer:
            try:
                theirs = transformers.TransformersPeer(stack, case.shape, seed, roofline.threads)
                found = theirs.prepare("train", tokens_BT)
                figures["peer_versions"] = {"transformers": transformers.version(), "torch": torch.__version__}
                default = case.tokens / found["default"]
                figures |= {"peer_chunk_size": found["chunk"], "peer_at_default_chunk": default}
                note = (
                    f"transformers with chunks of {found['chunk']}, its fastest; "
                    f"with its default, 256, {default:,.0f} tokens/s"
                )
                peer = theirs.run
            except PeerError as error:
                note = f"without transformers: {error}"
        return _row(case, roofline, steps, "transformers" if case.peer else None, note, figures, peer)


def _gpu_row(case: Case, roofline: Roofline, seed: int) -> Row:
    """bf16 autocast beside mamba-ssm."""
    while True:
        try:
            return _gpu_row_of(case, roofline, seed)
        except torch.cuda.OutOfMemoryError:
            if case.batch == 1:
                raise
        # Only here, where no traceback holds on to the tensors any more, can their memory be given back.
        torch.cuda.empty_cache()
        case = replace(case, batch=case.batch // 2)


def _gpu_row_of(case: Case, roofline: Roofline, seed: int) -> Row:
    tokens_BT = random_tokens(case, seed).cuda()
    model = build(case.shape, seed, device="cuda", planners=False)
    steps = {"ours": training_step(trainable(model), lambda: our_loss(model, tokens_BT), autocast=True)}
    note, figures = None, sizes_of(case)
    figures["kernels"] = kernels_of(model)
    try:
        theirs = mamba_ssm.build(case.shape, seed).train()
        steps["peer"] = training_step(
            list(theirs.parameters()), lambda: mamba_ssm.loss(theirs, tokens_BT), autocast=True
        )
    except PeerError as error:
        note = f"without mamba_ssm: {error}"
    return _row(case, roofline, steps, "mamba_ssm", note, figures)


def _row(
    case: Case,
    roofline: Roofline,
    steps: dict[str, Step],
    peer_name: str | None,
    note: str | None,
    figures: dict[str, Any],
    peer: Candidate | None = None,
) -> Row:
    """``steps`` run in this process; ``peer`` is one that times itself elsewhere."""
    candidates = {name: timed(synchronized(step, roofline.device)) for name, step in steps.items()}
    if peer is not None:
        candidates["peer"] = peer
    seconds = interleave(candidates, case.repeats, warm_up=1 if roofline.device == "cpu" else 3)
    where = "fp32" if roofline.device == "cpu" else "bf16 autocast, one GPU"
    return make_row(
        f"train {case.shape.name}, {case.batch} × {case.length}, {where}",
        "tokens/s",
        roofline.threads,
        rates(seconds["ours"], case.tokens),
        peer_name=peer_name,
        peer=rates(seconds.get("peer", ()), case.tokens),
        limit=tokens_per_second_at(roofline.gemm_gflops, case.shape.parameters),
        limit_by=f"matrix products: FLOP/s over {FLOPS_PER_PARAMETER} · {case.shape.parameters / 1e6:.2f} M parameters",
        note=note,
        **figures,
    )


def tokens_per_second_at(gflops: float, parameters: int) -> float:
    """Tokens a second if training were matrix products alone: GFLOP/s over 6 · parameters, the tied embedding once."""
    return gflops * 1e9 / (FLOPS_PER_PARAMETER * parameters)


def training_step(parameters: list[torch.nn.Parameter], loss: Callable[[], Tensor], *, autocast: bool = False) -> Step:
    """Forward, backward, AdamW; the same for everyone."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def trainable(model: CRSM) -> list[torch.nn.Parameter]:
    """System 1: backbone, head and fusion, made to require gradients."""
    model.train()
    parts = (model.backbone, model.lm_head, model.fusion)
    found = {id(p): p for part in parts for p in part.parameters()}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return list(found.values())


def our_loss(model: CRSM, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, by the fused head that stage 1 trains."""
    hidden_BTLD, _ = model.backbone(tokens_BT)
    logits_BTV = model.logits(hidden_BTLD[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def sizes_of(case: Case) -> dict[str, Any]:
    return {"batch": case.batch, "length": case.length, "parameters": case.shape.parameters}


def random_tokens(case: Case, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(case.shape.vocab_size, (case.batch, case.length), generator=generator)


def kernels_of(model: CRSM) -> str:
    """Name of the kernels that a model runs on."""
    return str(next(module.kernels.NAME for module in model.modules() if isinstance(module, Mixer)))
