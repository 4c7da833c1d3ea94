"""Decoding in C++: ``Backbone.step`` of all layers in one call, with weights that were packed once.

Weights are fp32, bf16 (rounded to nearest, ties to even) or int8 (symmetric, one scale per output and 64 inputs); all
arithmetic and the state are fp32. The embedding is read where the model has it, unrounded. Tokens, states and results
of a sequence do not depend on the rest of its batch, nor on the number of threads, bit for bit.

Letters: B batch, L layers, D d_model, V vocabulary, H heads, P head dimension, N d_state, C convolution channels,
K convolution width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from crsm.native import require
from crsm.types import LayerState, ModelState, StepOutput

Weights = Literal["fp32", "bf16", "int8"]


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
        self._model: Any = model
        self._backbone: Any = model.backbone if has_head else model
        self._threads = threads or 0
        self.weights = weights
        sizes = self._backbone.config
        self._layers, self._width, self._vocab = sizes.n_layer, sizes.d_model, sizes.vocab_size
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
        self._parameters: list[tuple[str, Tensor]] = []
        self._packed: list[tuple[int, int]] = []
        self.refresh()

    @property
    def bytes_of_weights(self) -> int:
        """What the weights take: packed matrices with their scales, vectors, and the embedding that is read in place."""
        return int(self._core.bytes_of_weights)

    def refresh(self) -> None:
        """Packs the weights as they are now.

        Raises:
            ValueError: a parameter is not fp32, not on the CPU or not finite; it is named.
        """
        self._parameters = [*_named_parameters(self._model, self._backbone)]
        self._check()
        backbone = self._backbone
        with torch.no_grad():
            self._core.load_embedding(_array(backbone.embedding.weight))
            for index, layer in enumerate(backbone.layers):
                mixer = layer.mixer
                self._core.load_layer(
                    index,
                    _array(layer.norm.weight),
                    _array(mixer.in_proj.weight),
                    _array(mixer.conv1d.weight.squeeze(1)),
                    _array(mixer.conv1d.bias),
                    _array(mixer.dt_bias),
                    _array(-mixer.A_log.exp()),
                    _array(mixer.D),
                    _array(mixer.norm.weight),
                    _array(mixer.out_proj.weight),
                    self._threads,
                )
            if self._has_head:
                model = self._model
                self._core.load_head(
                    _array(model.fusion.weights_L),
                    _array(backbone.norm_f.weight),
                    _array(model.lm_head.weight),
                    self._threads,
                )
        self._packed = self._versions()

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
        logits_BV = torch.empty(token_B.shape[0] if token_B.ndim else 0, self._vocab)
        return logits_BV, self._step(token_B, state, donate, logits_BV)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """The policy head: residual streams (B, L, D) to logits (B, V), with the bits of :meth:`step_logits`.

        Raises:
            ValueError: other shape, type or device; the decoder was made of a backbone alone.
        """
        if not self._has_head:
            raise ValueError("the decoder was made of a backbone; allowed: logits of a model with its head")
        self._renew()
        if hidden_BLD.shape[1:] != (self._layers, self._width) or hidden_BLD.ndim != 3:
            raise ValueError(
                f"hidden_BLD has shape {tuple(hidden_BLD.shape)}; allowed: (B, L, D) = "
                f"(B, {self._layers}, {self._width})"
            )
        _check_tensor("hidden_BLD", hidden_BLD, torch.float32)
        logits_BV = torch.empty(hidden_BLD.shape[0], self._vocab)
        self._core.logits(_array(hidden_BLD), logits_BV.numpy(), self._threads)
        return logits_BV

    def _step(self, token_B: Tensor, state: ModelState, donate: bool, logits_BV: Tensor | None) -> StepOutput:
        self._renew()
        if token_B.ndim != 1 or len(token_B) < 1:
            raise ValueError(f"token_B has shape {tuple(token_B.shape)}; allowed: (B,) with B ≥ 1")
        _check_tensor("token_B", token_B, torch.int64)
        layers, batch = state.layers, len(token_B)
        if len(layers) != self._layers:
            raise ValueError(f"state has {len(layers)} layers; allowed: {self._layers}")
        for layer in layers:
            _check_tensor("conv_BCK", layer.conv_BCK, torch.float32)
            _check_tensor("ssm_BHPN", layer.ssm_BHPN, torch.float32)
        conv_in = [_array(layer.conv_BCK) for layer in layers]
        ssm_in = [_array(layer.ssm_BHPN) for layer in layers]
        hidden_BLD = torch.empty(batch, self._layers, self._width)
        decay_LBH = torch.empty(self._layers, batch, self._heads)
        outputs = (hidden_BLD.numpy(), decay_LBH.numpy(), None if logits_BV is None else logits_BV.numpy())
        token = _array(token_B)
        if donate and _is_owned(layers):
            self._core.step(token, conv_in, ssm_in, conv_in, ssm_in, *outputs, self._threads)
            return StepOutput(hidden_BLD, state, decay_LBH.unbind())
        conv_LBCK, ssm_LBHPN = self._core.new_state(batch)
        self._core.step(token, conv_in, ssm_in, [*conv_LBCK], [*ssm_LBHPN], *outputs, self._threads)
        new = zip(torch.from_numpy(conv_LBCK).unbind(), torch.from_numpy(ssm_LBHPN).unbind(), strict=True)
        return StepOutput(hidden_BLD, ModelState(tuple(LayerState(conv, ssm) for conv, ssm in new)), decay_LBH.unbind())

    def _renew(self) -> None:
        if self._versions() != self._packed:
            self.refresh()

    def _versions(self) -> list[tuple[int, int]]:
        return [
            (0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for _, tensor in self._parameters
        ]

    def _check(self) -> None:
        for name, tensor in self._parameters:
            _check_tensor(name, tensor, torch.float32)
            # Layers that an imported checkpoint does not read have a logit of -inf: weight 0, exactly.
            finite = ~tensor.isnan() if name == "fusion.logits_L" else tensor.isfinite()
            if not finite.all():
                raise ValueError(f"{name} holds {tensor[~finite].flatten()[0].item()}; allowed: finite numbers")


def _named_parameters(model: nn.Module, backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is packed: the backbone, and the head where there is one."""
    if model is backbone:
        yield from backbone.named_parameters()
        return
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("backbone", "fusion", "lm_head"):
            yield name, parameter


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {dtype}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on device {tensor.device}; allowed: cpu")


def _array(tensor: Tensor) -> np.ndarray:
    """A contiguous view, or copy, as NumPy has it."""
    return tensor.detach().contiguous().numpy()


def _is_owned(layers: tuple[LayerState, ...]) -> bool:
    """Whether every tensor can be written in place: without gaps, and in memory that no other one uses."""
    if not all(tensor.is_contiguous() for layer in layers for tensor in layer):
        return False
    return len({tensor.data_ptr() for layer in layers for tensor in layer}) == 2 * len(layers)
