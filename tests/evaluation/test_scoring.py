"""Log-likelihoods of both systems, against one pass over the whole text and by what they must not depend on."""

import math

import pytest
import torch

from crsm.config import SamplingConfig
from crsm.evaluation.comparison import system_planners
from crsm.evaluation.scoring import Continuation, Prompt, encode_continuation, say, score, windows
from tests.fixtures import PROMPT, FakePlanners, make_plan, text_checkpoint, tiny_bpe, tiny_checkpoint

PAIRS = (
    Continuation(PROMPT, (8, 21, 9, 12, 7, 5)),
    Continuation((10, 21, 4), (8, 23, 7)),
    Continuation((1,), (9,)),
)


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint()


def planners(checkpoint, name):
    config = checkpoint.config
    made, _ = system_planners(
        name, checkpoint, deliberation=config.deliberation, search=config.search, seed=0, solutions=dict
    )
    return made


@torch.inference_mode()
def one_pass(checkpoint, pair):
    """Log-probabilities by a single forward pass over context and continuation."""
    hidden, _ = checkpoint.model.backbone(torch.tensor([[*pair.context, *pair.tokens]]))
    log_probs = checkpoint.model.logits(hidden)[0].log_softmax(dim=-1)
    first = len(pair.context) - 1
    return [float(log_probs[first + place, token]) for place, token in enumerate(pair.tokens)]


def test_system_1_scores_as_one_pass_over_the_text_does(checkpoint):
    for row, pair in zip(score(checkpoint, PAIRS).logprobs, PAIRS, strict=True):
        assert row == pytest.approx(one_pass(checkpoint, pair), abs=1e-4)


def test_totals_are_the_sums(checkpoint):
    scores = score(checkpoint, PAIRS)
    assert scores.totals == [sum(row) for row in scores.logprobs]


def test_shut_gates_are_system_1_bit_for_bit(checkpoint):
    shut = score(checkpoint, PAIRS, planners=planners(checkpoint, "gate_zero"))
    assert shut.metrics.requests > 0
    assert shut.logprobs == score(checkpoint, PAIRS).logprobs


def test_plans_change_what_comes_after_them_and_nothing_before(checkpoint):
    lag = checkpoint.config.deliberation.lag
    steered = score(checkpoint, PAIRS, planners=FakePlanners(lambda request: [plan_of(request, checkpoint, PAIRS)]))
    plain = score(checkpoint, PAIRS)
    assert steered.metrics.injections > 0
    for mine, theirs in zip(steered.logprobs, plain.logprobs, strict=True):
        assert mine[: 1 + lag] == theirs[: 1 + lag]
    assert steered.logprobs[0][1 + lag :] != plain.logprobs[0][1 + lag :]


def plan_of(request, checkpoint, pairs):
    """A plan that assumed what the continuation is going to be."""
    pair = pairs[int(request.generation_id.rpartition("-")[2])]
    known = request.position + 1 - len(pair.context)
    return make_plan(request, checkpoint, assumed=pair.tokens[known : known + request.target - request.position])


def synchronous(checkpoint, continuations):
    """System 2 at lag 0, where random weights have no wrong assumptions to stumble over."""
    settings = checkpoint.config.deliberation.model_copy(update={"lag": 0})
    scores = score(checkpoint, continuations, planners=planners(checkpoint, "system2"), deliberation=settings)
    assert scores.metrics.injections > 0
    return scores.logprobs


def test_system_2_scores_a_continuation_alike_in_any_company(checkpoint):
    for pair, row in zip(PAIRS[:2], synchronous(checkpoint, PAIRS), strict=False):
        (alone,) = synchronous(checkpoint, [pair])
        assert alone == pytest.approx(row, abs=1e-4)
        assert alone != pytest.approx(one_pass(checkpoint, pair), abs=1e-2)


def test_system_2_is_a_distribution_over_the_next_token(checkpoint):
    """After a fixed beginning, the probabilities of all tokens that a plan may have shaped add up to 1."""
    beginning = (8, 21, 9, 12)
    vocabulary = range(checkpoint.tokenizer.vocab_size)
    every = [Continuation(PROMPT, (*beginning, token)) for token in vocabulary]
    rows = synchronous(checkpoint, every)
    assert sum(math.exp(row[-1]) for row in rows) == pytest.approx(1.0, abs=1e-4)
    assert len({row[:-1] for row in rows}) == 1


# ------------------------------------------------------------------------------------------------------------- cutting


def test_white_space_between_context_and_continuation_belongs_to_the_latter():
    bpe = tiny_bpe()
    parts = encode_continuation(bpe, "Answer: ", "rain"), encode_continuation(bpe, "Answer:", " rain")
    assert parts[0] == parts[1]
    assert bpe.decode(parts[0].tokens) == " rain"
    assert list(parts[0].context) == bpe.encode("Answer:")


def test_a_continuation_without_a_context_follows_the_end_of_a_text():
    bpe = tiny_bpe()
    assert encode_continuation(bpe, "", "rain") == Continuation((bpe.eos_id,), tuple(bpe.encode("rain")))
    assert encode_continuation(bpe, "  ", "rain").context == (bpe.eos_id,)


def test_an_empty_continuation_is_refused():
    with pytest.raises(ValueError, match="the continuation is empty"):
        encode_continuation(tiny_bpe(), "Answer:", "")


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 11])
def test_windows_hold_every_token_once_after_its_own_past(length):
    tokens = list(range(100, 100 + length))
    cut = list(windows(tokens, 1, 4))
    assert [token for one in cut for token in one.tokens] == tokens
    text = [1, *tokens]
    place = 1
    for one in cut:
        assert tuple(text[place - len(one.context) : place]) == one.context
        place += len(one.tokens)
        assert len(one.context) == 1 or len(one.context) + len(one.tokens) == 5


# -------------------------------------------------------------------------------------------------------------- saying


def test_an_answer_ends_before_the_first_stop():
    checkpoint = text_checkpoint()
    context = tuple(checkpoint.tokenizer.encode("Question:"))
    prompt = Prompt(context, SamplingConfig(max_tokens=20, ignore_eos=True))
    ((tokens, text),) = say(checkpoint, [prompt])
    assert len(tokens) == 20
    stop = text[5:7]
    ((fewer, cut),) = say(checkpoint, [Prompt(context, prompt.sampling, (stop, "never said"))])
    assert cut == text[: text.index(stop)]
    assert tokens[: len(fewer)] == fewer and len(fewer) < 20


def test_greedy_answers_are_the_likeliest_tokens(checkpoint):
    prompt = Prompt(PROMPT, SamplingConfig(max_tokens=5, ignore_eos=True))
    ((tokens, _),) = say(checkpoint, [prompt])
    others = [Continuation(PROMPT, (*tokens[:3], token)) for token in range(checkpoint.tokenizer.vocab_size)]
    best = max(others, key=lambda one: score(checkpoint, [one]).totals[0])
    assert best.tokens[3] == tokens[3]


def test_the_token_that_ends_an_answer_is_not_in_its_text(checkpoint):
    tokenizer = checkpoint.tokenizer
    sampled = [Prompt(PROMPT, SamplingConfig(max_tokens=40, temperature=3.0, seed=seed)) for seed in range(20)]
    ended = 0
    for tokens, text in say(checkpoint, sampled):
        said = tokens[:-1] if tokens[-1] in tokenizer.terminal_ids else tokens
        ended += len(said) < len(tokens)
        assert text == tokenizer.decode(said)
    assert ended
