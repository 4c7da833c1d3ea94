"""The non-blocking token loop: System 1 says a token per step, whatever System 2 does.

One :meth:`Engine.step` says one token of every running generation:

1. new generations join the batch (their prompts are consumed; a recurrent state has no length, so any may join);
2. where deliberation is due, snapshots are handed to the planners;
3. plans that have arrived are put into the targeted delta buffer (the virtual clock first waits for those whose
   target has come; the wall clock never waits);
4. plans that are due, match what was said and have an open gate are written into the state;
5. the batch consumes its tokens, the next ones are sampled, finished generations leave.

Guarantees: with no planner, or all gates 0, the tokens are those of the plain backbone, bit for bit (``forward`` for
the prompt, then the decoder that the settings choose). A plan reaches only the generation that asked for it: ids are
never reused, and an ended generation takes its plans with it. Every request is settled with exactly one reason.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.decoding import select_decoder
from crsm.delta_buffer import DeltaBuffer, check_plan
from crsm.event_log import EventLog
from crsm.latent_dynamics import WorldModel
from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint
from crsm.planners import Arrivals, Planners
from crsm.sampling import choose_token, mix_policy
from crsm.steering import Steering, advance, concat_steering, no_steering, steer
from crsm.types import Channel, Injection, ModelState, Plan, PlanRequest, Reason, Token, concat_states

_NOTHING = np.empty(0, dtype=np.float32)

_REQUEST_IDS = itertools.count()
"""Over all engines of the process: a plan left over from one can never be taken for an answer to another."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to say on from, and how."""

    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    deliberation: DeliberationConfig = DeliberationConfig()
    simulations: int = 64
    generation_id: str = ""
    """Empty: a fresh one is made."""


@dataclass(slots=True)
class _Generation:
    """A running generation's bookkeeping; its state is a row of the batch."""

    id: str
    request: GenerationRequest
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    """Generated so far; the last one is not yet consumed."""
    plans_asked: int = 0
    cancelled: bool = False

    @property
    def first(self) -> int:
        """Position of ``tokens[0]``."""
        return len(self.request.prompt)

    @property
    def position(self) -> int:
        """Position of the token about to be consumed."""
        return self.first + len(self.tokens) - 1


@dataclass(frozen=True, slots=True)
class _Running:
    """The batch: rows of tensors, in the order of the engine's generations."""

    state: ModelState
    hidden_BLD: Tensor
    steering: Steering


InjectionSource = Callable[[str, int], Injection | None]
"""Gives the injection for (generation id, position): a replay, or the controls of an evaluation."""


