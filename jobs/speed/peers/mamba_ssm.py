"""mamba-ssm's MambaLMHeadModel of the same shape: what trains Mamba-2 on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.speed.peers.process import PeerError
from jobs.speed.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor


def build(shape: Shape, seed: int) -> Any:
    """A model with random weights on the GPU.

    Raises:
        PeerError: mamba-ssm is not installed, or cannot be loaded.
    """
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except Exception as error:  # its extensions fail in ways of their own
        raise PeerError(f"not installed: {error}") from None
    import torch

    ssm = {"layer": "Mamba2", "d_state": shape.d_state, "headdim": shape.headdim, "chunk_size": shape.chunk_size}
    torch.manual_seed(seed)
    return MambaLMHeadModel(
        MambaConfig(
            d_model=shape.d_model,
            n_layer=shape.n_layer,
            vocab_size=shape.vocab_size,
            ssm_cfg=ssm,
            pad_vocab_size_multiple=1,
            tie_embeddings=True,
        ),
        device="cuda",
    )


def loss(model: Any, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    import torch.nn.functional as F

    logits_BTV = model(tokens_BT).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


class Decoder:
    """Greedy decoding, token by token, with its inference cache."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)

    def prefill(self, tokens_BT: Tensor, room: int = 4096) -> tuple[Tensor, Any]:
        """The next tokens (B,), and the cache."""
        import torch
        from mamba_ssm.utils.generation import InferenceParams

        cache = InferenceParams(max_seqlen=tokens_BT.shape[1] + room, max_batch_size=tokens_BT.shape[0])
        with torch.inference_mode():
            logits_BTV = self._model(tokens_BT.cuda(), inference_params=cache, num_last_tokens=1).logits
            cache.seqlen_offset = tokens_BT.shape[1]
            return logits_BTV[:, -1].argmax(dim=-1), cache

    def decode(self, token_B: Tensor, cache: Any, steps: int) -> list[Tensor]:
        """``steps`` tokens more."""
        import torch

        found = []
        with torch.inference_mode():
            for _ in range(steps):
                logits_BTV = self._model(token_B[:, None], inference_params=cache, num_last_tokens=1).logits
                cache.seqlen_offset += 1
                token_B = logits_BTV[:, -1].argmax(dim=-1)
                found.append(token_B)
        return found
