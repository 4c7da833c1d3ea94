"""The backbone in C++ as its own world model: projection and evaluations of a search without a state per position.

What is computed is defined by ``ExactDynamics`` in ``crsm/latent_dynamics.py``, ``crsm/critic.py``, ``crsm/fusion.py``
and, for the projection and the evaluator, ``crsm/reasoning.py``; results differ from theirs by rounding only. A row's
result is bit by bit the same whatever rows are computed with it, with any number of threads. Equally likely tokens are
ordered by their id.

An imagined position keeps what its token adds to the snapshot's state (decays, ``dt·x`` and ``B`` of every layer), and
its output is read from the snapshot's state and from what the tokens before it have added: the dual form of the
recurrence (arXiv 2405.21060, section 3) along a branch of the tree. So a node takes a tenth of a state or less, and
nothing of a state's size is ever written.

Letters: B snapshots, F futures (the trees of a search), L layers, D d_model, C convolution channels, K convolution
width, H heads, P head dimension, N d_state, T assumed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from crsm.native.decoder import NativeDecoder, as_array, check_parameters, parameter_places, plain, watch


class ExactFuture(Protocol):
    """Projected futures, F = B · hypotheses, those of a snapshot neighbouring and the likeliest first."""

    hidden_FLD: np.ndarray
    """Residual stream at the target."""
    assumed_FT: np.ndarray
    """Assumed tokens between request and target."""


class ExactNetwork:
    """Packed weights of backbone, head and critics; shared by any number of evaluators and threads."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: a CRSM. Its weights are copied, but for the embedding, which is read where it is.

        Raises:
            ValueError: a parameter is not float32, not on the CPU or not finite.
            RuntimeError: there is no native core.
        """
        self._model = model
        self._decoder = NativeDecoder(model)
        critic = cast(Any, model).critic
        places = [*parameter_places(model, ("critic",))]
        check_parameters(places)
        self._watch = watch(places)
        self._core = self._decoder.make_exact(as_array(critic.weight_LD), as_array(critic.bias_L))

    def is_current(self, model: nn.Module) -> bool:
        """Whether these are still the weights of this model."""
        return self._model is model and not self._decoder.is_stale() and not self._watch.changed()

    def project(
        self,
        memory_BLHPN: np.ndarray,
        conv_BLCK: np.ndarray,
        hidden_BLD: np.ndarray,
        known_B: np.ndarray,
        lag: int,
        hypotheses: int = 1,
        threads: int = 0,
    ) -> Any:
        """Rolls the backbone over the known tokens and then over its own likeliest predictions.

        Args:
            memory_BLHPN: SSM states of all layers of the B snapshots. Shape `[B, L, H, P, N]`, float32; the array is
                kept and read, not copied; leave it as it is.
            conv_BLCK: their convolution states. Shape `[B, L, C, K - 1]`, float32.
            hidden_BLD: their residual streams. Shape `[B, L, D]`, float32.
            known_B: the sampled tokens that the snapshots have not consumed. Shape `[B]`, int64.
            lag: tokens to assume.
            hypotheses: futures per snapshot.

        Returns:
            An :class:`ExactFuture`.

        Raises:
            ValueError: an argument has a wrong shape or type, is out of range, or holds NaN or infinity.
        """
        arrays = (plain(array) for array in (memory_BLHPN, conv_BLCK, hidden_BLD, known_B))
        return self._core.project(*arrays, lag, hypotheses, threads)

    def evaluator(self, future: ExactFuture, num_actions: int, terminal_tokens: Iterable[int], threads: int = 0) -> Any:
        """The evaluator of one search over the F futures; an object of the extension module.

        It is a ``NativeEvaluator`` of ``crsm/search/native.py``. A terminal token takes over the value of the position
        that it ends. For one thread at a time.

        Raises:
            ValueError: ``num_actions`` is below 1.
        """
        return self._core.evaluator(future, sorted(terminal_tokens), num_actions, threads)


def unfit(model: nn.Module) -> str:
    """Why the weights of this model cannot be packed: their type or their device. Empty: they can."""
    for name, holder, key in parameter_places(model, ("backbone", "fusion", "lm_head", "critic")):
        tensor = holder[key]
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return f"{name} is {tensor.dtype} on {tensor.device}"
    return ""
