"""Hugging Face transformers' Mamba2ForCausalLM of the same shape: its PyTorch path, which is what a CPU gets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.speed.peers.process import PeerError, WorkerProcess
from jobs.speed.shapes import Shape
from jobs.speed.timing import timed

if TYPE_CHECKING:
    import torch
    from torch import Tensor


WORKER = Path(__file__).with_name("transformers_worker.py")


class TransformersPeer:
    """A model in a process of its own; what was prepared last is what :meth:`run` times."""

    def __init__(self, stack: ExitStack, shape: Shape, seed: int, threads: int) -> None:
        """
        Args:
            stack: ends the process.

        Raises:
            PeerError: transformers is not installed, or the process cannot be started.
        """
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise PeerError(f"not installed: {error}") from None
        self._worker = stack.enter_context(WorkerProcess(sys.executable, WORKER, threads=threads))
        self._worker.ask(do="load", shape=asdict(shape), seed=seed)

    def prepare(self, what: str, tokens_BT: Tensor, **settings: int) -> dict[str, Any]:
        """``train``, ``prefill`` or ``decode`` (with ``steps``): what the worker's methods of these names say."""
        return self._worker.ask(do=what, tokens=tokens_BT.tolist(), **settings)

    def run(self) -> float:
        """Seconds of one run, by the worker's own clock."""
        return float(self._worker.ask(do="run")["seconds"])


def build(shape: Shape, seed: int) -> Any:
    """A model with random weights.

    Raises:
        PeerError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise PeerError(f"not installed: {error}") from None
    import torch

    transformers.logging.set_verbosity_error()  # it tells at every start that its kernels are missing
    config = shape.config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                vocab_size=shape.vocab_size,
                hidden_size=shape.d_model,
                num_hidden_layers=shape.n_layer,
                state_size=shape.d_state,
                head_dim=shape.headdim,
                num_heads=config.n_heads,
                n_groups=1,
                expand=config.expand,
                conv_kernel=config.d_conv,
                chunk_size=DEFAULT_CHUNK,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )


DEFAULT_CHUNK = 256
"""Its own, and that of the public checkpoints."""


def use_fastest_chunk(model: Any, run: Callable[[], object]) -> tuple[int, dict[int, float]]:
    """Sets the chunk length with which ``run`` is the fastest: its PyTorch path pays for every pair within a chunk.

    Returns:
        The length, and the seconds of one run with each that was tried, its default among them.
    """
    seconds: dict[int, float] = {}
    for chunk in (32, 64, 128, DEFAULT_CHUNK):
        _set_chunk(model, chunk)
        seconds[chunk] = timed(run)()
    best = min(seconds, key=lambda chunk: seconds[chunk])
    _set_chunk(model, best)
    return best, seconds


def _set_chunk(model: Any, chunk: int) -> None:
    for layer in model.backbone.layers:
        layer.mixer.chunk_size = chunk


def version() -> str:
    import transformers

    return str(transformers.__version__)


def loss(model: Any, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    import torch.nn.functional as F

    logits_BTV = model(tokens_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


class Decoder:
    """Greedy decoding with its cache."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    def prefill(self, tokens_BT: Tensor) -> tuple[Tensor, Any]:
        """The next tokens (B,), and the cache."""
        import torch

        with torch.inference_mode():
            out = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(dim=-1), out.cache_params

    def decode(self, token_B: Tensor, cache: Any, steps: int) -> list[torch.Tensor]:
        """``steps`` tokens more."""
        import torch

        found = []
        with torch.inference_mode():
            for _ in range(steps):
                logits_BTV = self.model(token_B[:, None], cache_params=cache, use_cache=True).logits
                token_B = logits_BTV[:, -1].argmax(dim=-1)
                found.append(token_B)
        return found
