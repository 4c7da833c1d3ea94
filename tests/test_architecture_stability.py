"""What keeps a steered model sound: bounded states, gates that cost nothing shut, and better states that pay."""

from __future__ import annotations

import numpy as np
import torch

from crsm.config import DeliberationConfig, SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.injection import inject
from crsm.planners import InlinePlanners
from crsm.reasoning import Deliberator
from crsm.steering import advance, no_steering, steer
from crsm.types import Injection, concat_states
from tests.fixtures import PROMPT, a_request, make_plan, norms, random_state, tiny_checkpoint, tiny_config
from tests.recall import KEYS, answer_loss, states_before_the_query, texts, trained, with_keys


def test_ten_thousand_hostile_injections_never_make_a_state_grow() -> None:
    """Guarantee 2 through ``steer``: huge, tiny and middling writes, gates wide open, before every token of four
    generations, each superseding the last, which two withdraw and two leave in. No norm is ever larger than right
    before it, and over all the tokens none is more than a small factor larger than unsteered."""
    checkpoint, rows = tiny_checkpoint(), range(4)
    plain = state = concat_states([random_state(checkpoint, PROMPT[: 2 + row]) for row in rows])
    steering = no_steering(state)
    rng = np.random.default_rng(0)
    plans = [
        make_plan(a_request(), checkpoint, seed=seed, scale=float(scale), line=(20,) * 4)
        for seed, scale in enumerate(10.0 ** rng.uniform(-6, 12, size=64))
    ]
    highest, reached = norms(plain), norms(state)
    for _ in range(10_000 // len(rows)):
        due = {row: Injection(plans[rng.integers(64)], 6, tuple((rng.random(2) ** 0.25).tolist())) for row in rows}
        before = norms(state)
        state, steering = steer(state, steering, due, [6] * 4, [True, True, False, False])
        assert (norms(state) <= before * (1 + 2e-6)).all()
        with torch.inference_mode():
            tokens = torch.tensor(rng.integers(7, 31, size=4))
            out = checkpoint.model.backbone.step(tokens, state)
            state, steering = out.state, advance(steering, out.decay_LBH, 0)
            plain = checkpoint.model.backbone.step(tokens, plain).state
        highest, reached = torch.maximum(highest, norms(plain)), torch.maximum(reached, norms(state))
    assert (reached.amax(dim=1) <= 2 * highest.amax(dim=1)).all()
    assert (norms(state) > 1e-6).all(), "nor may they have vanished: a state of zeros has nothing to bound"


def test_a_planner_with_random_weights_and_shut_gates_costs_nothing() -> None:
    """Uncalibrated, and calibrated but below its threshold: the tokens are System 1's own, bit for bit."""
    for threshold in (None, 2.0):
        checkpoint = tiny_checkpoint(calibrated=False)
        if threshold is not None:
            checkpoint.model.gate.calibrate(torch.ones(2), torch.ones(2), threshold)
        requests = [
            GenerationRequest(PROMPT[:length], SamplingConfig(max_tokens=12), DeliberationConfig(lag=0), 8)
            for length in (6, 6, 3)
        ]
        alone = list(Engine(checkpoint).generate(requests))
        engine = Engine(checkpoint, InlinePlanners(Deliberator.from_checkpoint(checkpoint)))
        steered = list(engine.generate(requests))
        assert [(t.token, t.logprob) for t in steered] == [(t.token, t.logprob) for t in alone]
        assert engine.metrics.simulations == 3 * 11 * 8 and engine.metrics.injections == 0


def test_confidence_scales_how_far_a_state_is_moved() -> None:
    checkpoint = tiny_checkpoint(tiny_config(kind="exact"))
    state = random_state(checkpoint)
    moved = []
    for confidence in (0.0, 0.25, 0.5, 1.0):
        plan = make_plan(a_request(), checkpoint, scale=0.1)
        new, _ = steer(state, no_steering(state), {0: Injection(plan, 6, (confidence,) * 2)}, [6], [False])
        moved.append(float((new.layers[0].ssm_BHPN - state.layers[0].ssm_BHPN).norm()))
    np.testing.assert_allclose(np.array(moved[1:]) / moved[3], [0.25, 0.5, 1.0], rtol=1e-3)
    assert moved[0] == 0.0


def test_the_loss_falls_as_the_state_is_moved_towards_a_better_informed_one() -> None:
    """From the memory of a text that said a wrong key towards that of the text with the right one: the further a state
    is moved, within its ball, the lower the loss of the answer. A move as far in a random direction brings nothing."""
    checkpoint = trained()
    right_BT, key_B = texts(np.random.default_rng(5), 200)
    wrong_B = torch.tensor([KEYS[(KEYS.index(key) + 1) % len(KEYS)] for key in key_B.tolist()])
    state = states_before_the_query(checkpoint, with_keys(right_BT, wrong_B))
    better = states_before_the_query(checkpoint, right_BT)
    generator = torch.Generator().manual_seed(0)

    def moved(share: float, *, random: bool = False) -> float:
        layers = []
        for layer, target in zip(state.layers, better.layers, strict=True):
            write = target.ssm_BHPN - layer.ssm_BHPN
            if random:
                noise = torch.randn(write.shape, generator=generator)
                length_BH = write.flatten(2).norm(dim=2) / noise.flatten(2).norm(dim=2)
                write = noise * length_BH[..., None, None]
            layers.append(inject(layer.ssm_BHPN, write, torch.full((len(key_B),), share)))
        return answer_loss(checkpoint, state.with_ssm(tuple(layers)), key_B)

    losses = [moved(share) for share in (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > np.log(len(KEYS)) and losses[-1] < 0.1
    assert moved(1.0, random=True) > np.log(len(KEYS))
