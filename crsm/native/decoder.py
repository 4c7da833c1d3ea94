"""Decoding in C++: ``Backbone.step`` of all layers in one call, with weights that were packed once.

Weights are fp32, bf16 (rounded to nearest, ties to even) or int8 (symmetric, one scale per output and 64 inputs); all
arithmetic and the state are fp32. The embedding is read where the model has it, unrounded. Tokens, states and results
of a sequence do not depend on the rest of its batch, nor on the number of threads, bit for bit.

Letters: B batch, L layers, D d_model, V vocabulary, H heads, P head dimension, N d_state, C convolution channels,
K convolution width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from crsm.native import require
from crsm.types import LayerState, ModelState, StepOutput

Weights = Literal["fp32", "bf16", "int8"]
Place = tuple[str, dict[str, Any], str]
"""A parameter's name, and the dictionary and key where it is found even after it is replaced."""


class _HeldState(ModelState):
    """A state whose memory a decoder knows already; anywhere else, and as a copy, a plain ``ModelState``."""

    __slots__ = ("core", "memory")

    core: Any
    memory: Any

    def __init__(self, layers: tuple[LayerState, ...], memory: Any, core: Any) -> None:
        super().__init__(layers)
        object.__setattr__(self, "memory", memory)
        object.__setattr__(self, "core", core)

    def __reduce__(self) -> tuple[type[ModelState], tuple[tuple[LayerState, ...]]]:
        return ModelState, (self.layers,)


