"""Speed of decoding and of prompts: greedy loops as a user writes them, beside transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.speed import decoders
from jobs.speed.peers import mamba_ssm, transformers
from jobs.speed.peers.llama_cpp import LlamaBench
from jobs.speed.peers.process import PeerError
from jobs.speed.roofline import Roofline
from jobs.speed.rows import Row, make_row
from jobs.speed.shapes import PUBLIC_130M, SMALL, TINY, Shape, build
from jobs.speed.timing import Candidate, interleave, median, rates, synchronized, timed

if TYPE_CHECKING:
    from jobs.command import Progress

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 64}
"""Of a weight; int8 with the scale of every 64 of them."""
PROMPT = 8
"""Tokens before the ones that are timed."""


class Stream(Protocol):
    """A model and its greedy loop."""

    def prefill(self, tokens_BT: Tensor) -> tuple[Any, Any]: ...

    def decode(self, token_B: Any, state: Any, steps: int) -> object: ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is decoded per sample."""

    small: Shape = SMALL
    large: Shape = PUBLIC_130M
    tokens_small: int = 64
    tokens_large: int = 24
    prompt: int = 512
    batch: int = 16
    repeats: int = 5


QUICK = Sizes(small=TINY, large=TINY, tokens_small=4, tokens_large=4, prompt=16, batch=3)


class DecodeRows:
    """Measures one row after another; models are made once and dropped when their rows are done."""

    def __init__(self, roofline: Roofline, *, seed: int, llama: LlamaBench, sizes: Sizes) -> None:
        self.roofline, self.seed, self.llama, self.sizes = roofline, seed, llama, sizes

    # ---------------------------------------------------------------------------------------------------- one stream

    def beside_transformers(self, shape: Shape, tokens: int) -> Row:
        """fp32, one stream."""
        candidates: dict[str, Candidate] = {"ours": self._decode(self._ours(shape, "fp32"), shape, tokens)}
        note = None
        with ExitStack() as stack:
            try:
                peer = transformers.TransformersPeer(stack, shape, self.seed, self.roofline.threads)
                peer.prepare("decode", random_prompt(shape, self.seed, 1, PROMPT), steps=tokens)
                candidates["peer"] = peer.run
            except PeerError as error:
                note = f"without transformers: {error}"
            return self._row(
                f"decode {shape.name}, fp32, 1 stream", candidates, tokens, "transformers", shape, "fp32", note
            )

    def beside_llama(self, dtype: str) -> Row:
        """The public shape, one stream, in one number format."""
        shape, tokens = self.sizes.large, self.sizes.tokens_large
        candidates, note = self._ours_or_reason(shape, dtype, lambda ours: self._decode(ours, shape, tokens))
        try:
            self.llama.check(shape.name, dtype)
            candidates["peer"] = lambda: self.llama.decode(shape.name, dtype, tokens)
        except PeerError as error:
            note = f"{note}; without llama.cpp: {error}" if note else f"without llama.cpp: {error}"
        return self._row(f"decode {shape.name}, {dtype}, 1 stream", candidates, tokens, "llama.cpp", shape, dtype, note)

    def _decode(self, stream: Stream, shape: Shape, tokens: int, batch: int = 1) -> Candidate:
        token_B, state = stream.prefill(random_prompt(shape, self.seed, batch, PROMPT))
        # A cache that its library changes in place goes on from where it is: its size does not grow.
        return timed(synchronized(lambda: stream.decode(token_B, state, tokens), self.roofline.device))

    # ------------------------------------------------------------------------------------------------------- prompts

    def prompts(self) -> list[Row]:
        """Prefill of the public shape in fp32, beside both peers."""
        shape, length = self.sizes.large, self.sizes.prompt
        tokens_BT = random_prompt(shape, self.seed, 1, length)
        ours = self._ours(shape, "fp32")
        candidates: dict[str, Candidate] = {"ours": timed(lambda: ours.prefill(tokens_BT))}
        notes: dict[str, str] = {}
        with ExitStack() as stack:
            try:
                peer = transformers.TransformersPeer(stack, shape, self.seed, self.roofline.threads)
                chunk = peer.prepare("prefill", tokens_BT)["chunk"]
                notes["transformers"] = f"transformers with chunks of {chunk}, its fastest; its default is 256"
                candidates["transformers"] = peer.run
            except PeerError as error:
                notes["transformers"] = f"without transformers: {error}"
            try:
                self.llama.check(shape.name, "fp32")
                candidates["llama.cpp"] = lambda: self.llama.prefill(shape.name, "fp32", length)
            except PeerError as error:
                notes["llama.cpp"] = f"without llama.cpp: {error}"
            seconds = interleave(candidates, self.sizes.repeats)
        return [
            make_row(
                f"prefill {shape.name}, fp32, {length} tokens",
                "tokens/s",
                self.roofline.threads,
                rates(seconds["ours"], length),
                peer_name=name,
                peer=rates(seconds.get(name, ()), length),
                limit=self.roofline.gemm_gflops * 1e9 / (2 * prompt_parameters(shape)),
                limit_by="matrix products: GFLOP/s over 2 · parameters of the layers",
                note=notes.get(name),
                decoder=ours.name,
            )
            for name in ("transformers", "llama.cpp")
        ]

    # --------------------------------------------------------------------------------------------------------- batch

    def batched(self, shape: Shape, tokens: int, dtype: str = "fp32") -> Row:
        """Tokens a second of many streams together, and how many times that of one stream."""
        ours, batch = self._ours(shape, dtype), self.sizes.batch
        seconds = interleave(
            {"one": self._decode(ours, shape, tokens), "many": self._decode(ours, shape, tokens, batch)},
            self.sizes.repeats,
        )
        many, one = rates(seconds["many"], batch * tokens), rates(seconds["one"], tokens)
        gain = (median(many) or 0.0) / (median(one) or 1.0)
        return make_row(
            f"decode {shape.name}, {dtype}, {batch} streams",
            "tokens/s",
            self.roofline.threads,
            many,
            limit=self.roofline.products_per_second(shape.parameters, shape.parameters * BYTES[dtype], batch),
            limit_by="matrix products, or reading the weights once a step",
            note=f"{gain:.2f} × one stream",
            over_one_stream=gain,
            decoder=ours.name,
        )

    # ---------------------------------------------------------------------------------------------------------- GPU

    def gpu(self, shape: Shape, tokens: int, batch: int) -> Row:
        """bf16 beside mamba-ssm, both in a Python loop over tokens."""
        ours = self._ours(shape, "bf16")
        candidates = {"ours": self._decode(ours, shape, tokens, batch)}
        note = None
        try:
            model = mamba_ssm.build(shape, self.seed).to(torch.bfloat16)
            candidates["peer"] = self._decode(mamba_ssm.Decoder(model), shape, tokens, batch)
        except PeerError as error:
            note = f"without mamba_ssm: {error}"
        streams = "1 stream" if batch == 1 else f"{batch} streams"
        name = f"decode {shape.name}, bf16, {streams}, one GPU"
        return self._row(name, candidates, batch * tokens, "mamba_ssm", shape, "bf16", note, batch)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _ours(self, shape: Shape, dtype: str) -> decoders.OurDecoder:
        model = build(shape, self.seed, device=self.roofline.device, planners=False)
        return decoders.make_decoder(model, dtype)

    def _ours_or_reason(
        self, shape: Shape, dtype: str, candidate: Callable[[decoders.OurDecoder], Candidate]
    ) -> tuple[dict[str, Candidate], str | None]:
        try:
            return {"ours": candidate(self._ours(shape, dtype))}, None
        except decoders.NotOfferedError as error:
            return {}, f"ours: {error}"

    def _row(
        self,
        name: str,
        candidates: dict[str, Candidate],
        tokens: int,
        peer_name: str,
        shape: Shape,
        dtype: str,
        note: str | None,
        batch: int = 1,
    ) -> Row:
        seconds = interleave(candidates, self.sizes.repeats)
        weights = shape.parameters * BYTES[dtype]
        return make_row(
            name,
            "tokens/s",
            self.roofline.threads,
            rates(seconds.get("ours", ()), tokens),
            peer_name=peer_name,
            peer=rates(seconds.get("peer", ()), tokens),
            limit=batch * self.roofline.read_gbs_of(int(weights)) * 1e9 / weights,
            limit_by=f"reading {weights / 1e6:,.0f} MB of weights a step",
            note=note,
        )


