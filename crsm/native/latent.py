"""The latent network in C++: world model, fused policy head and critics, as a search calls them.

What is computed is defined by ``crsm/latent_dynamics.py``, ``crsm/fusion.py``, ``crsm/critic.py`` and, for the
evaluator and the projection, ``crsm/reasoning.py``; results differ from theirs by rounding only. A row's result is bit
by bit the same whatever rows are computed with it, with any number of threads. Equally likely tokens are ordered by
their id.

Letters: B snapshots, F futures (the trees of a search), R rows, L layers, M read layers, D d_model, H heads, P head
dimension, N d_state, E = H · P, G width, W decoder width, V vocabulary, A actions, T assumed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from crsm.config import Config
from crsm.native import require
from crsm.native.decoder import plain

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
TokenArray = np.ndarray[Any, np.dtype[np.int64]]


class LatentFuture(NamedTuple):
    """Projected futures, F = B · hypotheses, those of a snapshot neighbouring and the likeliest first."""

    latent_FG: FloatArray
    hidden_FLD: FloatArray
    """Imagined residual stream at the target."""
    memory_F: TokenArray
    """The snapshot that each future reads."""
    assumed_FT: TokenArray
    """Assumed tokens between request and target."""


class LatentNetwork:
    """Packed weights; immutable, and shared by any number of evaluators and threads."""

    def __init__(self, weights: Any, model: nn.Module, world_model: nn.Module) -> None:
        self._core, self._weights, self._models = require(), weights, (model, world_model)
        self._places = [_place(model, world_model, name) for name in _ARGUMENTS]
        self._fingerprint = self._fingerprint_now()

    @classmethod
    def from_model(cls, model: nn.Module, world_model: nn.Module) -> LatentNetwork:
        """Packs the weights of a CRSM and of a latent world model on its embedding; they are copied.

        Raises:
            ValueError: a tensor has another shape than the settings say, is not float32 on the CPU, or holds NaN or
                infinity; the message names it.
            RuntimeError: there is no native core.
        """
        core = require()
        sizes = cast(Config, model.config).model
        tensors = _tensors(model, world_model)
        for name, (tensor, shape) in tensors.items():
            _check(name, tensor, shape)
        arrays = {_ARGUMENTS[name]: tensor.detach().contiguous().numpy() for name, (tensor, _) in tensors.items()}
        arrays["fusion_L"] = _mixture(arrays["fusion_L"])
        weights = core.latent_weights(
            **arrays,
            num_read_M=len(sizes.world_model.read_layers or range(sizes.backbone.n_layer)),
            norm_eps=sizes.backbone.norm_eps,
        )
        return cls(weights, model, world_model)

    def is_current(self, model: nn.Module, world_model: nn.Module) -> bool:
        """Whether these are still the weights of the two: the same parameters, not written to since."""
        return (
            self._models[0] is model and self._models[1] is world_model and self._fingerprint == self._fingerprint_now()
        )

    def _fingerprint_now(self) -> list[tuple[int, int, int]]:
        """Changes when a parameter is replaced or written to. Tensors made in inference mode count no versions."""
        tensors = (module._parameters[name] for module, name in self._places)
        return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None]

    @property
    def num_bytes(self) -> int:
        return int(self._weights.bytes)

    def memory(self, memory_BMHPN: np.ndarray, threads: int = 0) -> Any:
        """Checks the SSM memories of some snapshots. The array is kept and read, not copied; leave it as it is.

        Args:
            memory_BMHPN: as in a ``Snapshot``. Shape `[B, M, H, P, N]`, float32.

        Raises:
            ValueError: wrong shape or type, or NaN or infinity; the snapshot and the read layer are named.
        """
        return self._core.latent_memory(self._weights, plain(memory_BMHPN), threads)

    def project(
        self,
        memory: Any,
        hidden_BLD: np.ndarray,
        known_B: np.ndarray,
        lag: int,
        hypotheses: int = 1,
        threads: int = 0,
    ) -> LatentFuture:
        """Rolls the world model over the known tokens and then over its own likeliest predictions.

        Args:
            memory: memories of the B snapshots.
            hidden_BLD: their residual streams. Shape `[B, L, D]`, float32.
            known_B: the sampled tokens that the snapshots have not consumed. Shape `[B]`, int64.
            lag: tokens to assume.
            hypotheses: futures per snapshot.

        Raises:
            ValueError: an argument has a wrong shape or type, or is out of range.
        """
        hidden_BLD, known_B = plain(hidden_BLD), plain(known_B)
        found = self._core.latent_project(self._weights, memory, hidden_BLD, known_B, lag, hypotheses, threads)
        return LatentFuture(*found)

    def advance(
        self, memory: Any, memory_R: np.ndarray, latent_RG: np.ndarray, token_R: np.ndarray, threads: int = 0
    ) -> tuple[FloatArray, FloatArray]:
        """Consumes one token a row: new latents `[R, G]`, and predicted residual streams `[R, L, D]`.

        Raises:
            ValueError: an argument has a wrong shape or type, or is out of range.
        """
        arrays = (plain(a) for a in (memory_R, latent_RG, token_R))
        latent, hidden = self._core.latent_advance(self._weights, memory, *arrays, threads)
        return latent, hidden

    def heads(self, hidden_RLD: np.ndarray, threads: int = 0) -> tuple[FloatArray, FloatArray]:
        """Fused policy head and critics: logits `[R, V]`, and values `[R, L]`.

        Raises:
            ValueError: ``hidden_RLD`` has a wrong shape or type.
        """
        logits, values = self._core.latent_heads(self._weights, plain(hidden_RLD), threads)
        return logits, values

    def evaluator(
        self,
        memory: Any,
        future: LatentFuture,
        num_actions: int,
        terminal_tokens: Iterable[int],
        threads: int = 0,
    ) -> Any:
        """The evaluator of one search over the F futures; an object of the extension module.

        It is a ``NativeEvaluator`` of ``crsm/search/native.py``; ``remap`` moves latents with a tree that is reused.
        A terminal token takes over the value of the position that it ends. For one thread at a time.

        Raises:
            ValueError: wrong shapes or types, a future's latent or residual stream holds NaN or infinity (tree and
                layer are named), or ``num_actions`` is below 1.
        """
        latent_FG, hidden_FLD, memory_F = (plain(a) for a in (future.latent_FG, future.hidden_FLD, future.memory_F))
        return self._core.latent_evaluator(
            self._weights, memory, memory_F, latent_FG, hidden_FLD, sorted(terminal_tokens), num_actions, threads
        )


def unfit(model: nn.Module, world_model: nn.Module) -> str:
    """Why the weights of these two cannot be packed: their type or their device. Empty: they can."""
    for name, (tensor, _) in _tensors(model, world_model).items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return f"{name} is {tensor.dtype} on {tensor.device}"
    return ""


_ARGUMENTS = {
    "backbone.embedding.weight": "embedding_VD",
    "world_model.encoder.weight": "encoder_weight",
    "world_model.encoder.bias": "encoder_bias",
    "world_model.query.weight": "query_weight",
    "world_model.query.bias": "query_bias",
    "world_model.read.weight": "read_weight",
    "world_model.read.bias": "read_bias",
    "world_model.cell.weight_ih": "cell_weight_ih",
    "world_model.cell.weight_hh": "cell_weight_hh",
    "world_model.cell.bias_ih": "cell_bias_ih",
    "world_model.cell.bias_hh": "cell_bias_hh",
    "world_model.decoder_linear.weight": "linear_weight",
    "world_model.decoder_linear.bias": "linear_bias",
    "world_model.decoder_in.weight": "in_weight",
    "world_model.decoder_in.bias": "in_bias",
    "world_model.decoder_out.weight": "out_weight",
    "world_model.decoder_out.bias": "out_bias",
    "fusion.logits_L": "fusion_L",
    "critic.weight_LD": "critic_LD",
    "critic.bias_L": "critic_bias_L",
    "backbone.norm_f.weight": "norm_D",
    "lm_head.weight": "lm_head_VD",
}
"""Tensors of a checkpoint by their name there, and what the extension module calls them."""


def _tensors(model: nn.Module, world_model: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """The tensors by their names, with the shapes that the settings give them."""
    sizes = cast(Config, model.config).model
    backbone, world = sizes.backbone, sizes.world_model
    vocab, d_model, layers, width = backbone.vocab_size, backbone.d_model, backbone.n_layer, world.width
    read = len(world.read_layers or range(layers))
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embedding.weight": (vocab, d_model),
        "world_model.encoder.weight": (width, layers * d_model),
        "world_model.encoder.bias": (width,),
        "world_model.query.weight": (read * backbone.d_state, width + d_model),
        "world_model.query.bias": (read * backbone.d_state,),
        "world_model.read.weight": (width, read * backbone.d_inner),
        "world_model.read.bias": (width,),
        "world_model.cell.weight_ih": (3 * width, d_model + width),
        "world_model.cell.weight_hh": (3 * width, width),
        "world_model.cell.bias_ih": (3 * width,),
        "world_model.cell.bias_hh": (3 * width,),
        "world_model.decoder_linear.weight": (layers * d_model, width),
        "world_model.decoder_linear.bias": (layers * d_model,),
        "world_model.decoder_in.weight": (world.decoder_width, width),
        "world_model.decoder_in.bias": (world.decoder_width,),
        "world_model.decoder_out.weight": (layers * d_model, world.decoder_width),
        "world_model.decoder_out.bias": (layers * d_model,),
        "fusion.logits_L": (layers,),
        "critic.weight_LD": (layers, d_model),
        "critic.bias_L": (layers,),
        "backbone.norm_f.weight": (d_model,),
        "lm_head.weight": (vocab, d_model),
    }
    places = {name: _place(model, world_model, name) for name in shapes}
    return {name: (places[name][0].get_parameter(places[name][1]), shape) for name, shape in shapes.items()}


def _place(model: nn.Module, world_model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and the parameter's name there."""
    path, _, last = name.rpartition(".")
    part, _, rest = path.partition(".")
    return (world_model.get_submodule(rest) if part == "world_model" else model.get_submodule(path)), last


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {shape}")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; allowed: torch.float32 on the cpu")
    array = tensor.detach().numpy()
    # A fusion logit of -inf is a layer without weight.
    finite = np.isfinite(array) | (array == -np.inf if name == "fusion.logits_L" else False)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        layer = f", layer {index[0]}" if name.startswith(("critic.", "fusion.")) else ""
        raise ValueError(f"{name}{layer}: [{', '.join(map(str, index))}] = {array[index]}; allowed: finite numbers")


def _mixture(logits_L: np.ndarray) -> np.ndarray:
    weights_L = torch.from_numpy(logits_L).softmax(dim=0).numpy()
    if not np.isfinite(weights_L).all():
        raise ValueError(f"fusion.logits_L = {logits_L.tolist()}; allowed: at least one finite")
    return weights_L