class NativeDecoder:
    """Steps a backbone, or a whole model with its policy head, on the CPU.

    Changes of the model are noticed before every call, by the versions and the places of its parameters, and the
    weights are packed again; only a change that torch does not count (in place through ``parameter.data``) needs
    :meth:`refresh`.
    """

    def __init__(self, model: nn.Module, weights: Weights = "fp32", threads: int | None = None) -> None:
        """
        Args:
            model: a ``Backbone``, or a ``CRSM`` for logits as well. fp32, on the CPU.
            weights: how the matrices are kept.
            threads: at most so many; None: ``crsm.native``'s setting. Small steps use one in any case.

        Raises:
            ValueError: another type of weights, or a parameter that is not fp32, not on the CPU or not finite.
            RuntimeError: there is no native core.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads = {threads}; allowed: at least 1, or None")
        has_head = hasattr(model, "lm_head")
        self._model = cast(Any, model)
        self._backbone = cast(Any, model.backbone if has_head else model)
        self.threads = threads or 0
        """0: ``crsm.native``'s setting."""
        self.weights = weights
        sizes = self._backbone.config
        self._layers, self._width, self.vocab_size = sizes.n_layer, sizes.d_model, sizes.vocab_size
        self._heads = sizes.n_heads
        self._core = require().Decoder(
            d_model=sizes.d_model,
            n_layer=sizes.n_layer,
            d_state=sizes.d_state,
            headdim=sizes.headdim,
            n_heads=sizes.n_heads,
            d_conv=sizes.d_conv,
            vocab_size=sizes.vocab_size,
            norm_eps=sizes.norm_eps,
            weights=weights,
            head=has_head,
        )
        self._has_head = has_head
        self._places: list[Place] = []
        self._watch: Any = None
        self.refresh()

    @property
    def bytes_of_weights(self) -> int:
        """Of packed matrices with their scales, of vectors, and of the embedding that is read in place."""
        return int(self._core.bytes_of_weights)

    def refresh(self) -> None:
        """Packs the weights as they are now.

        Raises:
            ValueError: a parameter is not fp32, not on the CPU or not finite; it is named.
        """
        parts = ("backbone", "fusion", "lm_head") if self._has_head else None
        self._places = [*parameter_places(self._model, parts)]
        check_parameters(self._places)
        backbone = self._backbone
        with torch.no_grad():
            self._core.load_embedding(as_array(backbone.embedding.weight))
            for index, layer in enumerate(backbone.layers):
                mixer = layer.mixer
                self._core.load_layer(
                    index,
                    as_array(layer.norm.weight),
                    as_array(mixer.in_proj.weight),
                    as_array(mixer.conv1d.weight.squeeze(1)),
                    as_array(mixer.conv1d.bias),
                    as_array(mixer.dt_bias),
                    as_array(-mixer.A_log.exp()),
                    as_array(mixer.D),
                    as_array(mixer.norm.weight),
                    as_array(mixer.out_proj.weight),
                    self.threads,
                )
            if self._has_head:
                model = self._model
                self._core.load_head(
                    as_array(model.fusion.weights_L),
                    as_array(backbone.norm_f.weight),
                    as_array(model.lm_head.weight),
                    self.threads,
                )
        self._watch = watch(self._places)

    def step(self, token_B: Tensor, state: ModelState, donate: bool = False) -> StepOutput:
        """Consumes one token per sequence, as ``Backbone.step`` does.

        Args:
            token_B: token ids.
            state: the sequences' states; tensors without gaps are read in place, others are copied first.
            donate: the caller gives ``state`` up and must not look at it again; its memory becomes the new state's
                where it can (contiguous, and not shared by layers).

        Returns:
            Residual streams, new state and decays.

        Raises:
            ValueError: ``token_B`` is not (B,) int64 inside the vocabulary, or the state is of another batch, model,
                type or device.
        """
        return self._step(token_B, state, donate, None)

    def step_logits(self, token_B: Tensor, state: ModelState, donate: bool = False) -> tuple[Tensor, StepOutput]:
        """:meth:`step` and the logits (B, V) after it, in one call.

        Raises:
            ValueError: as :meth:`step`; the decoder was made of a backbone alone.
        """
        if not self._has_head:
            raise ValueError("the decoder was made of a backbone; allowed: logits of a model with its head")
        logits_BV = torch.empty(token_B.shape[0] if token_B.ndim else 0, self.vocab_size)
        return logits_BV, self._step(token_B, state, donate, logits_BV)

    def greedy(self, token_B: Tensor, state: ModelState, count: int) -> tuple[Tensor, ModelState]:
        """Says ``count`` tokens more in one call, each the likeliest after those before it (of equals the lowest id).

        Returns:
            The tokens (B, count), the last of which is not consumed, and the state; ``state`` itself is left as it is.

        Raises:
            ValueError: as :meth:`step_logits`, or ``count`` is below 1.
        """
        if not self._has_head:
            raise ValueError("the decoder was made of a backbone; allowed: logits of a model with its head")
        if count < 1:
            raise ValueError(f"count = {count}; allowed: at least 1")
        self.renew()
        token, batch = self._tokens(token_B)
        memory = state.memory if isinstance(state, _HeldState) and state.core is self._core else None
        hidden = np.empty((batch, self._layers, self._width), np.float32)
        decay = np.empty((self._layers, batch, self._heads), np.float32)
        logits, said = np.empty((batch, self.vocab_size), np.float32), np.empty((batch, count), np.int64)
        new, held = self._new_state(batch)
        memory = memory or self._memory(state, batch)
        self._core.greedy(token, memory, new, hidden, decay, logits, said, self.threads)
        return torch.from_numpy(said), held

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """The policy head: residual streams (B, L, D) to logits (B, V), with the bits of :meth:`step_logits`.

        Raises:
            ValueError: other shape, type or device; the decoder was made of a backbone alone.
        """
        if not self._has_head:
            raise ValueError("the decoder was made of a backbone; allowed: logits of a model with its head")
        self.renew()
        if hidden_BLD.shape[1:] != (self._layers, self._width) or hidden_BLD.ndim != 3:
            raise ValueError(
                f"hidden_BLD has shape {tuple(hidden_BLD.shape)}; allowed: (B, L, D) = "
                f"(B, {self._layers}, {self._width})"
            )
        _check_tensor("hidden_BLD", hidden_BLD, torch.float32)
        logits_BV = torch.empty(hidden_BLD.shape[0], self.vocab_size)
        self._core.logits(as_array(hidden_BLD), logits_BV.numpy(), self.threads)
        return logits_BV

    def make_slots(self, capacity: int) -> Any:
        """The core's memory for states that it steps and steers in place (:mod:`crsm.native.slots`).

        Raises:
            ValueError: ``capacity`` is below 1, or the decoder was made of a backbone alone.
        """
        return self._core.slots(capacity)

    def make_exact(self, critic_LD: np.ndarray, critic_bias_L: np.ndarray) -> Any:
        """The core's world model of these weights, with critics (:mod:`crsm.native.exact`).

        Raises:
            ValueError: wrong shapes or types, or the decoder was made of a backbone alone.
        """
        return self._core.exact(critic_LD, critic_bias_L)

    def _step(self, token_B: Tensor, state: ModelState, donate: bool, logits_BV: Tensor | None) -> StepOutput:
        self.renew()
        token, batch = self._tokens(token_B)
        hidden_BLD = torch.empty(batch, self._layers, self._width)
        decay_LBH = torch.empty(self._layers, batch, self._heads)
        outputs = (hidden_BLD.numpy(), decay_LBH.numpy(), None if logits_BV is None else logits_BV.numpy())
        if isinstance(state, _HeldState) and state.core is self._core:
            memory = state.memory
        else:
            memory = self._memory(state, batch)
            if donate and memory.apart and all(tensor.is_contiguous() for layer in state.layers for tensor in layer):
                state = _HeldState(state.layers, memory, self._core)
            else:
                donate = False
        if donate:
            self._core.step(token, memory, memory, *outputs, self.threads)
            return StepOutput(hidden_BLD, state, decay_LBH.unbind())
        new, held = self._new_state(batch)
        self._core.step(token, memory, new, *outputs, self.threads)
        return StepOutput(hidden_BLD, held, decay_LBH.unbind())

    def _tokens(self, token_B: Tensor) -> tuple[np.ndarray, int]:
        if token_B.ndim != 1 or len(token_B) < 1:
            raise ValueError(f"token_B has shape {tuple(token_B.shape)}; allowed: (B,) with B ≥ 1")
        _check_tensor("token_B", token_B, torch.int64)
        return as_array(token_B), len(token_B)

    def _new_state(self, batch: int) -> tuple[Any, _HeldState]:
        """Memory for a state that is yet to be written, as the core and as PyTorch see it."""
        conv_LBCK, ssm_LBHPN, new = self._core.new_state(batch)
        layers = zip(torch.from_numpy(conv_LBCK).unbind(), torch.from_numpy(ssm_LBHPN).unbind(), strict=True)
        return new, _HeldState(tuple(LayerState(conv, ssm) for conv, ssm in layers), new, self._core)

    def _memory(self, state: ModelState, batch: int) -> Any:
        """The core's view of a state; of copies where tensors have gaps."""
        if len(state.layers) != self._layers:
            raise ValueError(f"state has {len(state.layers)} layers; allowed: {self._layers}")
        for layer in state.layers:
            _check_tensor("conv_BCK", layer.conv_BCK, torch.float32)
            _check_tensor("ssm_BHPN", layer.ssm_BHPN, torch.float32)
        if len(state.layers[0].conv_BCK) != batch:
            raise ValueError(f"state has {len(state.layers[0].conv_BCK)} sequences; allowed: {batch}, as token_B has")
        return self._core.state_of(
            [as_array(layer.conv_BCK) for layer in state.layers], [as_array(layer.ssm_BHPN) for layer in state.layers]
        )

    def is_stale(self) -> bool:
        """Whether the weights have changed since they were packed."""
        return bool(self._watch.changed())

    def renew(self) -> None:
        """Packs the weights again if they have changed."""
        if self._watch.changed():
            self.refresh()


