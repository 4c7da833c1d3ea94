"""What several tests build on: a tiny random checkpoint, hand-made plans, and planners that do as they are told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from crsm.config import (
    BackboneConfig,
    Config,
    DeliberationConfig,
    ModelConfig,
    PathStarConfig,
    SamplingConfig,
    SearchConfig,
    WorldModelConfig,
    WriterConfig,
)
from crsm.data import Tokenizer, build_tokenizer
from crsm.injection import head_norms
from crsm.mamba_ssm import Backbone, Layer
from crsm.model import Checkpoint, build_model
from crsm.planners import Arrivals
from crsm.tasks import build_task
from crsm.types import ModelState, Plan, PlanRequest

TASK = PathStarConfig(arms=2, length=3, labels=8, preamble=2)
PROMPT = (7, 9, 22, 24, 5, 26)
"""Some tokens of the tiny vocabulary."""


def tiny_config(
    *, n_layer: int = 2, kind: Literal["latent", "exact"] = "latent", rank: int = 1, tied: bool = False, **changes: Any
) -> Config:
    backbone = BackboneConfig(d_model=16, n_layer=n_layer, d_state=8, headdim=8, chunk_size=8, tie_embeddings=tied)
    return Config(
        name="tiny",
        model=ModelConfig(
            backbone=backbone,
            world_model=WorldModelConfig(kind=kind, width=24, decoder_width=32),
            writer=WriterConfig(width=16, rank=rank),
        ),
        tasks=(TASK,),
        search=SearchConfig(simulations=8, num_actions=4, max_depth=4),
        deliberation=DeliberationConfig(lag=1, plan_length=3),
        **changes,
    )


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return build_tokenizer(tiny_config().tokenizer, [build_task(TASK)])


def tiny_checkpoint(config: Config | None = None, *, seed: int = 4, calibrated: bool = True) -> Checkpoint:
    """Random weights with opinions: large embeddings, outputs and writes, and a long memory. Terminal tokens have logit
    0, so that greedy decoding never ends by itself. ``calibrated``: gates that open for any plan, wider in the last
    layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        model = build_model(config or tiny_config(), tokenizer)
        with torch.no_grad():
            model.backbone.embedding.weight.normal_(std=0.7)
            model.lm_head.weight.normal_(std=0.7)
            model.lm_head.weight[list(tokenizer.terminal_ids)] = 0.0
            for layer in layers_of(model.backbone):
                layer.mixer.out_proj.weight *= 4.0
                layer.mixer.in_proj.weight *= 2.0
            for read_out in (model.writer.u, model.writer.b):
                read_out.weight *= 8.0
                read_out.bias.normal_()
    if calibrated:
        layers = model.config.model.backbone.n_layer
        model.gate.calibrate(torch.full((layers,), 0.1), torch.linspace(1.0, 2.0, layers), -10.0)
    return Checkpoint(model.eval().requires_grad_(False), tokenizer, model_version=3, weights_hash="0123456789abcdef")


@functools.cache
def tiny_bpe() -> Tokenizer:
    """A byte-level BPE of few entries."""
    return Tokenizer.train_bpe(["Question: which of these is the sound of rain?\nAnswer: 12 drops, 3 of them"] * 9, 300)


def text_checkpoint(tokenizer: Tokenizer | None = None, *, vocab_size: int = 0, seed: int = 4) -> Checkpoint:
    """Like :func:`tiny_checkpoint`, but it writes open text, and may end it. ``vocab_size``: rows of the embedding, if
    more than tokens."""
    tokenizer = tokenizer or tiny_bpe()
    config = tiny_config(sampling=SamplingConfig(max_tokens=12))
    sizes = config.model.backbone.model_copy(update={"vocab_size": vocab_size})
    config = config.model_copy(update={"model": config.model.model_copy(update={"backbone": sizes})})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config, tokenizer)
        with torch.no_grad():
            model.backbone.embedding.weight.normal_(std=0.7)
            model.lm_head.weight.normal_(std=0.7)
            for layer in layers_of(model.backbone):
                layer.mixer.out_proj.weight *= 4.0
                layer.mixer.in_proj.weight *= 2.0
            for read_out in (model.writer.u, model.writer.b):
                read_out.weight *= 8.0
                read_out.bias.normal_()
    layers = model.config.model.backbone.n_layer
    model.gate.calibrate(torch.full((layers,), 0.1), torch.linspace(1.0, 2.0, layers), -10.0)
    return Checkpoint(model.eval().requires_grad_(False), tokenizer, model_version=3, weights_hash="0123456789abcdef")


