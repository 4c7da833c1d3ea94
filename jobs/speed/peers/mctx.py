"""mctx (JAX) searching with the same network and the same weights, in a process of its own.

mctx has no top-A expansion: its nodes hold all V actions. Everything else is alike: PUCT with mctx's value scale, the
same depth cap, the same snapshots and tokens to start from, the same memory reads in every step.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.speed.peers.process import PeerError, WorkerProcess

if TYPE_CHECKING:
    from crsm.latent_dynamics import Snapshot
    from crsm.model import CRSM

WORKER = Path(__file__).with_name("mctx_worker.py")


class MctxPeer:
    """One worker with the weights of one model; a context manager. ``versions`` names what it runs on."""

    def __init__(self, python: str, model: CRSM, threads: int) -> None:
        """
        Raises:
            PeerError: mctx or JAX is not installed for that interpreter.
        """
        self._stack = ExitStack()
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mctx-peer-")))
            np.savez(self._folder / "weights.npz", **weights_of(model))
            self._worker = self._stack.enter_context(WorkerProcess(python, WORKER, threads=threads))
            self.versions = self._worker.ask(do="load", weights=str(self._folder / "weights.npz"))["versions"]
        except BaseException:
            self._stack.close()
            raise

    def advance(self, snapshot: Snapshot, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The peer's network along some tokens: logits (B, T, V) and consensus values (B, T), to compare with ours."""
        self._place(snapshot, tokens_BT)
        self._worker.ask(do="advance", roots=str(self._folder / "roots.npz"), out=str(self._folder / "out.npz"))
        with np.load(self._folder / "out.npz") as found:
            return found["logits"], found["values"]

    def prepare(self, snapshot: Snapshot, token_B: np.ndarray, simulations: int, max_depth: int) -> None:
        """Compiles the search from these roots and runs it once."""
        self._place(snapshot, token_B[:, None])
        self._worker.ask(
            do="prepare", roots=str(self._folder / "roots.npz"), simulations=simulations, max_depth=max_depth
        )

    def search(self) -> float:
        """Seconds of one search of what was prepared, by the worker's own clock."""
        return float(self._worker.ask(do="search")["seconds"])

    def _place(self, snapshot: Snapshot, tokens_BT: np.ndarray) -> None:
        np.savez(
            self._folder / "roots.npz",
            hidden=snapshot.hidden_BLD.numpy(),
            memory=snapshot.memory_BMHPN.numpy(),
            tokens=tokens_BT,
        )

    def __enter__(self) -> MctxPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def weights_of(model: CRSM) -> dict[str, Any]:
    """What the worker needs of a model, as arrays; matrices as (in, out), as JAX multiplies them."""
    world, critic = model.world_model, model.critic
    found: dict[str, Any] = {}
    for name in ("encoder", "query", "read", "decoder_linear", "decoder_in", "decoder_out"):
        layer = getattr(world, name)
        found[name], found[f"{name}_bias"] = layer.weight.T, layer.bias
    cell = world.cell
    found |= {"cell_in": cell.weight_ih.T, "cell_in_bias": cell.bias_ih}
    found |= {"cell_hidden": cell.weight_hh.T, "cell_hidden_bias": cell.bias_hh}
    found |= {"embedding": model.backbone.embedding.weight, "head": model.lm_head.weight.T}
    found |= {"fusion": model.fusion.weights_L, "norm": model.backbone.norm_f.weight}
    found |= {"critic": critic.weight_LD, "critic_bias": critic.bias_L, "consensus": critic.consensus_weights_L}
    arrays = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in found.items()}
    return arrays | {
        "penalty": np.float32(critic.uncertainty_penalty),
        "norm_eps": np.float32(model.config.model.backbone.norm_eps),
    }


__all__ = ["MctxPeer", "PeerError", "weights_of"]
