"""The model ``crsm`` of EleutherAI's lm-evaluation-harness: the standard tasks asked of either system.

    python -m crsm.evaluation.lm_eval_model --model crsm --model_args checkpoint=DIR,system=2 --tasks arc_easy

is ``lm_eval`` with this model registered; in Python, :func:`register` does it. lm-eval is the extra ``eval``; nothing
here imports it before it is needed.

What a log-likelihood of System 2 is, and how texts are cut into tokens and windows, is said in
:mod:`crsm.evaluation.scoring`: ``jobs.evaluate`` computes the same numbers by the same functions.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crsm.config import SamplingConfig
from crsm.evaluation.comparison import system_planners
from crsm.evaluation.scoring import Continuation, Prompt, encode_continuation, say, score, windows
from crsm.model import Checkpoint, load_checkpoint, use_settings
from crsm.overrides import merge_settings
from crsm.planners import Planners
from crsm.threads import use_threads

NAME = "crsm"
Pair = tuple[str, str]


class HarnessModel:
    """What the harness asks of a model, on plain data."""

    def __init__(
        self,
        checkpoint: str = "nano",
        system: int = 1,
        config: str | None = None,
        lag: int | None = None,
        rate: float | None = None,
        simulations: int | None = None,
        seed: int | None = None,
        max_length: int = 1024,
        max_gen_toks: int = 256,
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
            checkpoint: a folder, or the name of a shipped one.
            system: 1, or 2: with planners, by the virtual clock.
            config: settings (YAML) on top of the checkpoint's.
            lag: of the plans; None: the settings'.
            rate: injection rate; None: the settings'.
            simulations: of a plan; None: the settings'.
            seed: of sampling and search; None: the settings'.
            max_length: tokens of a window of a long text.
            max_gen_toks: tokens of an answer, where a task does not say.
            threads: of torch and the native core; None: as they are.
            batch_size: sequences decoded together; ``auto``, None and 1, the harness's default: the settings'.
            max_batch_size: not used: memory is known in advance.
            device: not used: the CPU; the harness names a GPU whether there is one or not.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        if str(system) not in ("1", "2"):
            raise ValueError(f"system = {system!r}; allowed: 1, 2")
        for name, value in (("max_length", max_length), ("max_gen_toks", max_gen_toks)):
            if not isinstance(value, int) or value < 2:
                raise ValueError(f"{name} = {value!r}; allowed: a whole number from 2 on")
        if threads is not None:
            use_threads(threads)
        changes = {
            "deliberation.lag": lag,
            "deliberation.injection_rate": rate,
            "search.simulations": simulations,
            "engine.max_batch": None if str(batch_size).partition(":")[0] in ("auto", "1") else batch_size,
        }
        overrides = [f"{name}={value}" for name, value in changes.items() if value is not None]
        self.checkpoint: Checkpoint = load_checkpoint(checkpoint)
        use_settings(self.checkpoint, merge_settings(self.checkpoint.config, config, overrides, seed))
        self.system, self.max_length, self.max_gen_toks = int(system), max_length, max_gen_toks

    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would say it."""
        tokenizer = self.checkpoint.tokenizer
        encoded = [encode_continuation(tokenizer, *pair) for pair in pairs]
        totals = self._totals(encoded)
        # One greedy answer per context, as long as the longest of its continuations, answers for all of them.
        lengths: dict[tuple[int, ...], int] = {}
        for one in encoded:
            lengths[one.context] = max(lengths.get(one.context, 0), len(one.tokens))
        prompts = [
            Prompt(context, SamplingConfig(max_tokens=length, ignore_eos=True, seed=self._seed))
            for context, length in lengths.items()
        ]
        greedy = dict(zip(lengths, (tokens for tokens, _ in self._say(prompts)), strict=True))
        return [
            (total, greedy[one.context][: len(one.tokens)] == one.tokens)
            for total, one in zip(totals, encoded, strict=True)
        ]

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of whole texts, each after the end of another one, in windows."""
        tokenizer = self.checkpoint.tokenizer
        cut = [
            list(windows(tokenizer.encode(text), tokenizer.eos_id, self.max_length)) if text.strip() else []
            for text in texts
        ]
        totals = iter(self._totals([one for pieces in cut for one in pieces]))
        return [sum(next(totals) for _ in pieces) for pieces in cut]

    def generate(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What is said on from each context, with lm-eval's settings of a generation."""
        tokenizer = self.checkpoint.tokenizer
        prompts = [
            Prompt(
                tuple(tokenizer.encode(context)) if context else (tokenizer.eos_id,),
                self._sampling(settings, index),
                _stops(settings),
            )
            for index, (context, settings) in enumerate(asked)
        ]
        return [text for _, text in self._say(prompts)]

    # ---------------------------------------------------------------- the engine

    @property
    def _seed(self) -> int:
        return self.checkpoint.config.seed

    def _planners(self) -> Planners | None:
        config = self.checkpoint.config
        planners, _ = system_planners(
            f"system{self.system}",
            self.checkpoint,
            deliberation=config.deliberation,
            search=config.search,
            seed=config.seed,
            solutions=dict,
        )
        return planners

    def _totals(self, encoded: Sequence[Continuation]) -> list[float]:
        return score(self.checkpoint, encoded, planners=self._planners(), seed=self._seed).totals if encoded else []

    def _say(self, prompts: Sequence[Prompt]) -> list[tuple[tuple[int, ...], str]]:
        return say(self.checkpoint, prompts, planners=self._planners()) if prompts else []

    def _sampling(self, settings: Mapping[str, Any], index: int) -> SamplingConfig:
        temperature = float(settings.get("temperature") or 0.0)
        sampled = settings.get("do_sample", temperature > 0)
        return SamplingConfig(
            temperature=(temperature or 1.0) if sampled else 0.0,
            top_k=int(settings.get("top_k") or 0),
            top_p=float(settings.get("top_p") or 1.0),
            max_tokens=int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or self.max_gen_toks),
            seed=self._seed + index,
        )


