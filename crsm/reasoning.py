"""One deliberation: project forward, search, write.

From the snapshot of one position a planner (1) rolls its world model over the known token and then over its own
predictions up to the target, recording what it assumes; (2) searches from there; (3) turns the principal variation
into a plan: a low-rank write for every layer with its gate, values, and the root's visit distribution.

Letters: B requests, F = B · hypotheses projected futures (the trees), L layers, A actions, S node slots.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crsm import native
from crsm.config import DeviceName, SearchConfig
from crsm.devices import device_of, index_on, own_stream, rows_to_host, to_device, to_host
from crsm.latent_dynamics import ExactDynamics, Latent, LatentDynamics, Snapshot, WorldModel
from crsm.model import CRSM, Checkpoint
from crsm.native import exact as native_exact
from crsm.native import latent as native_latent
from crsm.native.exact import ExactNetwork
from crsm.native.latent import LatentNetwork
from crsm.placement import settled
from crsm.search import Evaluation, Evaluator, SearchSummary, Tree, export_tree, search, sketch_tree, summarize
from crsm.search.engines import Engine
from crsm.search.native import NativeEvaluator
from crsm.types import Plan, PlanRequest
from crsm.wire import from_wire, is_finite, is_wire, request_shapes, to_wire, wire_of


class Future(NamedTuple):
    """Projected futures of a batch, F = B · hypotheses, the futures of a request neighbouring."""

    latent: Latent
    """Empty if the native core imagines with the backbone: it keeps what tells the futures apart to itself."""
    hidden_FLD: Tensor
    """Imagined residual stream at the target."""
    snapshot: Snapshot
    """What each future was imagined from; a row per request if the native core computes."""
    assumed_FT: Tensor
    """Assumed tokens between request and target (F, lag)."""


class NetworkEvaluator:
    """The search's view of world model, fused policy head and critics, over F trees.

    Latents are kept per (tree, node slot) in preallocated tensors: ``slots`` × the size of a latent, per tree. They
    stay on the device of the model: a wave of all trees takes three rows of numbers there (four, with several leaves of
    a tree), brings one evaluation back by one copy, and waits once.

    A terminal token (a verdict, the end of the text) takes over the value of the position it ends: it claims an outcome
    and does not change it, and a search must not raise its value by claiming.
    """

    def __init__(
        self,
        model: CRSM,
        world_model: WorldModel,
        future: Future,
        num_actions: int,
        slots: int,
        terminal_tokens: Iterable[int],
    ) -> None:
        self._model, self._world_model, self._future = model, world_model, future
        self._device = future.hidden_FLD.device
        self._terminal = index_on(sorted(terminal_tokens), self._device)
        # One slot more than nodes, for what trees that rest have computed along.
        self._spare = slots
        self._values = future.hidden_FLD.new_empty(len(future.hidden_FLD), slots + 1, future.hidden_FLD.shape[1])
        self._num_actions = min(num_actions, model.lm_head.weight.shape[0])
        self._rows = torch.arange(len(future.hidden_FLD), device=self._device)
        self._store = tuple(part.new_empty(part.shape[0], slots + 1, *part.shape[1:]) for part in future.latent)

    @property
    def num_trees(self) -> int:
        return len(self._rows)

    @property
    def num_actions(self) -> int:
        return self._num_actions

    @property
    def num_layers(self) -> int:
        return int(self._future.hidden_FLD.shape[1])

    def root(self) -> Evaluation:
        for store, part in zip(self._store, self._future.latent, strict=True):
            store[:, Tree.ROOT] = part
        self._values[:, Tree.ROOT] = self._model.critic(self._future.hidden_FLD)
        return self._evaluation(self._future.hidden_FLD, self._values[:, Tree.ROOT])

    def expand(
        self, parent_B: np.ndarray, action_B: np.ndarray, node_B: np.ndarray, active_B: np.ndarray
    ) -> Evaluation:
        kept_B = np.where(active_B, node_B, self._spare)
        return self._expand(self._rows, self._future.snapshot, parent_B, action_B, kept_B)

    def expand_rows(
        self, tree_R: np.ndarray, parent_R: np.ndarray, action_R: np.ndarray, node_R: np.ndarray
    ) -> Evaluation:
        """Several leaves of a tree in one call, a row per leaf."""
        tree_F = index_on(tree_R.tolist(), self._device)
        return self._expand(tree_F, self._future.snapshot.rows(tree_F), parent_R, action_R, node_R)

    def _expand(
        self, tree_F: Tensor, snapshot: Snapshot, parent_R: np.ndarray, action_R: np.ndarray, node_R: np.ndarray
    ) -> Evaluation:
        parent_F, action_F, node_F = to_device(torch.from_numpy(np.stack([parent_R, action_R, node_R])), self._device)
        latent = tuple(store[tree_F, parent_F] for store in self._store)
        latent, hidden_FLD = self._world_model.advance(latent, snapshot, action_F)
        ends_F1 = torch.isin(action_F, self._terminal)[:, None]
        values_FL = torch.where(ends_F1, self._values[tree_F, parent_F], self._model.critic(hidden_FLD))
        for store, part in zip((*self._store, self._values), (*latent, values_FL), strict=True):
            store[tree_F, node_F] = part
        return self._evaluation(hidden_FLD, values_FL)

    def _evaluation(self, hidden_FLD: Tensor, values_FL: Tensor) -> Evaluation:
        best = self._model.logits(hidden_FLD).log_softmax(dim=-1).topk(self._num_actions, dim=-1)
        actions_FA, logits_FA, values_FL = rows_to_host(best.indices, best.values, values_FL)
        return Evaluation(actions_FA.numpy(), logits_FA.numpy(), values_FL.numpy().copy())


class Deliberator:
    """Answers plan requests, a batch at a time, where its model lies. Holds weights (packed ones too, if the native
    core computes) and settings, and no state between calls."""

    def __init__(
        self,
        model: CRSM,
        config: SearchConfig,
        *,
        plan_length: int,
        terminal_tokens: Iterable[int],
        trust_horizon: int | None = None,
        model_version: int = 0,
        forced_confidence: float | None = None,
        world_model: WorldModel | None = None,
        keep_tree: bool = False,
        planner_id: str = "",
        engine: Engine = "auto",
    ) -> None:
        """
        Args:
            model: System 1 and 2; used without gradients.
            config: settings of the search.
            plan_length: tokens of the principal variation that are written.
            terminal_tokens: tokens that end an answer.
            trust_horizon: imagined steps that a learned world model is good for; None: no cap.
            model_version: version of the weights, copied into the plans.
            forced_confidence: gate of every layer whatever the calibration says (ablations, roll-outs).
            world_model: None: the one that the model's settings name.
            keep_tree: put the search tree into the plans as plain data.
            planner_id: who plans, copied into the plans.
            engine: ``native``: projection, evaluations and search in C++, or an error; ``python``: nothing of it;
                ``auto``: what the native core can do, which is all for a model in float32 on the CPU.

        Raises:
            ValueError: ``engine`` is none of these, or ``native`` and the world model or its weights do not allow it.
            RuntimeError: ``engine`` is ``native`` and there is no native core.
        """
        if engine not in ("auto", "native", "python"):
            raise ValueError(f"engine = {engine!r}; allowed: auto, native, python")
        self.model, self.config, self.engine = model, config, engine
        self.plan_length, self.trust_horizon, self.model_version = plan_length, trust_horizon, model_version
        self.terminal_tokens = frozenset(terminal_tokens)
        self.forced_confidence, self.keep_tree, self.planner_id = forced_confidence, keep_tree, planner_id
        self.world_model = world_model or model.planning_model()
        self._packed: LatentNetwork | ExactNetwork | None = None
        if engine == "native":
            self._network()

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        search: SearchConfig | None = None,
        plan_length: int | None = None,
        forced_confidence: float | None = None,
        world_model: WorldModel | None = None,
        keep_tree: bool = False,
        planner_id: str = "",
        engine: Engine = "auto",
        device: DeviceName | None = None,
    ) -> Deliberator:
        """The deliberator that a checkpoint describes, with other settings where they are given.

        Raises:
            ValueError: a device that cannot be had, or on which the given world model does not lie.
        """
        checkpoint = settled(checkpoint, device or checkpoint.config.planners.device, "planners.device")
        weights = world_model.backbone if isinstance(world_model, ExactDynamics) else world_model
        if isinstance(weights, nn.Module) and device_of(weights) != device_of(checkpoint.model):
            raise ValueError(
                f"world_model on {device_of(weights)}, the model on {device_of(checkpoint.model)}; allowed: one of the "
                "model's device (crsm.placement.placed), or planners.device = 'cpu'"
            )
        return cls(
            checkpoint.model,
            search or checkpoint.config.search,
            plan_length=plan_length or checkpoint.config.deliberation.plan_length,
            terminal_tokens=checkpoint.tokenizer.terminal_ids,
            trust_horizon=checkpoint.trust_horizon,
            model_version=checkpoint.model_version,
            forced_confidence=forced_confidence,
            world_model=world_model,
            keep_tree=keep_tree,
            planner_id=planner_id,
            engine=engine,
        )

    @torch.inference_mode()
    def __call__(
        self,
        requests: Sequence[PlanRequest],
        clock: Callable[[], float] = time.monotonic,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Plan]:
        """Deliberates on a batch; ``hypotheses`` plans per request, in the order of the requests. Writes travel as the
        request's snapshot did: as fp32, or rounded to bf16.

        Raises:
            ValueError: a request's arrays do not have the shapes of this model, or hold NaN or infinity; the message
                names the request.
        """
        for request in requests:
            self._check(request)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[request.target - request.position, request.hypotheses].append(index)
        plans: dict[int, list[Plan]] = {}
        for (lag, hypotheses), indices in alike.items():
            group = [requests[index] for index in indices]
            with own_stream(self.device):
                made_for = self._plan(group, lag, hypotheses, clock, should_stop)
            for index, made in zip(indices, made_for, strict=True):
                plans[index] = made
        return [plan for index in range(len(requests)) for plan in plans[index]]

    @property
    def device(self) -> torch.device:
        """Where it computes: a search's trees stay on the CPU."""
        return device_of(self.model)

    def warm_up(self) -> None:
        """Deliberates once on an empty state: packs the weights, and has libraries allocate what they need."""
        arrays: dict[str, Any] = {
            name: np.zeros(array.shape, np.float32)
            for name, array in request_shapes(
                self.model.config.model, self.world_model.read_layers, conv=self.world_model.needs_conv
            ).items()
        }
        self([PlanRequest(0, "", 1, 2, 0, **arrays, simulations=self.config.simulations)])

    def _plan(
        self,
        requests: list[PlanRequest],
        lag: int,
        hypotheses: int,
        clock: Callable[[], float],
        should_stop: Callable[[], bool] | None,
    ) -> list[list[Plan]]:
        started = clock()
        future, tree = self.look_ahead(requests, lag, hypotheses, clock, should_stop)
        futures = len(future.hidden_FLD) // len(requests)
        summary = summarize(tree, max_length=min(self.plan_length, tree.max_depth))
        plans = self._write(requests, future, futures, summary, tree, clock() - started)
        return [plans[start : start + futures] for start in range(0, len(plans), futures)]

    @torch.inference_mode()
    def look_ahead(
        self,
        requests: list[PlanRequest],
        lag: int,
        hypotheses: int,
        clock: Callable[[], float] = time.monotonic,
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[Future, Tree]:
        """Projects and searches: all of a deliberation before it writes.

        Args:
            requests: well-formed ones, all of this lag and number of hypotheses.
            lag: tokens that are assumed.
            hypotheses: futures per request.

        Returns:
            The futures, those of a request neighbouring, and a tree for each.
        """
        budget = max(request.simulations for request in requests)
        future, evaluator = self._imagine(requests, lag, hypotheses, budget + 1)
        futures = len(future.hidden_FLD) // len(requests)
        budget_F = np.repeat([request.simulations for request in requests], futures)
        deadlines = [request.deadline for request in requests if request.deadline is not None]
        return future, search(
            evaluator,
            self.config,
            consensus_weights_L=self.model.critic.consensus_weights_L.cpu().numpy(),
            uncertainty_penalty=self.model.critic.uncertainty_penalty,
            terminal_tokens=sorted(self.terminal_tokens),
            max_depth=self._depth(lag),
            seed=np.repeat([request.seed for request in requests], futures),
            simulations=budget_F,
            deadline=min(deadlines, default=None),
            clock=clock,
            should_stop=should_stop,
            engine=self.engine,
        )

    def _imagine(
        self, requests: list[PlanRequest], lag: int, hypotheses: int, slots: int
    ) -> tuple[Future, Evaluator | NativeEvaluator]:
        """Projects, and makes what the search asks."""
        snapshot = stack_snapshots(requests)
        known_B = torch.tensor([request.token for request in requests])
        actions, network = self.config.num_actions, self._network()
        if network is None:
            snapshot, known_B = snapshot.on(self.device), to_device(known_B, self.device)
            future = project(self.model, self.world_model, snapshot, known_B, lag, hypotheses)
            evaluator = NetworkEvaluator(self.model, self.world_model, future, actions, slots, self.terminal_tokens)
            return future, evaluator
        if isinstance(network, ExactNetwork):
            assert snapshot.conv_BLCK is not None  # a request without them has been refused
            arrays = (snapshot.memory_BMHPN.numpy(), snapshot.conv_BLCK.numpy(), snapshot.hidden_BLD.numpy())
            ahead = network.project(*arrays, known_B.numpy(), lag, hypotheses)
            hidden_FLD, assumed_FT = torch.from_numpy(ahead.hidden_FLD), torch.from_numpy(ahead.assumed_FT)
            return Future((), hidden_FLD, snapshot, assumed_FT), network.evaluator(ahead, actions, self.terminal_tokens)
        memory = network.memory(snapshot.memory_BMHPN.numpy())
        found = network.project(memory, snapshot.hidden_BLD.numpy(), known_B.numpy(), lag, hypotheses)
        latent_FG, hidden_FLD, assumed_FT = map(torch.from_numpy, (found.latent_FG, found.hidden_FLD, found.assumed_FT))
        return Future((latent_FG,), hidden_FLD, snapshot, assumed_FT), network.evaluator(
            memory, found, actions, self.terminal_tokens
        )

    def _network(self) -> LatentNetwork | ExactNetwork | None:
        """The packed weights, made again when the model's have changed; None: Python computes."""
        if self.engine == "python" or (self.engine == "auto" and not native.available()):
            return None
        native.require()
        if self._packed is not None and self._is_current(self._packed):
            return self._packed
        self._packed, reason = self._pack()
        if reason and self.engine == "native":
            raise ValueError(
                f"engine = 'native', {reason}; allowed: a world model on this model's embedding or backbone, float32 "
                "on the cpu"
            )
        return self._packed

    def _is_current(self, packed: LatentNetwork | ExactNetwork) -> bool:
        model, world_model = self.model, self.world_model
        if isinstance(packed, LatentNetwork):
            return isinstance(world_model, LatentDynamics) and packed.is_current(model, world_model)
        return self._is_own_backbone() and packed.is_current(model)

    def _is_own_backbone(self) -> bool:
        return isinstance(self.world_model, ExactDynamics) and self.world_model.backbone is self.model.backbone

    def _pack(self) -> tuple[LatentNetwork | ExactNetwork | None, str]:
        """Packed weights, or why they cannot be."""
        model, world_model = self.model, self.world_model
        if isinstance(world_model, LatentDynamics) and world_model.embedding is model.backbone.embedding:
            reason = native_latent.unfit(model, world_model)
            return (None if reason else LatentNetwork.from_model(model, world_model)), reason
        if self._is_own_backbone():
            reason = native_exact.unfit(model)
            return (None if reason else ExactNetwork(model)), reason
        return None, f"world model = {type(world_model).__name__}"

    def _depth(self, lag: int) -> int:
        """Depth of the search: what is left of the trust horizon after the projection, at least one token. The backbone
        itself does not err, so nothing caps it."""
        if self.trust_horizon is None or isinstance(self.world_model, ExactDynamics):
            return self.config.max_depth
        return max(1, min(self.config.max_depth, self.trust_horizon - 1 - lag))

    def _write(
        self,
        requests: list[PlanRequest],
        future: Future,
        futures: int,
        summary: SearchSummary,
        tree: Tree,
        seconds: float,
    ) -> list[Plan]:
        length_F = summary.line_lengths_B
        rows = np.arange(len(length_F))
        device = self.device
        root_FL = to_device(torch.from_numpy(summary.root_raw_values_BL), device)
        last_FL = to_device(torch.from_numpy(summary.line_values_BDL[rows, np.maximum(length_F, 1) - 1]), device)
        critic = self.model.critic
        uncertainty_F = last_FL.std(dim=1, correction=0)
        gain_F = critic.consensus(last_FL) - critic.consensus(root_FL)
        confidence_FL = self.model.gate(last_FL - root_FL, uncertainty_F, gain_F, critic.uncertainty_penalty)
        if self.forced_confidence is not None:
            confidence_FL = torch.full_like(confidence_FL, self.forced_confidence)
        write = self.model.writer(
            to_device(torch.from_numpy(summary.line_tokens_BD).clamp_min(0), device),
            torch.from_numpy(np.maximum(length_F, 1)),
        )
        root_FL, last_FL, uncertainty_F, confidence_FL, assumed_FT, u_FLRE, b_FLRN = to_host(
            root_FL, last_FL, uncertainty_F, confidence_FL, future.assumed_FT, write.u_BLRE, write.b_BLRN
        )
        ended_F = torch.isin(assumed_FT, torch.tensor(sorted(self.terminal_tokens))).any(dim=1)
        ended_F |= torch.tensor([request.token in self.terminal_tokens for request in requests]).repeat_interleave(
            futures
        )
        # Nothing can follow the end of an answer, and an empty line says nothing.
        confidence_FL[ended_F | torch.from_numpy(length_F == 0)] = 0.0
        return [
            Plan(
                request_id=request.request_id,
                generation_id=request.generation_id,
                position=request.position,
                target=request.target,
                assumed=tuple(assumed_FT[row].tolist()),
                line=tuple(summary.line_tokens_BD[row, : length_F[row]].tolist()),
                value_root_L=root_FL[row].numpy().copy(),
                value_plan_L=last_FL[row].numpy().copy(),
                uncertainty=float(uncertainty_F[row]),
                confidence_L=confidence_FL[row].numpy().copy(),
                write_u_LRE=to_wire(u_FLRE[row].numpy().copy(), wire_of(request.hidden_LD)),
                write_b_LRN=to_wire(b_FLRN[row].numpy().copy(), wire_of(request.hidden_LD)),
                policy_tokens_A=summary.root_tokens_BA[row].copy(),
                policy_probs_A=summary.root_probs_BA[row].copy(),
                simulations=int(summary.num_simulations_B[row]),
                seconds=seconds,
                planner_id=self.planner_id,
                model_version=self.model_version,
                tree=export_tree(tree, row) if self.keep_tree else None,
                sketch_S6=sketch_tree(tree, row) if request.sketch else None,
            )
            for row, request in ((row, requests[row // futures]) for row in range(len(length_F)))
        ]

    def _check(self, request: PlanRequest) -> None:
        sizes = self.model.config.model.backbone
        state = (sizes.n_heads, sizes.headdim, sizes.d_state)
        want: dict[str, tuple[int, ...]] = {
            "hidden_LD": (sizes.n_layer, sizes.d_model),
            "ssm_LHPN": (len(self.world_model.read_layers), *state),
        }
        if self.world_model.needs_conv:
            want["conv_LCK"] = (sizes.n_layer, sizes.conv_channels, sizes.d_conv - 1)
        for name, shape in want.items():
            array = getattr(request, name)
            found = None if array is None else array.shape
            if found != shape:
                raise ValueError(f"request {request.request_id}: {name} has shape {found}; allowed: {shape}")
            if not is_wire(array):
                raise ValueError(
                    f"request {request.request_id}: {name} is {array.dtype}; allowed: float32, or bf16 as uint16"
                )
            if not is_finite(array):
                raise ValueError(f"request {request.request_id}: {name} holds NaN or infinity; allowed: finite numbers")
        if not 0 <= request.token < sizes.vocab_size:
            raise ValueError(
                f"request {request.request_id}: token = {request.token}; allowed: 0 to {sizes.vocab_size - 1}"
            )
        if request.target < request.position or request.hypotheses < 1 or request.simulations < 1:
            raise ValueError(
                f"request {request.request_id}: position = {request.position}, target = {request.target}, hypotheses = "
                f"{request.hypotheses}, simulations = {request.simulations}; allowed: target ≥ position, the others ≥ 1"
            )


def stack_snapshots(requests: Sequence[PlanRequest]) -> Snapshot:
    """The snapshots of a batch of requests as fp32 tensors; copies, since messages are read-only."""
    convs = [from_wire(request.conv_LCK) for request in requests if request.conv_LCK is not None]
    return Snapshot(
        torch.from_numpy(np.stack([from_wire(request.hidden_LD) for request in requests])),
        torch.from_numpy(np.stack([from_wire(request.ssm_LHPN) for request in requests])),
        torch.from_numpy(np.stack(convs)) if len(convs) == len(requests) else None,
    )


def project(
    model: CRSM, world_model: WorldModel, snapshot: Snapshot, known_B: Tensor, lag: int, hypotheses: int = 1
) -> Future:
    """Rolls the world model over the known token and then over its own most likely predictions, up to the target.

    With several hypotheses the likeliest continuations are kept at every step, a beam of that width; with lag 0 there
    is nothing to assume and one future.

    Args:
        snapshot: state of the B requests, before the known token.
        known_B: the sampled tokens that the snapshots have not consumed.
        lag: tokens to assume.
        hypotheses: futures per request.
    """
    latent, hidden_FLD = world_model.advance(world_model.begin(snapshot), snapshot, known_B)
    batch, device = len(known_B), known_B.device
    width = 1
    score_F = torch.zeros(batch, device=device)
    assumed_FT = known_B.new_zeros(batch, 0)
    for _ in range(lag):
        log_probs_FV = model.logits(hidden_FLD).log_softmax(dim=-1)
        beam = min(hypotheses, width * log_probs_FV.shape[1])
        total_BX = (score_F[:, None] + log_probs_FV).view(batch, -1)
        best = total_BX.topk(beam, dim=1)
        parent_BW, token_BW = best.indices // log_probs_FV.shape[1], best.indices % log_probs_FV.shape[1]
        parent_F = (torch.arange(batch, device=device)[:, None] * width + parent_BW).flatten()
        latent = tuple(part[parent_F] for part in latent)
        if beam != width:
            snapshot = snapshot.rows(torch.arange(batch, device=device).repeat_interleave(beam) * width)
        assumed_FT = torch.cat([assumed_FT[parent_F], token_BW.reshape(-1, 1)], dim=1)
        score_F, width = best.values.flatten(), beam
        latent, hidden_FLD = world_model.advance(latent, snapshot, token_BW.flatten())
    return Future(latent, hidden_FLD, snapshot, assumed_FT)