def check_parameters(places: Iterable[Place]) -> None:
    """
    Raises:
        ValueError: a parameter is not float32, not on the CPU or not finite; it is named.
    """
    for name, holder, key in places:
        tensor = holder[key]
        _check_tensor(name, tensor, torch.float32)
        # Layers that an imported checkpoint does not read have a logit of -inf: weight 0, exactly.
        finite = ~tensor.isnan() if name == "fusion.logits_L" else tensor.isfinite()
        if not finite.all():
            raise ValueError(f"{name} holds {tensor[~finite].flatten()[0].item()}; allowed: finite numbers")


def watch(places: Iterable[Place]) -> Any:
    """What tells whether one of these parameters was replaced, written to, or given other memory since."""
    watcher = require().Watch()
    for _, holder, key in places:
        parameter = holder[key]
        version = None if parameter.is_inference() else parameter._version  # inference tensors do not count
        watcher.add(holder, key, parameter, version, parameter.data_ptr())
    return watcher


def parameter_places(model: nn.Module, parts: Iterable[str] | None = None) -> Iterator[Place]:
    """The parameters of a model, or of some of its parts."""
    wanted = None if parts is None else {*parts}
    for prefix, module in model.named_modules():
        if wanted is not None and prefix.split(".")[0] not in wanted:
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}".lstrip("."), module._parameters, key


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {dtype}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on device {tensor.device}; allowed: cpu")


def as_array(tensor: Tensor) -> np.ndarray:
    """A contiguous view, or copy, as NumPy has it."""
    return tensor.detach().contiguous().numpy()


def plain(array: np.ndarray) -> np.ndarray:
    """Contiguous and writable, which is how arrays reach the extension module; a message's arrays are neither."""
    return np.require(array, requirements=("C", "W"))