def layers_of(backbone: Backbone) -> list[Layer]:
    return [cast(Layer, layer) for layer in backbone.layers]


def random_state(checkpoint: Checkpoint, tokens: Sequence[int] = PROMPT) -> ModelState:
    """A state that the model can really be in."""
    with torch.inference_mode():
        return checkpoint.model.backbone(torch.tensor([tokens]))[1]


def make_plan(
    request: PlanRequest,
    checkpoint: Checkpoint,
    *,
    assumed: tuple[int, ...] = (),
    line: tuple[int, ...] = (21, 22),
    confidence: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
    **changes: Any,
) -> Plan:
    """A well-formed plan for a request, with a random write."""
    sizes, rank = checkpoint.config.model.backbone, checkpoint.config.model.writer.rank
    rng = np.random.default_rng([seed, request.target])
    layers = sizes.n_layer
    fields: dict[str, Any] = {
        "request_id": request.request_id,
        "generation_id": request.generation_id,
        "position": request.position,
        "target": request.target,
        "assumed": assumed,
        "line": line,
        "value_root_L": np.full(layers, 0.5, np.float32),
        "value_plan_L": np.full(layers, 0.9, np.float32),
        "uncertainty": 0.0,
        "confidence_L": np.full(layers, confidence, np.float32),
        "write_u_LRE": (scale * rng.normal(size=(layers, rank, sizes.d_inner))).astype(np.float32),
        "write_b_LRN": rng.normal(size=(layers, rank, sizes.d_state)).astype(np.float32),
        "policy_tokens_A": np.array([20, 21], np.int64),
        "policy_probs_A": np.array([0.25, 0.75], np.float32),
        "simulations": 5,
        "planner_id": "by hand",
        "model_version": request.model_version,
    }
    return Plan(**(fields | changes))


def a_request(
    *, request_id: int = 0, generation_id: str = "g", position: int = 6, lag: int = 0, version: int = 3
) -> PlanRequest:
    """An address for a hand-made plan; its snapshot is empty."""
    nothing = np.zeros(0, np.float32)
    return PlanRequest(request_id, generation_id, position, position + lag, 0, nothing, nothing, model_version=version)


Answer = Callable[[PlanRequest], list[Plan]]


class FakePlanners:
    """Answers every request with hand-made plans, at once or after some polls; an answer of None is a loss."""

    def __init__(
        self,
        answer: Callable[[PlanRequest], list[Plan] | None],
        delay: Callable[[PlanRequest], Sequence[int]] = lambda request: (0,),
        *,
        eager: bool = False,
    ) -> None:
        """
        Args:
            answer: plans for a request; None: it is lost; an empty list: silence.
            delay: after how many polls the answer comes, one entry for each time that it comes.
            eager: who waits for some answers gets all others as well.
        """
        self._eager = eager
        self.requests: list[PlanRequest] = []
        self.waits: list[tuple[int, ...]] = []
        self._answer, self._delay = answer, delay
        self._coming: list[tuple[int, PlanRequest, list[Plan] | None]] = []
        self._polls = 0

    def submit(self, requests: Sequence[PlanRequest]) -> None:
        self.requests += requests
        for request in requests:
            for polls in self._delay(request):
                self._coming.append((self._polls + polls, request, self._answer(request)))

    def room(self) -> int | None:
        return None

    def soonest(self) -> float:
        return 0.0

    def poll(self) -> Arrivals:
        self._polls += 1
        ready = [item for item in self._coming if item[0] < self._polls]
        self._coming = [item for item in self._coming if item[0] >= self._polls]
        plans = [plan for _, _, answer in ready if answer is not None for plan in answer]
        return Arrivals(plans, [request for _, request, answer in ready if answer is None])

    def wait(self, request_ids: Collection[int]) -> Arrivals:
        self.waits.append(tuple(request_ids))
        ready = [item for item in self._coming if self._eager or item[1].request_id in request_ids]
        self._coming = [item for item in self._coming if item not in ready]
        plans = [plan for _, _, answer in ready if answer is not None for plan in answer]
        return Arrivals(plans, [request for _, request, answer in ready if answer is None])

    def close(self) -> None:
        self._coming.clear()


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def norms(state: ModelState) -> Tensor:
    """Norm of every head of every layer (L, B, H)."""
    return torch.stack([head_norms(layer.ssm_BHPN) for layer in state.layers])


def assert_same_state(one: ModelState, other: ModelState) -> None:
    """Bit for bit."""
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.conv_BCK, theirs.conv_BCK)
        assert torch.equal(mine.ssm_BHPN, theirs.ssm_BHPN)
