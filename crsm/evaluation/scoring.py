"""How likely a model finds given texts, and what it says on from them: what log-likelihood benchmarks are made of.

Texts are scored by the engine itself: it consumes the context as a prompt and is then made to say the tokens of the
continuation, whatever it would have said. A token's log-probability is that of the distribution it would have been
sampled from. So System 2's log-likelihood is the chain rule over the process in which it speaks,

    log p₂(c | x) = Σ_t log p(c_t | x, c_<t, the plans in force before c_t)

by the virtual clock: a plan asked for after ``c_s`` knows ``x, c_≤s`` alone, is written before its target is consumed
if the tokens it assumed are those of the continuation, and is dropped otherwise. Whatever steers ``c_t`` is a function
of ``x, c_<t`` (and the seed), so that p₂ is a distribution over texts like p₁. With all gates 0 it *is* p₁, bit for
bit. The first ``1 + lag`` tokens of a continuation come before any plan can act, and score alike under both.

Contexts and continuations are cut as lm-eval cuts them for causal models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crsm.config import DeliberationConfig, EngineConfig, SamplingConfig
from crsm.data.tokenizer import Tokenizer
from crsm.engine import Engine
from crsm.evaluation.solving import OFFLINE_CHUNK
from crsm.generation import GenerationRequest
from crsm.metrics import PlanMetrics
from crsm.model import Checkpoint
from crsm.planners import Planners


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens to be scored, and what comes before them."""

    context: tuple[int, ...]
    """At least one token."""
    tokens: tuple[int, ...]
    """At least one token."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model thinks of some continuations."""

    logprobs: tuple[tuple[float, ...], ...]
    """Of every token of every continuation, in order."""
    metrics: PlanMetrics

    @property
    def totals(self) -> list[float]:
        """Log-probability of each continuation."""
        return [sum(row) for row in self.logprobs]


def encode_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> Continuation:
    """The tokens of a text after a context; an empty context is the end of another text.

    White space at the context's end belongs to the continuation, and both are encoded together, so that a token that
    spans nothing but the gap is written as in running text.

    Raises:
        ValueError: the continuation is empty, or the vocabulary cannot write one of them.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if (not continuation.strip() and tokenizer.kind == "closed") or not continuation:
        raise ValueError("the continuation is empty; allowed: text")
    if not context:
        return Continuation((tokenizer.eos_id,), tuple(tokenizer.encode(continuation)))
    before = tokenizer.encode(context)
    together = tokenizer.encode(context + continuation)
    # A tokenizer may write the two as no more tokens than the first alone.
    return Continuation(tuple(before), tuple(together[len(before) :] or tokenizer.encode(continuation)))


def windows(tokens: Sequence[int], prefix: int, size: int) -> Iterator[Continuation]:
    """A long text as continuations that hold every token once: of ``size`` tokens each, given the token before them
    (``prefix`` before the first). The last one is given as many as make it as long as the others."""
    if tokens:
        yield Continuation((prefix,), tuple(tokens[:size]))
    for start in range(size, len(tokens), size):
        end = min(start + size, len(tokens))
        yield Continuation(tuple(tokens[end - size - 1 : start]), tuple(tokens[start:end]))


def score(
    checkpoint: Checkpoint,
    continuations: Sequence[Continuation],
    *,
    planners: Planners | None = None,
    deliberation: DeliberationConfig | None = None,
    simulations: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Scores:
    """Log-probabilities of continuations.

    Args:
        checkpoint: the model.
        continuations: what to score.
        planners: System 2; None: System 1 alone. Not closed here.
        deliberation: None: the checkpoint's.
        simulations: budget per plan; None: the checkpoint's.
        seed: of the search for the first continuation, the next number for the next.
        names: what the generations are called.
    """
    names = names or [f"continuation-{index}" for index in range(len(continuations))]
    loop = _engine(checkpoint, planners)
    requests = [
        GenerationRequest(
            continuation.context,
            SamplingConfig(max_tokens=len(continuation.tokens), seed=seed + index, ignore_eos=True),
            deliberation or checkpoint.config.deliberation,
            simulations or checkpoint.config.search.simulations,
            generation_id=name,
            forced=continuation.tokens,
        )
        for index, (name, continuation) in enumerate(zip(names, continuations, strict=True))
    ]
    logprobs: dict[str, list[float]] = {name: [] for name in names}
    for token in loop.generate(requests):
        logprobs[token.generation_id].append(token.logprob)
    return Scores(tuple(tuple(logprobs[name]) for name in names), loop.metrics)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to go on from, and when to stop."""

    tokens: tuple[int, ...]
    sampling: SamplingConfig
    until: tuple[str, ...] = ()
    """Texts at which an answer ends; they are no part of it."""


def say(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    *,
    planners: Planners | None = None,
    deliberation: DeliberationConfig | None = None,
    simulations: int | None = None,
) -> list[tuple[tuple[int, ...], str]]:
    """Tokens and text of an answer to every prompt; the text ends before the first of ``until``, and before the token
    that ends an answer.

    Args:
        checkpoint: the model.
        prompts: what to go on from.
        planners: System 2; None: System 1 alone. Not closed here.
        deliberation: None: the checkpoint's.
        simulations: budget per plan; None: the checkpoint's.
    """
    loop = _engine(checkpoint, planners)
    by_name = {f"prompt-{index}": prompt for index, prompt in enumerate(prompts)}
    requests = [
        GenerationRequest(
            prompt.tokens,
            prompt.sampling,
            deliberation or checkpoint.config.deliberation,
            simulations or checkpoint.config.search.simulations,
            generation_id=name,
        )
        for name, prompt in by_name.items()
    ]
    terminal = set(checkpoint.tokenizer.terminal_ids)
    said: dict[str, list[int]] = {name: [] for name in by_name}
    streams = {name: checkpoint.tokenizer.stream() for name in by_name}
    texts = dict.fromkeys(by_name, "")
    for token in loop.generate(requests):
        name = token.generation_id
        if token.token < 0:
            continue
        said[name].append(token.token)
        if token.token in terminal and not by_name[name].sampling.ignore_eos:
            continue
        texts[name] += streams[name].push(token.token)
        if not token.finished and any(stop in texts[name] for stop in by_name[name].until):
            loop.cancel(name)
    return [
        (tuple(said[name]), _before(texts[name] + streams[name].flush(), prompt.until))
        for name, prompt in by_name.items()
    ]


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop in text)])]


def _engine(checkpoint: Checkpoint, planners: Planners | None) -> Engine:
    config = EngineConfig(clock="virtual", max_batch=checkpoint.config.engine.max_batch, prefill_chunk=OFFLINE_CHUNK)
    return Engine(checkpoint, planners, config)