class Engine:
    """Decodes a batch of generations and applies the plans made for them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planners: Planners | None = None,
        config: EngineConfig = EngineConfig(),
        *,
        world_model: WorldModel | None = None,
        injection_source: InjectionSource | None = None,
        event_log: EventLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            checkpoint: the model; used without gradients.
            planners: who deliberates; None: System 1 alone.
            config: clock, pace, batch size.
            world_model: the planners' (it says what a snapshot must hold); None: the one the checkpoint names.
            injection_source: injections that come from elsewhere than planners.
            event_log: where to write every event.
            clock: seconds, for pace and deadlines.
            sleep: waits, for the pace.

        Raises:
            ValueError: planners and an injection source, whose plans would meet; a decoder that cannot be had.
        """
        if planners is not None and injection_source is not None:
            raise ValueError("planners and an injection_source; allowed: one of them, or neither")
        self.checkpoint, self.config, self.metrics = checkpoint, config, PlanMetrics()
        self._model, self._planners = checkpoint.model, planners
        self._decoder = select_decoder(self._model, config)
        self._world_model = world_model or checkpoint.model.planning_model()
        self._source, self._log, self._clock, self._sleep = injection_source, event_log, clock, sleep
        self._buffer = DeltaBuffer()
        self._waiting: list[_Generation] = []
        self._active: list[_Generation] = []
        self._running: _Running | None = None
        self._open: dict[int, PlanRequest] = {}
        """Requests that are not settled, by id; without their snapshots, which stalled planners would pile up here."""
        self._early: list[Plan] = []
        """Virtual clock: plans that arrived before their time."""
        self._next_step = 0.0

    # ---------------------------------------------------------------- generations

    def submit(self, request: GenerationRequest) -> str:
        """Accepts a generation; it joins at the next step. Returns its id.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, or an id that is in use.
        """
        vocab = self._model.config.model.backbone.vocab_size
        if not request.prompt:
            raise ValueError("prompt is empty; allowed: at least one token")
        if bad := [token for token in request.prompt if not 0 <= token < vocab]:
            raise ValueError(f"prompt holds token {bad[0]}; allowed: 0 to {vocab - 1}")
        name = request.generation_id or uuid.uuid4().hex
        if any(generation.id == name for generation in (*self._waiting, *self._active)):
            raise ValueError(f"generation_id = {name!r} is in use; allowed: a fresh one")
        self._waiting.append(_Generation(name, request, np.random.default_rng(request.sampling.seed)))
        if self._log:
            self._log.start(
                name,
                request.prompt,
                request.sampling,
                request.deliberation,
                self.checkpoint.model_version,
                self.checkpoint.weights_hash,
            )
        return name

    def cancel(self, generation_id: str) -> None:
        """Ends a generation at the next step; unknown ids are ignored, since it may just have ended."""
        for generation in (*self._waiting, *self._active):
            if generation.id == generation_id:
                generation.cancelled = True

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._active)

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Token]:
        """Runs until every generation has ended; yields tokens as they are said."""
        for request in requests:
            self.submit(request)
        while self.busy:
            yield from self.step()

    def generate_all(self, requests: Iterable[GenerationRequest]) -> list[list[int]]:
        """The tokens of every generation, in the order of the requests; a cancelled one has those it said before."""
        ids = [self.submit(request) for request in requests]
        said: dict[str, list[int]] = {name: [] for name in ids}
        while self.busy:
            for token in self.step():
                if token.finish_reason != "cancelled":
                    said[token.generation_id].append(token.token)
        return [said[name] for name in ids]

    # ---------------------------------------------------------------- one step

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Says one token of every generation; new ones say their first."""
        said = self._leave_cancelled()
        if self._active:
            self._ask()
        # Asked before the pause: the planners work while the reader reads.
        self._keep_pace()
        if self._active:
            self._receive()
            injections = self._due()
            said += self._consume(injections)
        said += self._join()
        self.metrics.tokens += sum(token.finish_reason != "cancelled" for token in said)
        if self._log:
            for token in said:
                self._log.token(token)
        return said

    def _keep_pace(self) -> None:
        if self.config.pace is None or self.config.clock != "wall":
            return
        now = self._clock()
        if now < self._next_step:
            self._sleep(self._next_step - now)
        self._next_step = max(now, self._next_step) + 1 / self.config.pace

    def _join(self) -> list[Token]:
        """Consumes the prompts of waiting generations, as many as there is room for, and samples their first tokens."""
        room = self.config.max_batch - len(self._active)
        joining, self._waiting = self._waiting[:room], self._waiting[room:]
        by_length: dict[int, list[_Generation]] = {}
        for generation in joining:
            by_length.setdefault(generation.first, []).append(generation)
        said: list[Token] = []
        for generations in by_length.values():
            prompts = torch.tensor([generation.request.prompt for generation in generations])
            logits_BV, hidden_BLD, state = self._model.prefill(prompts)
            batch = _Running(state, hidden_BLD, no_steering(state))
            said += self._say(generations, logits_BV.log_softmax(dim=-1), batch, {})
        return said

    def _consume(self, injections: dict[int, Injection]) -> list[Token]:
        assert self._running is not None
        running, generations = self._running, self._active
        positions = [generation.position for generation in generations]
        tracked = [generation.request.deliberation.withdraw for generation in generations]
        state, steering = steer(running.state, running.steering, injections, positions, tracked)
        # Nothing else holds the state: prompts make a fresh one, and snapshots are copies.
        token_B = torch.tensor([generation.tokens[-1] for generation in generations])
        out = self._decoder.step(token_B, state, donate=True)
        # Only the virtual clock's own plans are never late; a replay may hold late ones under any clock.
        never_late = self.config.clock == "virtual" and self._source is None
        remember = 0 if never_late else max(g.request.deliberation.max_lag for g in generations)
        batch = _Running(out.state, out.hidden_BLD, advance(steering, out.decay_LBH, remember))
        log_probs_BV = self._decoder.logits(out.hidden_BLD).log_softmax(dim=-1)
        self._active, self._running = [], None
        return self._say(generations, log_probs_BV, batch, injections)

    def _say(
        self,
        generations: list[_Generation],
        log_probs_BV: Tensor,
        batch: _Running,
        injections: dict[int, Injection],
    ) -> list[Token]:
        """Samples a token per row; rows that go on are appended to the running batch."""
        greedy = log_probs_BV.argmax(dim=-1).tolist()
        said, staying = [], []
        for row, generation in enumerate(generations):
            sampling, injection = generation.request.sampling, injections.get(row)
            log_probs_V = log_probs_BV[row]
            if injection is not None and injection.policy_weight > 0:
                plan = injection.plan
                tokens, probs = torch.tensor(plan.policy_tokens_A), torch.tensor(plan.policy_probs_A)
                log_probs_V = mix_policy(log_probs_V, tokens, probs, injection.policy_weight)
                picked = choose_token(log_probs_V, sampling, generation.rng.random() if sampling.temperature else 0.0)
            elif sampling.temperature == 0:
                picked = greedy[row]
            else:
                picked = choose_token(log_probs_V, sampling, generation.rng.random())
            generation.tokens.append(picked)
            reason = self._finish_reason(generation)
            said.append(
                Token(
                    generation.id,
                    generation.position,
                    picked,
                    float(log_probs_V[picked]),
                    reason is not None,
                    reason,
                    injection,
                )
            )
            if reason is None:
                staying.append(row)
            else:
                self._end(generation.id)
        self._append([generations[row] for row in staying], batch, staying, len(generations))
        return said

    def _append(self, generations: list[_Generation], batch: _Running, rows: list[int], total: int) -> None:
        if not rows:
            return
        if len(rows) < total:
            index = torch.tensor(rows)
            batch = _Running(batch.state.rows(index), batch.hidden_BLD[index], batch.steering.rows(index))
        if self._running is not None:
            before = self._running
            batch = _Running(
                concat_states([before.state, batch.state]),
                torch.cat([before.hidden_BLD, batch.hidden_BLD]),
                concat_steering([before.steering, batch.steering]),
            )
        self._running = batch
        self._active += generations

    def _finish_reason(self, generation: _Generation) -> str | None:
        if generation.tokens[-1] in self.checkpoint.tokenizer.terminal_ids:
            return "stop"
        if len(generation.tokens) >= generation.request.sampling.max_tokens:
            return "length"
        return None

    def _leave_cancelled(self) -> list[Token]:
        gone = [generation for generation in (*self._waiting, *self._active) if generation.cancelled]
        if not gone:
            return []
        self._waiting = [generation for generation in self._waiting if not generation.cancelled]
        staying = [row for row, generation in enumerate(self._active) if not generation.cancelled]
        generations, batch = self._active, self._running
        self._active, self._running = [], None
        if batch is not None:
            self._append([generations[row] for row in staying], batch, staying, len(generations))
        for generation in gone:
            self._end(generation.id)
        return [Token(g.id, g.position, -1, 0.0, True, "cancelled") for g in gone]

    def _end(self, generation_id: str) -> None:
        """Settles every open request of a generation that is over."""
        self._buffer.end(generation_id)
        self._early = [plan for plan in self._early if plan.generation_id != generation_id]
        for request in [r for r in self._open.values() if r.generation_id == generation_id]:
            self._settle(request.request_id, Reason.ENDED)

    # ---------------------------------------------------------------- System 2

    def _ask(self) -> None:
        """Hands the snapshots of all rows that are due to the planners."""
        if self._planners is None:
            return
        assert self._running is not None
        running, model = self._running, self._world_model
        rows = [row for row, generation in enumerate(self._active) if self._wants_plan(generation)]
        if not rows:
            return
        index = torch.tensor(rows)
        hidden_BLD = running.hidden_BLD[index].float().numpy()
        ssm_BLHPN = torch.stack([running.state.layers[i].ssm_BHPN[index] for i in model.read_layers], dim=1).numpy()
        conv_BLCK = (
            torch.stack([layer.conv_BCK[index] for layer in running.state.layers], dim=1).float().numpy()
            if model.needs_conv
            else None
        )
        now = self._clock()
        requests = []
        for place, row in enumerate(rows):
            generation = self._active[row]
            settings = generation.request.deliberation
            deadline = None
            if self.config.clock == "wall" and self.config.pace is not None:
                # The known token is consumed one pace from now, the target `lag` paces later.
                deadline = now + (1 + settings.lag) / self.config.pace
            requests.append(
                PlanRequest(
                    request_id=next(_REQUEST_IDS),
                    generation_id=generation.id,
                    position=generation.position,
                    target=generation.position + settings.lag,
                    token=generation.tokens[-1],
                    hidden_LD=hidden_BLD[place],
                    ssm_LHPN=ssm_BLHPN[place],
                    conv_LCK=None if conv_BLCK is None else conv_BLCK[place],
                    simulations=generation.request.simulations,
                    hypotheses=settings.hypotheses,
                    deadline=deadline,
                    seed=generation.request.sampling.seed,
                    model_version=self.checkpoint.model_version,
                )
            )
            generation.plans_asked += 1
        for request in requests:
            self._open[request.request_id] = replace(request, hidden_LD=_NOTHING, ssm_LHPN=_NOTHING, conv_LCK=None)
            self.metrics.requests += 1
            self.metrics.request_bytes += request.num_bytes
            if self._log:
                self._log.request(request)
        self._planners.submit(requests)

    def _wants_plan(self, generation: _Generation) -> bool:
        settings = generation.request.deliberation
        if settings.max_plans is not None and generation.plans_asked >= settings.max_plans:
            return False
        if (len(generation.tokens) - 1) % settings.plan_every:
            return False
        # A plan whose first effect would come after the last token is for nobody.
        return len(generation.tokens) + settings.lag < generation.request.sampling.max_tokens

    def _receive(self) -> None:
        if self._planners is None:
            return
        if self.config.clock == "wall":
            self._accept(self._planners.poll())
            return
        now = {generation.id: generation.position for generation in self._active}
        arrived = {plan.request_id for plan in self._early}
        due = [
            request.request_id
            for request in self._open.values()
            if request.target <= now.get(request.generation_id, -1) and request.request_id not in arrived
        ]
        if due:
            self._accept(self._planners.wait(due))
        early, self._early = self._early, []
        for plan in early:
            if plan.target <= now.get(plan.generation_id, -1):
                self._buffer.put(plan)
            else:
                self._early.append(plan)

    def _accept(self, arrivals: Arrivals) -> None:
        """Checks what came from the planners; keeps what may still be used."""
        sizes, rank = self._model.config.model.backbone, self._model.config.model.writer.rank
        for lost in arrivals.lost:
            self._refuse(lost.request_id, Reason.LOST)
        for shed in arrivals.shed:
            self._refuse(shed.request_id, Reason.SHED)
        for plan in arrivals.plans:
            request = self._open.get(plan.request_id)
            if request is None:
                continue  # settled already: its generation ended, or a duplicate
            self.metrics.plan_arrived(plan)
            foreign = (plan.generation_id, plan.position, plan.target) != (
                request.generation_id,
                request.position,
                request.target,
            )
            if foreign or check_plan(plan, sizes, rank) is not None:
                self._refuse(plan.request_id, Reason.MALFORMED)
            elif plan.model_version != self.checkpoint.model_version:
                self._refuse(plan.request_id, Reason.OLD_VERSION)
            elif self.config.clock == "virtual":
                self._early.append(plan)
            else:
                self._buffer.put(plan)

    def _due(self) -> dict[int, Injection]:
        """The injections of this step, by row."""
        injections = {}
        for row, generation in enumerate(self._active):
            settings = generation.request.deliberation
            if self._source is not None:
                injection = self._source(generation.id, generation.position)
            else:
                injection = self._take(generation, settings)
            if injection is not None:
                injections[row] = injection
                self.metrics.applied(injection)
                if self._log:
                    self._log.inject(injection)
        return injections

    def _take(self, generation: _Generation, settings: DeliberationConfig) -> Injection | None:
        due = self._buffer.take(
            generation.id, generation.position, generation.tokens, generation.first, settings.max_lag
        )
        for plan, reason in due.outcomes:
            self._settle(plan.request_id, reason)
        if due.plan is None:
            return None
        injection = as_injection(due.plan, generation.position, settings)
        # A rate of 0, a late plan on the policy channel, a channel that is off: nothing would be applied.
        return injection if any(injection.alpha_L) or injection.policy_weight > 0 else None

    def _refuse(self, request_id: int, reason: Reason) -> None:
        """Settles a request of which nothing will be used, not even plans that are waiting already."""
        request = self._open.get(request_id)
        if request is not None:
            self._buffer.drop(request.generation_id, request.target, request_id)
            self._early = [plan for plan in self._early if plan.request_id != request_id]
            self._settle(request_id, reason)

    def _settle(self, request_id: int, reason: Reason) -> None:
        settled = self._open.pop(request_id, None)
        if settled is None:
            return
        self.metrics.outcomes[reason] += 1
        if self._log and reason not in (Reason.ON_TIME, Reason.LATE):
            self._log.reject(settled.generation_id, request_id, settled.target, reason)


def as_injection(plan: Plan, position: int, settings: DeliberationConfig) -> Injection:
    """How a plan is applied at ``position``: α per layer, and the weight of its policy.

    ``α = injection_rate · confidence · late_decay^late``. The visit distribution speaks of the token right after the
    target, so a late plan moves the state only.
    """
    late = position - plan.target
    state = settings.channel in (Channel.STATE, Channel.BOTH)
    policy = settings.channel in (Channel.POLICY, Channel.BOTH) and late == 0
    rate = settings.injection_rate * settings.late_decay**late if state else 0.0
    return Injection(
        plan,
        position,
        tuple(rate * float(confidence) for confidence in plan.confidence_L),
        float(plan.confidence_L.mean()) if policy else 0.0,
    )
