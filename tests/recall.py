"""A task for the memory alone: a key, a text too long for the convolution's window, and the question what the key was.

    key  f f f f f f  END  QUERY  key

The model says ``QUERY`` and the answer.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crsm.model import Checkpoint, build_model
from crsm.types import ModelState, Plan
from tests.fixtures import a_request, make_plan, tiny_config, tiny_tokenizer

KEYS = tuple(range(7, 13))
QUERY, END = 23, 24
FILLER = range(16, 23)


def texts(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Texts up to and with the query, and the keys that are asked for."""
    key_B = rng.choice(KEYS, size=count)
    filler_BT = rng.choice(FILLER, size=(count, 6))
    ends_BT = np.tile([END, QUERY], (count, 1))
    return torch.tensor(np.column_stack([key_B, filler_BT, ends_BT])), torch.tensor(key_B)


@functools.cache
def trained() -> Checkpoint:
    """A tiny model of one layer that answers; some seconds of one core. Its writes may have full rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(tiny_config(n_layer=1, rank=8), tiny_tokenizer())
        torch.nn.init.normal_(model.backbone.embedding.weight, std=0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        rng, steps = np.random.default_rng(0), 250
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, 2 - 2 * step / steps)
            text_BT, key_B = texts(rng, 48)
            logits_BTV = model.logits(model.backbone(text_BT)[0][:, -2:])
            loss = F.cross_entropy(logits_BTV[:, 0], text_BT[:, -1]) + F.cross_entropy(logits_BTV[:, 1], key_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Checkpoint(model.eval().requires_grad_(False), tiny_tokenizer(), model_version=3)


def with_keys(text_BT: Tensor, key_B: Tensor) -> Tensor:
    """The same texts begun with other keys."""
    return torch.cat([key_B[:, None], text_BT[:, 1:]], dim=1)


def states_before_the_query(checkpoint: Checkpoint, text_BT: Tensor) -> ModelState:
    """What a generation remembers when the query is the next token it consumes."""
    with torch.inference_mode():
        return checkpoint.model.backbone(text_BT[:, :-1])[1]


def answer_loss(checkpoint: Checkpoint, state: ModelState, key_B: Tensor) -> float:
    """Loss of the right key when the query is asked in ``state``."""
    with torch.inference_mode():
        hidden_BLD = checkpoint.model.backbone.step(torch.full((len(key_B),), QUERY), state).hidden_BLD
        return float(F.cross_entropy(checkpoint.model.logits(hidden_BLD), key_B))


def plan_towards(checkpoint: Checkpoint, state: ModelState, better: ModelState, position: int) -> Plan:
    """A plan whose write is the difference of two states, exactly, as a sum of outer products."""
    us, bs = [], []
    for layer, target in zip(state.layers, better.layers, strict=True):
        difference_EN = (target.ssm_BHPN - layer.ssm_BHPN)[0].flatten(0, 1).double()
        u, s, vh = torch.linalg.svd(difference_EN, full_matrices=False)
        us.append((u * s).T.float().numpy())
        bs.append(vh.float().numpy())
    return make_plan(a_request(position=position), checkpoint, write_u_LRE=np.stack(us), write_b_LRN=np.stack(bs))
