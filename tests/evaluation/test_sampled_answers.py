"""Samples, votes and beams, each against a plain way to get the same."""

import itertools

import pytest
import torch

from crsm.config import EngineConfig, SamplingConfig
from crsm.engine import Engine
from crsm.evaluation.sampled_answers import Sample, beam_search, best_of, majority, sample_answers
from crsm.generation import GenerationRequest
from tests.fixtures import PROMPT, tiny_checkpoint

OTHER = (8, 7, 10, 25)


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint()


@torch.inference_mode()
def scored(checkpoint, prompt, answer):
    """Log-probability of an answer, and the consensus before its last token, by one pass over the whole text."""
    hidden, _ = checkpoint.model.backbone(torch.tensor([[*prompt, *answer]]))
    log_probs = checkpoint.model.logits(hidden)[0].log_softmax(dim=-1)
    total = sum(float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
    value = checkpoint.model.critic.consensus(checkpoint.model.critic(hidden[0, -2]))
    return total, float(value)


def test_samples_carry_their_probability_and_the_value_before_their_last_token(checkpoint):
    for samples, prompt in zip(
        sample_answers(checkpoint, [PROMPT, OTHER], count=5, max_tokens=6, seed=3), (PROMPT, OTHER), strict=True
    ):
        assert len({sample.tokens for sample in samples}) > 1
        for sample in samples:
            ended = sample.tokens[-1] in checkpoint.tokenizer.terminal_ids
            assert ended or len(sample.tokens) == 6
            assert not set(sample.tokens[:-1]) & set(checkpoint.tokenizer.terminal_ids)
            assert (sample.logprob, sample.value) == pytest.approx(scored(checkpoint, prompt, sample.tokens), abs=1e-4)


def test_the_first_samples_do_not_depend_on_how_many_follow_nor_on_the_batch(checkpoint):
    few = sample_answers(checkpoint, [PROMPT, PROMPT], count=2, max_tokens=5, seed=3)
    many = sample_answers(checkpoint, [PROMPT, PROMPT], count=6, max_tokens=5, seed=3, rows=6)
    assert [[s.tokens for s in row] for row in few] == [[s.tokens for s in row[:2]] for row in many]
    assert few[0] != few[1]


def test_samples_follow_the_model(checkpoint):
    drawn = sample_answers(checkpoint, [PROMPT], count=2000, max_tokens=1, seed=0)[0]
    with torch.inference_mode():
        probs = checkpoint.model.prefill(torch.tensor([PROMPT]))[0][0].softmax(dim=0)
    counts = torch.bincount(torch.tensor([sample.tokens[0] for sample in drawn]), minlength=len(probs))
    # Four standard deviations of a share of 2000 draws.
    assert (counts / 2000 - probs).abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_best_of_takes_the_value_and_majority_the_answer_whatever_its_verdict():
    yes, no = 5, 6
    samples = [
        Sample((1, 2, yes), -1.0, 0.2),
        Sample((3, 4, yes), -2.0, 0.9),
        Sample((3, 4, no), -3.0, 0.1),
        Sample((7, 8, yes), -4.0, 0.5),
    ]
    assert best_of(samples) is samples[1]
    assert majority(samples, (yes, no)) is samples[1]
    assert majority(samples[:1] + samples[3:], (yes, no)) is samples[0]


def test_a_beam_of_one_is_greedy_decoding(checkpoint):
    engine = Engine(checkpoint, config=EngineConfig())
    greedy = engine.generate_all([GenerationRequest(PROMPT, SamplingConfig(max_tokens=6))])[0]
    ((answer, consumed),) = beam_search(checkpoint, [PROMPT], width=1, max_tokens=6)
    assert answer.tokens == tuple(greedy)
    assert consumed == len(greedy) - 1


def test_a_wide_beam_finds_the_likeliest_answer_of_all(checkpoint):
    terminal, vocabulary = checkpoint.tokenizer.terminal_ids, range(checkpoint.tokenizer.vocab_size)
    every = [
        answer
        for length in (1, 2)
        for answer in itertools.product(vocabulary, repeat=length)
        if not set(answer[:-1]) & set(terminal) and (answer[-1] in terminal or length == 2)
    ]
    best = max(every, key=lambda answer: scored(checkpoint, PROMPT, answer)[0])
    ((answer, _),) = beam_search(checkpoint, [PROMPT], width=len(vocabulary) ** 2, max_tokens=2)
    assert answer.tokens == best
    assert answer.logprob == pytest.approx(scored(checkpoint, PROMPT, best)[0], abs=1e-4)