def _stops(settings: Mapping[str, Any]) -> tuple[str, ...]:
    until = settings.get("until") or ()
    return (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)


@functools.cache
def register() -> type:
    """Makes ``crsm`` known to lm-eval; the class that it is known by.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        model = importlib.import_module("lm_eval.api.model")
        registry = importlib.import_module("lm_eval.api.registry")
        # The harness registers its own models only while it knows of none.
        importlib.import_module("lm_eval.models")
    except ImportError as error:
        raise ValueError("lm-eval is not installed; it is the extra `eval` (pip install 'crsm[eval]')") from error

    class CrsmLM(HarnessModel, model.LM):  # type: ignore[name-defined]
        """The harness's interface; every request is an instance whose ``args`` are plain data."""

        def __init__(self, **arguments: Any) -> None:
            model.LM.__init__(self)
            HarnessModel.__init__(self, **arguments)

        @property
        def tokenizer_name(self) -> str:
            return f"{NAME}-{self.checkpoint.weights_hash}"

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._kept("loglikelihood", requests, self.score_pairs([request.args for request in requests]))

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            return self._kept("loglikelihood_rolling", requests, self.score_texts(texts))

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return self._kept("generate_until", requests, self.generate([request.args for request in requests]))

        def _kept(self, method: str, requests: list[Any], results: list[Any]) -> list[Any]:
            for request, result in zip(requests, results, strict=True):
                self.cache_hook.add_partial(method, request.args, result)
            return results

    decorate: Callable[[type], type] = registry.register_model(NAME)
    return decorate(CrsmLM)


def main() -> None:
    """The harness's own command line, with this model. A mistake is one line, and a traceback with ``CRSM_DEBUG=1``."""
    try:
        register()
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except ValueError as error:
        if os.environ.get("CRSM_DEBUG"):
            raise
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