def decode_rows(
    roofline: Roofline, *, seed: int, llama: LlamaBench, progress: Progress, quick: bool = False
) -> list[Row]:
    """All rows of ``benchmark_speed decode`` for the roofline's device."""
    sizes = QUICK if quick else Sizes()
    rows = DecodeRows(roofline, seed=seed, llama=llama, sizes=sizes)
    jobs: list[Callable[[], list[Row]]]
    if roofline.device == "cuda":
        tokens = 8 if quick else 64
        jobs = [
            lambda: [rows.gpu(sizes.large, tokens, 1)],
            lambda: [rows.gpu(sizes.large, tokens, 64)],
        ]
    else:
        jobs = [
            lambda: [rows.beside_transformers(sizes.small, sizes.tokens_small)],
            lambda: [rows.batched(sizes.small, sizes.tokens_small)],
            lambda: [rows.beside_transformers(sizes.large, sizes.tokens_large)],
            lambda: [rows.beside_llama("fp32")],
            lambda: [rows.beside_llama("bf16")],
            lambda: [rows.beside_llama("int8")],
            lambda: [rows.batched(sizes.large, sizes.tokens_large)],
            rows.prompts,
        ]
    found: list[Row] = []
    for number, job in enumerate(jobs):
        progress.update(number)
        roofline.measure_gemm()
        found += job()
    progress.update(len(jobs))
    return found


def random_prompt(shape: Shape, seed: int, batch: int, length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(shape.vocab_size, size=(batch, length)))


def prompt_parameters(shape: Shape) -> int:
    """Parameters that every token of a prompt is multiplied with: without the head, which only the last one needs."""
    return shape.parameters - shape.vocab_size * shape.d_model
