"""The non-blocking token loop: System 1 says a token per step, whatever System 2 does.

One :meth:`Engine.step` says one token of every generation whose beat has come:

1. cancelled generations leave;
2. where deliberation is due, snapshots are handed to the planners; parked generations think on about their next turn;
3. without a beat or a prompt there is nothing to do before the next beat: the engine sleeps until then;
4. plans that have arrived are put into the targeted delta buffer (the virtual clock first waits for those whose
   target has come; the wall clock never waits);
5. plans that are due, match what was said and have an open gate are written into the state;
6. the batch consumes its tokens, the next ones are sampled, finished generations leave;
7. prompts are consumed, a bounded number of tokens per step; whoever is through says a first token and joins.

Guarantees: with no planner, or all gates 0, the tokens are those of the plain backbone, bit for bit (``forward`` for
the prompt in chunks, then the decoder that the settings choose). A plan reaches only the generation that asked for it:
ids are never reused, and an ended generation takes its plans with it. States live in slots whose number is bounded, so
that memory is known in advance; what does not fit waits, and what cannot wait is refused.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from crsm.config import EngineConfig
from crsm.decoding import select_decoder
from crsm.deliberation import Deliberation
from crsm.devices import device_of, index_on
from crsm.event_log import EventLog, inject_event, start_event, token_event
from crsm.generation import Generation, GenerationRequest
from crsm.latent_dynamics import WorldModel
from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint
from crsm.pace import beat, first_beat, time_of
from crsm.parking import Parking
from crsm.placement import settled
from crsm.plan_events import PlanEvent
from crsm.planners import Planners
from crsm.prompts import Prompt, choose_prompts, consume_chunks
from crsm.sampling import choose_token, look_up, mix_policy
from crsm.saved_generation import SavedGeneration, unpack
from crsm.slots import make_slots
from crsm.steering import NEVER, Steering
from crsm.turns import check_request, first_turn, next_turn, put_aside
from crsm.types import Injection, ModelState, Token

_FIRST_SLOTS = 8
"""Slots at the beginning; doubled when they are all taken."""
_IDLE_CHUNKS = 8
"""While nobody speaks, a step may consume so many chunks of prompts."""
_SMOOTHING = 0.1
"""Weight of the newest interval in the mean time between tokens."""

InjectionSource = Callable[[str, int], Injection | None]
"""Gives the injection for (generation id, position): a replay, or the controls of an evaluation."""


class QueueFull(RuntimeError):
    """No more generations can wait; to be tried again later."""


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
            sleep: waits, for the pace; may return early.

        Raises:
            ValueError: planners and an injection source, whose plans would meet; a decoder or a device that cannot be
                had.
        """
        if planners is not None and injection_source is not None:
            raise ValueError("planners and an injection_source; allowed: one of them, or neither")
        checkpoint = settled(checkpoint, config.device, "engine.device")
        self.checkpoint, self.config, self.metrics = checkpoint, config, PlanMetrics()
        self.sleep = sleep
        self._model, self._source, self._log, self._clock = checkpoint.model, injection_source, event_log, clock
        decoder = select_decoder(self._model, config)
        self._deliberation = Deliberation(
            checkpoint,
            planners,
            config,
            decoder,
            self.metrics,
            world_model=world_model,
            event_log=event_log,
            clock=clock,
        )
        self._slots = make_slots(self._model, decoder, min(_FIRST_SLOTS, config.max_batch), config.cuda_graphs)
        self._free = list(range(self._slots.capacity))
        self._terminal = frozenset(checkpoint.tokenizer.terminal_ids)
        self._generations: dict[str, Generation] = {}
        """Everything that is not over, parked or not."""
        self._waiting: deque[Prompt] = deque()
        self._reading: list[Prompt] = []
        """Those whose prompts are being consumed, in the order in which they came."""
        self._active: list[Generation] = []
        self._parking = Parking(config, self._deliberation, clock, self._end)
        self._kept: list[SavedGeneration] = []
        """States at the ends of turns, to be handed out."""
        self._any_cancelled = False
        self._paced = 0
        """Speaking generations that have a pace."""
        self._max_lag = 0
        """The largest among those that speak, or have spoken beside them."""
        self._began = clock()
        self._interval: float | None = None
        """Mean seconds between two tokens of a generation without a pace."""

    # ---------------------------------------------------------------- generations

    def submit(self, request: GenerationRequest) -> str:
        """Accepts a generation, or the next turn of a parked one; it joins as soon as there is room. Returns its id.

        Raises:
            ValueError: an empty prompt where there is nothing else to go on from, a token outside the vocabulary, an id
                that is in use, a saved generation of other weights.
            QueueFull: as many wait as the settings allow.
        """
        goes_on = request.generation_id in self._parking
        check_request(request, self.checkpoint, goes_on=goes_on)
        if not goes_on and request.generation_id in self._generations:
            raise ValueError(f"generation_id = {request.generation_id!r} is in use; allowed: a fresh one")
        if len(self._waiting) >= self.config.max_waiting:
            raise QueueFull(
                f"{len(self._waiting)} generations wait; allowed: engine.max_waiting = {self.config.max_waiting}"
            )
        request = replace(request, pace=request.pace if request.pace is not None else self.config.pace)
        parked = self._parking.take(request.generation_id)
        if parked is not None:
            prompt = next_turn(parked.generation, request, parked.saved, self._deliberation)
        else:
            request = replace(request, generation_id=request.generation_id or uuid.uuid4().hex)
            random = np.random.default_rng(request.sampling.seed)
            prompt = first_turn(Generation(request.generation_id, request, random), self._deliberation)
        generation = prompt.generation
        generation.said_at = generation.accepted_at = self._clock()
        generation.forced = list(reversed(request.forced))
        generation.stops = frozenset() if request.sampling.ignore_eos else self._terminal
        self._generations[generation.id] = generation
        self._waiting.append(prompt)
        if self._log:
            event = start_event(
                generation.id,
                request.prompt,
                request.sampling,
                request.deliberation,
                self.checkpoint.model_version,
                self.checkpoint.weights_hash,
                fresh=parked is None and request.start is None,
            )
            self._log.write(event)
        return generation.id

    def cancel(self, generation_id: str) -> None:
        """Ends a generation at the next step; unknown ids are ignored, since it may just have ended. A parked one is
        forgotten."""
        if generation_id in self._parking:
            self.forget(generation_id)
        elif (generation := self._generations.get(generation_id)) is not None:
            generation.cancelled = self._any_cancelled = True

    def forget(self, generation_id: str) -> bool:
        """Drops a parked generation and its plans; whether there was one."""
        return self._parking.forget(generation_id)

    @torch.inference_mode()
    def snapshot(self, generation_id: str) -> SavedGeneration:
        """A generation as it stands between two steps: a value from which the same tokens follow. It goes on itself.

        Under the virtual clock this waits for its open plans, which are part of what follows.

        Raises:
            ValueError: no such generation, or it has not said its first token.
        """
        if generation_id in self._parking:
            parked = self._parking.get(generation_id)
            return replace(parked.saved, plans=self._deliberation.waiting(parked.generation))
        generation = self._generations.get(generation_id)
        if generation is None or generation.slot < 0:
            state = "has not said its first token" if generation else "is not known: it has ended, or never began"
            raise ValueError(f"generation_id = {generation_id!r} {state}; allowed: one that is speaking or parked")
        self._deliberation.ask([generation], self._slots, self._began, self._interval)
        self._deliberation.await_all(generation)
        return self._saved(generation, *self._slots.save(generation.slot))

    def update_weights(self, checkpoint: Checkpoint) -> None:
        """Goes on with other weights of the same shapes: the states stay, plans made with the old ones are refused.

        Raises:
            ValueError: another model or vocabulary.
        """
        mine = self.checkpoint
        if checkpoint.model.config.model != mine.model.config.model:
            raise ValueError("the weights belong to a model of other shapes; allowed: those of this engine's model")
        if checkpoint.tokenizer.to_json() != mine.tokenizer.to_json():
            raise ValueError("the weights belong to another vocabulary; allowed: this engine's")
        # In place: decoder, slots and deliberation hold the model, and the decoder notices.
        self._model.load_state_dict(checkpoint.model.state_dict())
        self.checkpoint = replace(
            mine,
            trust_horizon=checkpoint.trust_horizon,
            model_version=checkpoint.model_version,
            weights_hash=checkpoint.weights_hash,
            report=checkpoint.report,
        )
        self._deliberation.renew(self.checkpoint)

    @property
    def busy(self) -> bool:
        """Whether a step would say or read something, sooner or later."""
        return bool(self._active or self._reading or self._waiting)

    @property
    def parked(self) -> tuple[str, ...]:
        """Ids of the generations between two turns, the one that rested longest first."""
        return self._parking.names

    @property
    def thinking(self) -> bool:
        """Whether a parked generation still has something to ask or to receive."""
        return self._parking.thinking

    def take_events(self) -> list[PlanEvent]:
        """What happened to the plans of watched generations since the last time, in order."""
        return self._deliberation.events.take()

    def take_kept(self) -> list[SavedGeneration]:
        """States of turns that ended, and of prompts that were read, since the last time."""
        kept, self._kept = self._kept, []
        return kept

    def counts(self) -> dict[str, int]:
        """Generations by what they are doing."""
        return {
            "speaking": len(self._active),
            "reading": len(self._reading),
            "waiting": len(self._waiting),
            "parked": len(self._parking),
        }

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Token]:
        """Runs until every generation has ended; yields tokens as they are said. Requests wait for a full queue."""
        for request in requests:
            while len(self._waiting) >= self.config.max_waiting:
                yield from self.step()
            self.submit(request)
        while self.busy:
            yield from self.step()

    def generate_all(self, requests: Iterable[GenerationRequest]) -> list[list[int]]:
        """The tokens of every generation, in the order of the requests; a cancelled one has those it said before."""
        named = [replace(request, generation_id=request.generation_id or uuid.uuid4().hex) for request in requests]
        said: dict[str, list[int]] = {request.generation_id: [] for request in named}
        for token in self.generate(named):
            if token.token >= 0:
                said[token.generation_id].append(token.token)
        return [said[request.generation_id] for request in named]

    # ---------------------------------------------------------------- one step

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Says one token of every generation whose beat has come; new ones say their first."""
        said = self._leave_cancelled() if self._any_cancelled else []
        started = time.perf_counter()
        self._deliberation.ask(self._active, self._slots, self._began, self._interval)
        if self._parking:
            self._parking.think()
            if not self._active:
                self._deliberation.receive(())
        asked = time.perf_counter()
        # Asked before the pause: the planners work while the reader reads.
        speakers = self._on_beat()
        if speakers:
            resumed = time.perf_counter()
            self._deliberation.receive(speakers)
            injections = self._steer(speakers)
            self.metrics.deliberation_seconds += time.perf_counter() - resumed
            said += self._consume(speakers, injections)
        self.metrics.deliberation_seconds += asked - started
        if self._waiting or self._reading:
            said += self._read_prompts()
        self.metrics.tokens += len(said)
        if self._log:
            for token in said:
                self._log.write(token_event(token))
        return said

    def _on_beat(self) -> list[Generation]:
        """Those whose beat has come; if there is none, and nothing to read, sleeps until there is one."""
        if self.config.clock != "wall":
            return self._active
        speakers = self._due_now()
        if not speakers and self._active and not (self._reading or self._waiting):
            now = self._clock() - self._began
            # Generations without a pace are always due, so that all of these have one.
            wake = min(time_of(g.tick + 1, g.request.pace) for g in self._active if g.request.pace is not None)
            self.sleep(max(0.0, wake - now))
            speakers = self._due_now()
        return speakers

    def _due_now(self) -> list[Generation]:
        if not self._paced:
            return self._active
        now = self._clock() - self._began
        return [g for g in self._active if g.request.pace is None or beat(now, g.request.pace) > g.tick]

    def _steer(self, speakers: list[Generation]) -> dict[int, Injection]:
        """Writes what is due into the states, withdraws what is spent; the injections by place among the speakers."""
        injections: dict[int, Injection] = {}
        touched: list[Generation] = []
        writes: dict[int, Injection] = {}
        for place, generation in enumerate(speakers):
            injection = None
            if self._source is not None:
                injection = self._source(generation.id, generation.position)
            elif generation.open_requests:
                injection = self._deliberation.due(generation)
            if injection is not None:
                injections[place] = writes[len(touched)] = injection
                touched.append(generation)
                if any(injection.alpha_L) and generation.request.deliberation.withdraw:
                    generation.steered_until = injection.plan.target + max(1, len(injection.plan.line))
                self.metrics.applied(injection)
                if self._log:
                    self._log.write(inject_event(injection))
            elif generation.steered_until != NEVER and generation.steered_until <= generation.position:
                generation.steered_until = NEVER
                touched.append(generation)
        if touched:
            self._slots.steer(
                [generation.slot for generation in touched],
                writes,
                [generation.position for generation in touched],
                [generation.request.deliberation.withdraw for generation in touched],
            )
        return injections

    def _consume(self, speakers: list[Generation], injections: dict[int, Injection]) -> list[Token]:
        # Only the virtual clock's own plans are never late; a replay may hold late ones under any clock.
        never_late = self.config.clock == "virtual" and self._source is None
        remember = 0 if never_late else self._max_lag
        tokens = torch.tensor([generation.tokens[-1] for generation in speakers])
        logits_BV = self._slots.step(tokens, [generation.slot for generation in speakers], remember)
        said, ended = self._say(speakers, logits_BV.log_softmax(dim=-1), injections)
        for generation in ended:
            if generation.request.park or generation.request.keep:
                self._end_turn(generation, *self._slots.save(generation.slot))
            self._leave(generation)
        return said

    def _read_prompts(self) -> list[Token]:
        """Consumes the next chunks of prompts; those that are through say their first tokens and join the batch."""
        said: list[Token] = []
        while self._waiting and len(self._active) + len(self._reading) < self.config.max_batch:
            prompt = self._waiting.popleft()
            if prompt.tokens:
                self._reading.append(prompt)
            elif prompt.generation.request.read_only:  # one token, which is left to be consumed
                said.append(self._finish_reading(prompt.generation, *self._nothing_read()))
            else:
                self._resume(prompt)
        chunk = self.config.prefill_chunk
        budget = chunk if self._active else _IDLE_CHUNKS * chunk
        chosen = choose_prompts(self._reading, chunk, budget)
        for group in consume_chunks(self._model, chosen, chunk):
            through = set(map(id, group.generations))
            self._reading = [prompt for prompt in self._reading if id(prompt.generation) not in through]
            speaking = [row for row, generation in enumerate(group.generations) if not generation.tokens]
            ended: list[Generation] = []
            if speaking:
                rows = index_on(speaking, group.logits_BV.device)
                generations = [group.generations[row] for row in speaking]
                said_first, ended = self._say(generations, group.logits_BV[rows].log_softmax(dim=-1), {})
                said += said_first
            for row, generation in enumerate(group.generations):
                one = slice(row, row + 1)
                state, hidden_1LD = group.state.rows(one), group.hidden_BLD[one]
                if generation.request.read_only:
                    said.append(self._finish_reading(generation, state, hidden_1LD))
                elif generation not in ended:
                    self._join(generation, state, hidden_1LD)
                elif generation.request.park or generation.request.keep:
                    self._end_turn(generation, state, hidden_1LD, None)
        return said

    def _say(
        self, generations: Sequence[Generation], log_probs_BV: Tensor, injections: dict[int, Injection]
    ) -> tuple[list[Token], list[Generation]]:
        """Samples a token per row; the tokens, and the generations whose turns are over by them."""
        now = self._clock()
        mixed = {row for row, injection in injections.items() if injection.policy_weight > 0}
        chosen = [
            row
            for row, generation in enumerate(generations)
            if generation.request.sampling.temperature > 0 or row in mixed or generation.forced
        ]
        picked, logprobs, whole = look_up(log_probs_BV, chosen)
        for row, log_probs_V in whole.items():
            generation, sampling = generations[row], generations[row].request.sampling
            if row in mixed:
                injection = injections[row]
                plan = injection.plan
                tokens, probs = torch.tensor(plan.policy_tokens_A), torch.tensor(plan.policy_probs_A)
                log_probs_V = mix_policy(log_probs_V, tokens, probs, injection.policy_weight)
                picked[row] = int(log_probs_V.argmax())
            if sampling.temperature > 0:
                picked[row] = choose_token(log_probs_V, sampling, generation.rng.random())
            if generation.forced:
                picked[row] = generation.forced.pop()
            logprobs[row] = float(log_probs_V[picked[row]])
        said, ended = [], []
        for row, generation in enumerate(generations):
            position = generation.say(picked[row])
            if generation.request.pace is not None:
                self._note_beat(generation, now)
            reason = generation.finish_reason()
            said.append(
                Token(
                    generation.id, position, picked[row], logprobs[row], reason is not None, reason, injections.get(row)
                )
            )
            if reason is not None:
                ended.append(generation)
        self._note_time(generations, now)
        for generation in ended:
            if not generation.request.park:
                self._end(generation)
        return said, ended

    def _note_beat(self, generation: Generation, now: float) -> None:
        pace = generation.request.pace
        assert pace is not None
        since = now - self._began
        generation.tick = first_beat(since, pace) if generation.generated == 1 else beat(since, pace)

    def _note_time(self, generations: Sequence[Generation], now: float) -> None:
        """How long the tokens took; for generations in step with each other it is counted together."""
        for said_at, times in Counter([g.said_at for g in generations if g.generated > 1]).items():
            self.metrics.token_seconds.add(now - said_at, times)
        latest = generations[-1]
        if latest.generated > 1 and latest.request.pace is None:
            interval = now - latest.said_at
            self._interval = (
                interval if self._interval is None else self._interval + _SMOOTHING * (interval - self._interval)
            )
        for generation in generations:
            generation.said_at = now

    # ---------------------------------------------------------------- joining and leaving

    def _join(self, generation: Generation, state: ModelState, hidden_1LD: Tensor) -> None:
        self._take_slot(generation)
        self._slots.put([generation.slot], state, hidden_1LD)
        self._active.append(generation)

    def _take_slot(self, generation: Generation) -> None:
        if not self._free:
            before = self._slots.capacity
            self._slots.grow(min(2 * before, self.config.max_batch))
            self._free = list(range(before, self._slots.capacity))
        generation.slot = self._free.pop()
        self._paced += generation.request.pace is not None
        lag = generation.request.deliberation.max_lag
        self._max_lag = max(self._max_lag, lag) if self._active else lag

    def _leave(self, generation: Generation) -> None:
        """Gives the slot back."""
        self._active.remove(generation)
        self._slots.free(generation.slot)
        self._free.append(generation.slot)
        self._paced -= generation.request.pace is not None
        generation.slot, generation.steered_until = -1, NEVER

    def _end(self, generation: Generation) -> None:
        """Nothing of a generation is left."""
        self._deliberation.end(generation)
        del self._generations[generation.id]

    def _leave_cancelled(self) -> list[Token]:
        self._any_cancelled = False
        gone = [g for g in self._generations.values() if g.cancelled]
        self._waiting = deque(prompt for prompt in self._waiting if not prompt.generation.cancelled)
        self._reading = [prompt for prompt in self._reading if not prompt.generation.cancelled]
        for generation in gone:
            if generation.slot >= 0:
                self._leave(generation)
            self._end(generation)
        return [Token(g.id, g.position, -1, 0.0, True, "cancelled") for g in gone]

    # ---------------------------------------------------------------- turns, and states that are put aside

    def _nothing_read(self) -> tuple[ModelState, Tensor]:
        sizes = self._model.config.model.backbone
        return self._model.backbone.initial_state(1), torch.zeros(
            1, sizes.n_layer, sizes.d_model, device=device_of(self._model)
        )

    def _finish_reading(self, generation: Generation, state: ModelState, hidden_1LD: Tensor) -> Token:
        """Hands out the state after a prompt that was only to be read, its last token left to be consumed."""
        self._kept.append(self._saved(generation, state, hidden_1LD, None))
        self._end(generation)
        return Token(generation.id, generation.position, -1, 0.0, True, "read")

    def _resume(self, prompt: Prompt) -> None:
        """Puts a saved generation back into the batch, in the middle of its turn."""
        generation = prompt.generation
        saved = generation.request.start
        assert saved is not None
        self._take_slot(generation)
        self._slots.restore(generation.slot, *unpack(saved))
        generation.steered_until = saved.expires
        generation.said_at = self._clock()
        if generation.request.pace is not None:
            generation.tick = first_beat(self._clock() - self._began, generation.request.pace)
        self._active.append(generation)

    def _end_turn(
        self, generation: Generation, state: ModelState, hidden_1LD: Tensor, steering: Steering | None
    ) -> None:
        """The state of a turn that is over: handed out, or kept until the next turn or until there are too many."""
        self._deliberation.end(generation)
        saved = self._saved(generation, state, hidden_1LD, steering)
        if generation.request.keep:
            self._kept.append(saved)
        if generation.request.park:
            self._parking.put(generation, saved)

    def _saved(
        self, generation: Generation, state: ModelState, hidden_1LD: Tensor, steering: Steering | None
    ) -> SavedGeneration:
        return put_aside(generation, self.checkpoint, self._deliberation, state, hidden_1LD, steering)
