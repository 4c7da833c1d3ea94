"""The engine's dealings with its planners: what is asked, what comes back, what becomes of it.

Invariants:

* every request is settled with exactly one :class:`~crsm.types.Reason`, whatever arrives, twice or never;
* a plan is checked before it may touch a state: form, generation, position, target and version are those asked for;
* under the wall clock nothing here waits; under the virtual clock a plan counts as there exactly when its target has
  come, and is waited for then;
* planners without room are not asked, nor for plans that cannot be in time: no snapshot is taken, and it is counted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from crsm.computation_value import ExpectedGate, entropy, value_at_entropy
from crsm.config import DeliberationConfig, EngineConfig
from crsm.decoding import Decoder
from crsm.delta_buffer import DeltaBuffer, Fault, check_plan
from crsm.devices import device_of, to_device, to_host
from crsm.event_log import EventLog, reject_event, request_event
from crsm.generation import Generation, SavedGeneration
from crsm.latent_dynamics import WorldModel
from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint
from crsm.pace import time_of
from crsm.plan_events import PlanEvents
from crsm.planners import NOTHING, Arrivals, Planners
from crsm.slots import Slots
from crsm.types import Channel, Injection, Plan, PlanRequest, Reason
from crsm.wire import to_wire

_REQUEST_IDS = itertools.count()
"""Over all engines of the process: a plan left over from one can never be taken for an answer to another."""


PROBE_SECONDS = 0.25
"""While every plan would be too late, one is asked for so often all the same."""


QUIET_STEPS = 16
"""While nothing is asked for, planners are looked at so often: for their room."""

FIRST_SECONDS = 10.0
"""What is asked before anybody knows how long a token takes is worthless after this."""

STALE_SECONDS = 0.01
"""What planners said longer ago than this is looked up again before they are asked: steps may be far apart."""


class _Asked(NamedTuple):
    """What a plan must fit. Without the snapshot, which stalled planners would pile up here."""

    generation: Generation
    position: int
    target: int


@dataclass(slots=True)
class Foresight:
    """How far the thinking between two turns has come."""

    next_lag: int = 1
    """Tokens of the next turn that the next request assumes."""
    spent: int = 0
    """Simulations asked for."""


class Deliberation:
    """One engine's requests and plans."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planners: Planners | None,
        config: EngineConfig,
        decoder: Decoder,
        metrics: PlanMetrics,
        *,
        world_model: WorldModel | None = None,
        event_log: EventLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            checkpoint: whose plans.
            planners: who deliberates; None: nobody is asked.
            config: the clock decides whether plans are waited for.
            decoder: gives the logits behind the entropy that requests are ranked by.
            metrics: counts everything.
            world_model: the planners' (it says what a snapshot must hold); None: the one the checkpoint names.
            event_log: where to write requests and rejections.
            clock: seconds, for deadlines.
        """
        self._planners, self._config, self._decoder = planners, config, decoder
        self._metrics, self._log, self._clock = metrics, event_log, clock
        self._world_model = world_model or checkpoint.model.planning_model()
        self._virtual = config.clock == "virtual"
        sizes = checkpoint.model.config.model
        self._sizes, self._rank = sizes.backbone, sizes.writer.rank
        self._buffer = DeltaBuffer()
        self._open: dict[int, _Asked] = {}
        self._unanswered: set[int] = set()
        """Those of them for which nothing has come back."""
        self._early: list[Plan] = []
        """Virtual clock: plans that arrived before their time."""
        self._expected_gate = ExpectedGate()
        self._unpolled = 0
        """Steps since planners were last looked at."""
        self._looked_at = -math.inf
        """When that was; wall clock."""
        self._asked_at = -math.inf
        """When planners were last asked for a plan that could be in time, or to see whether one could."""
        self.events = PlanEvents(clock)
        self._ids_from = self._newest_id = next(_REQUEST_IDS)
        self.renew(checkpoint)

    def renew(self, checkpoint: Checkpoint) -> None:
        """Takes notice of other weights: plans of another version are refused from now on."""
        self._checkpoint, self._device = checkpoint, device_of(checkpoint.model)
        critic = checkpoint.model.critic
        # For ranking, a few numbers per generation: numpy takes a tenth of what the module's small tensors cost.
        self._critic_LD = critic.weight_LD.detach().float().cpu().numpy()
        self._critic_L = critic.bias_L.detach().float().cpu().numpy()

    # ---------------------------------------------------------------- asking

    def ask(
        self, generations: Sequence[Generation], slots: Slots, began: float, seconds_per_token: float | None
    ) -> None:
        """Hands the snapshots of all generations that are due to the planners.

        Args:
            generations: those that are decoded.
            slots: where their states lie.
            began: the engine's beginning on its clock, from which beats count.
            seconds_per_token: of a generation without a pace; None: not known yet.
        """
        if self._planners is None:
            return
        due = [generation for generation in generations if generation.generated >= generation.ask_at]
        due = [generation for generation in due if wants_plan(generation)] if due else due
        if not due:
            return
        if not self._virtual and self._clock() - self._looked_at > STALE_SECONDS:
            self._look(self._planners)
        room = self._planners.room()
        probing = False
        if room is not None:
            due, probing = self._in_time(due, began, seconds_per_token)
            if room < len(due):
                due = self._worthiest(due, room, slots)
            if not due:
                return
        wire = self._config.wire
        hidden_BLD, ssm_BLHPN, conv_BLCK = slots.read(
            [generation.slot for generation in due], self._world_model.read_layers, self._world_model.needs_conv, wire
        )
        value_B = self._values(due, hidden_BLD) if room is not None and len(generations) > 1 else None
        hidden, ssm = to_wire(hidden_BLD, wire), to_wire(ssm_BLHPN, wire)
        conv = None if conv_BLCK is None else to_wire(conv_BLCK, wire)
        requests = []
        for place, generation in enumerate(due):
            lag = generation.request.deliberation.lag
            deadline, expires = (None, None) if probing else self._times(generation, began, seconds_per_token)
            requests.append(
                PlanRequest(
                    request_id=next(_REQUEST_IDS),
                    generation_id=generation.id,
                    position=generation.position,
                    target=generation.position + lag,
                    token=generation.tokens[-1],
                    hidden_LD=hidden[place],
                    ssm_LHPN=ssm[place],
                    conv_LCK=None if conv is None else conv[place],
                    simulations=generation.request.simulations,
                    hypotheses=generation.request.deliberation.hypotheses,
                    deadline=deadline,
                    expires=expires,
                    value=0.0 if value_B is None else float(value_B[place]),
                    seed=generation.request.sampling.seed,
                    model_version=self._checkpoint.model_version,
                    sketch=generation.request.trees,
                )
            )
            generation.plans_asked += 1
            self._take_note(requests[-1], generation)
        self._planners.submit(requests)

    def foresee(self, generation: Generation, saved: SavedGeneration, foresight: Foresight) -> None:
        """Asks for plans that a next turn may need: one request per length of that turn, as many futures of it as the
        settings' ``hypotheses``, within the pause's budget and never beyond the planners' room.

        A plan fits if the turn's tokens come as one of the futures has them; it is then there for the turn's first
        token already.
        """
        settings, cost = saved.deliberation, saved.simulations * saved.deliberation.hypotheses
        requests: list[PlanRequest] = []
        room = None if self._planners is None else self._planners.room()
        while self.can_foresee(saved, foresight) and (room is None or len(requests) < room):
            wire = self._config.wire
            requests.append(
                PlanRequest(
                    request_id=next(_REQUEST_IDS),
                    generation_id=generation.id,
                    position=saved.position,
                    target=saved.position + foresight.next_lag,
                    token=saved.tokens[-1],
                    hidden_LD=to_wire(saved.hidden_LD, wire),
                    ssm_LHPN=to_wire(saved.ssm_LHPN[list(self._world_model.read_layers)], wire),
                    conv_LCK=to_wire(saved.conv_LCK, wire) if self._world_model.needs_conv else None,
                    simulations=saved.simulations,
                    hypotheses=settings.hypotheses,
                    seed=saved.sampling.seed,
                    model_version=self._checkpoint.model_version,
                )
            )
            foresight.next_lag += 1
            foresight.spent += cost
            self._take_note(requests[-1], generation)
        if requests and self._planners is not None:
            self._planners.submit(requests)

    def is_unanswered(self, generation: Generation) -> bool:
        """Whether something that was asked for a generation may come back by itself: the virtual clock waits for it."""
        return not self._virtual and not self._unanswered.isdisjoint(generation.open_requests)

    def can_foresee(self, saved: SavedGeneration, foresight: Foresight) -> bool:
        """Whether a pause has budget and tokens left to think about."""
        settings = saved.deliberation
        cost = saved.simulations * settings.hypotheses
        affordable = foresight.spent + cost <= settings.park_simulations
        return self._planners is not None and affordable and foresight.next_lag <= settings.park_tokens

    def _take_note(self, request: PlanRequest, generation: Generation) -> None:
        self._newest_id = request.request_id
        self._open[request.request_id] = _Asked(generation, request.position, request.target)
        self._unanswered.add(request.request_id)
        generation.open_requests.add(request.request_id)
        self._metrics.requests += 1
        self._metrics.request_bytes += request.num_bytes
        if self._log:
            self._log.write(
                request_event(
                    generation.id, request.request_id, request.position, request.target, request.model_version
                )
            )
        self.events.tell(generation, "request", request.request_id, request.position, request.target)

    def _times(
        self, generation: Generation, began: float, seconds_per_token: float | None
    ) -> tuple[float | None, float | None]:
        """When the target's token is consumed, and when a plan for it is worthless; None: not known, never."""
        if self._virtual:
            return None, None
        settings, pace = generation.request.deliberation, generation.request.pace
        if pace is not None:
            # The known token is consumed at the next beat, the target `lag` beats later.
            target = generation.tick + 1 + settings.lag
            return began + time_of(target, pace), began + time_of(target + settings.max_lag, pace)
        now = self._clock()
        if seconds_per_token is None:
            return None, now + FIRST_SECONDS
        deadline = now + (1 + settings.lag) * seconds_per_token
        return deadline, deadline + settings.max_lag * seconds_per_token

    def _in_time(
        self, due: list[Generation], began: float, seconds_per_token: float | None
    ) -> tuple[list[Generation], bool]:
        """Those whose plans can be there before they are worthless; the others are counted as declined.

        If there is none for a while, one is asked for all the same, without a deadline, and the second result is true:
        planners may have become faster.
        """
        assert self._planners is not None
        soonest = self._planners.soonest()
        if soonest == 0:
            return due, False
        now = self._clock()
        earliest, kept = now + soonest, []
        for generation in due:
            _, expires = self._times(generation, began, seconds_per_token)
            if expires is None or expires >= earliest:
                kept.append(generation)
        if kept:
            self._asked_at = now
        elif now - self._asked_at > PROBE_SECONDS:
            self._asked_at = now
            self._decline(due, due[:1])
            return due[:1], True
        self._decline(due, kept)
        return kept, False

    def _decline(self, due: Sequence[Generation], kept: Sequence[Generation]) -> None:
        """Counts those of the generations that are due for which nothing is asked."""
        if len(kept) == len(due):
            return
        self._metrics.requests += len(due) - len(kept)
        self._metrics.outcomes[Reason.DECLINED] += len(due) - len(kept)
        for generation in due:
            if generation.request.watch and generation not in kept:
                target = generation.position + generation.request.deliberation.lag
                self.events.tell(generation, "reject", -1, generation.position, target, Reason.DECLINED)

    def _worthiest(self, due: list[Generation], room: int, slots: Slots) -> list[Generation]:
        """Those for which there is room; the others are counted as declined."""
        if room == 0:
            self._decline(due, ())
            return []
        hidden_BLD, _, _ = slots.read([generation.slot for generation in due], (), False)
        order = np.argsort(-self._values(due, hidden_BLD), kind="stable")[:room]
        worthiest = [due[place] for place in sorted(order.tolist())]
        self._decline(due, worthiest)
        return worthiest

    def _values(self, generations: Sequence[Generation], hidden_BLD: torch.Tensor) -> np.ndarray:
        """What plans are expected to be worth to these generations."""
        log_probs_BV = self._decoder.logits(to_device(hidden_BLD, self._device)).log_softmax(dim=-1)
        if log_probs_BV.is_cpu:
            entropy_B = entropy(log_probs_BV.numpy())
        else:  # a number each comes back, not a vocabulary
            entropy_B = to_host(torch.special.entr(log_probs_BV.exp()).sum(dim=-1))[0].numpy()
        hidden = hidden_BLD.numpy()
        scale_BL = 1 / np.sqrt((hidden * hidden).mean(axis=2) + 1e-5)
        logits_BL = np.einsum("bld,ld->bl", hidden, self._critic_LD) * scale_BL + self._critic_L
        gates_B = self._expected_gate.expected_all([generation.id for generation in generations])
        return value_at_entropy(entropy_B, 1 / (1 + np.exp(-logits_BL)), gates_B)

    # ---------------------------------------------------------------- receiving

    def receive(self, generations: Sequence[Generation]) -> None:
        """Takes in what has arrived; under the virtual clock waits for the plans whose targets have come.

        Args:
            generations: those that are about to consume a token.
        """
        if self._planners is None:
            return
        if not self._virtual:
            self._unpolled += 1
            if self._open or self._unpolled >= QUIET_STEPS:
                self._look(self._planners)
            return
        if self._open or self._early:
            self._wait_until(
                {generation.id: generation.position for generation in generations},
                {request for generation in generations for request in generation.open_requests},
            )

    def _look(self, planners: Planners) -> None:
        """Takes in what has come, without waiting."""
        self._unpolled, self._looked_at = 0, self._clock()
        arrivals = planners.poll()
        if arrivals is not NOTHING:
            self._accept(arrivals)

    def await_plans(self, generation: Generation, position: int) -> None:
        """Virtual clock: has the plans of one generation for targets up to ``position`` in the buffer."""
        if self._planners is not None and self._virtual:
            self._wait_until({generation.id: position}, generation.open_requests)

    def await_all(self, generation: Generation) -> None:
        """Virtual clock: has every open request of a generation answered, whatever its target."""
        if self._planners is not None and self._virtual and generation.open_requests:
            if missing := sorted(generation.open_requests & self._unanswered):
                self._accept(self._planners.wait(missing))

    def _wait_until(self, positions: dict[str, int], requests: set[int]) -> None:
        assert self._planners is not None
        due = [
            request
            for request in sorted(requests & self._unanswered)
            if (asked := self._open[request]).target <= positions.get(asked.generation.id, -1)
        ]
        if due:
            self._accept(self._planners.wait(due))
        early, self._early = self._early, []
        for plan in early:
            if plan.target <= positions.get(plan.generation_id, -1):
                self._buffer.put(plan)
            else:
                self._early.append(plan)

    def _accept(self, arrivals: Arrivals) -> None:
        """Checks what came from the planners; keeps what may still be used."""
        for lost in arrivals.lost:
            self._refuse(lost.request_id, Reason.LOST)
        for shed in arrivals.shed:
            self._refuse(shed.request_id, Reason.SHED)
        for plan in arrivals.plans:
            asked = self._open.get(plan.request_id)
            if asked is None:
                self._metrics.faults[self._stray(plan)] += 1
                continue
            self._unanswered.discard(plan.request_id)
            self._metrics.plan_arrived(plan)
            if (plan.generation_id, plan.position, plan.target) != (asked.generation.id, asked.position, asked.target):
                self._fault(plan, Fault.GENERATION)
            elif (malformed := check_plan(plan, self._sizes, self._rank)) is not None:
                self._fault(plan, malformed.fault)
            elif plan.model_version != self._checkpoint.model_version:
                self._fault(plan, Fault.VERSION)
            else:
                self.events.tell(asked.generation, "plan", plan.request_id, asked.position, plan.target, plan=plan)
                confidence = plan.confidence_L.tolist()
                self._expected_gate.observe(plan.generation_id, sum(confidence) / len(confidence))
                if self._virtual:
                    self._early.append(plan)
                else:
                    self._buffer.put(plan)

    def _stray(self, plan: Plan) -> Fault:
        """A plan that nobody waits for: of a request that is settled, or of none that was ever made."""
        made = isinstance(plan.request_id, int) and self._ids_from < plan.request_id <= self._newest_id
        return Fault.DUPLICATE if made else Fault.UNKNOWN

    def _fault(self, plan: Plan, fault: Fault) -> None:
        self._metrics.faults[fault] += 1
        self._refuse(plan.request_id, Reason.OLD_VERSION if fault is Fault.VERSION else Reason.MALFORMED)

    # ---------------------------------------------------------------- plans that are due

    def due(self, generation: Generation) -> Injection | None:
        """What is to be applied before the generation's last token is consumed."""
        if generation.id not in self._buffer:
            return None
        settings = generation.request.deliberation
        due = self._buffer.take(
            generation.id, generation.position, generation.tokens, generation.first, settings.max_lag
        )
        for plan, reason in due.outcomes:
            self._settle(plan.request_id, reason)
        for rank in due.ranks:
            self._metrics.futures[rank] += 1
        if due.plan is None:
            return None
        injection = as_injection(due.plan, generation.position, settings)
        plan, late = due.plan, generation.position > due.plan.target
        reason = Reason.LATE if late else Reason.ON_TIME
        self.events.tell(generation, "inject", plan.request_id, plan.position, plan.target, reason, plan, injection)
        # A rate of 0, a late plan on the policy channel, a channel that is off: nothing would be applied.
        return injection if any(injection.alpha_L) or injection.policy_weight > 0 else None

    # ---------------------------------------------------------------- the ends of generations and of requests

    def waiting(self, generation: Generation) -> tuple[Plan, ...]:
        """The plans that have arrived for a generation and are not used yet."""
        early = [plan for plan in self._early if plan.generation_id == generation.id]
        return (*self._buffer.waiting(generation.id), *early)

    def adopt(self, generation: Generation, plans: Sequence[Plan]) -> None:
        """Takes over the plans of a saved generation as if they had been asked for and had arrived here."""
        new_ids: dict[int, int] = {}
        for plan in plans:
            if plan.request_id not in new_ids:  # the futures of one request stay together
                self._newest_id = new_ids[plan.request_id] = next(_REQUEST_IDS)
                self._open[self._newest_id] = _Asked(generation, plan.position, plan.target)
                generation.open_requests.add(self._newest_id)
                self._metrics.requests += 1
            adopted = replace(plan, request_id=new_ids[plan.request_id], generation_id=generation.id)
            if self._virtual:
                self._early.append(adopted)
            else:
                self._buffer.put(adopted)

    def end(self, generation: Generation) -> None:
        """Settles every open request of a generation that is over."""
        self._buffer.end(generation.id)
        if self._early:
            self._early = [plan for plan in self._early if plan.generation_id != generation.id]
        for request_id in sorted(generation.open_requests):
            self._settle(request_id, Reason.ENDED)
        self._expected_gate.end(generation.id)

    def _refuse(self, request_id: int, reason: Reason) -> None:
        """Settles a request of which nothing will be used, not even plans that are waiting already."""
        asked = self._open.get(request_id)
        if asked is not None:
            self._buffer.drop(asked.generation.id, asked.target, request_id)
            self._early = [plan for plan in self._early if plan.request_id != request_id]
            self._settle(request_id, reason)

    def _settle(self, request_id: int, reason: Reason) -> None:
        asked = self._open.pop(request_id, None)
        if asked is None:
            return
        self._unanswered.discard(request_id)
        asked.generation.open_requests.discard(request_id)
        self._metrics.outcomes[reason] += 1
        if self._log and reason not in (Reason.ON_TIME, Reason.LATE):
            self._log.write(reject_event(asked.generation.id, request_id, asked.target, reason))
        if reason not in (Reason.ON_TIME, Reason.LATE):
            self.events.tell(asked.generation, "reject", request_id, asked.position, asked.target, reason)


def wants_plan(generation: Generation) -> bool:
    """Whether a plan is to be asked for after a generation's last token, which is due; says when the next one is."""
    settings = generation.request.deliberation
    done = generation.generated - 1
    generation.ask_at = done - done % settings.plan_every + settings.plan_every + 1
    if settings.max_plans is not None and generation.plans_asked >= settings.max_plans:
        return False
    if done % settings.plan_every:
        return False
    # A plan whose first effect would come after the last token is for nobody.
    return generation.generated + settings.lag < generation.request.sampling.max_tokens


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
        tuple(rate * confidence for confidence in plan.confidence_L.tolist()),
        float(plan.confidence_L.mean()) if policy else 0.0,
    )
