"""Runs with the peer's interpreter and imports nothing of ours: mctx with our network, written in JAX.

    python mctx_worker.py THREADS

Questions and answers are lines of JSON, see ``process.py``. Arrays travel in files.
"""

import json
import os
import sys
import time
from typing import Any


def answers(threads: int) -> None:
    """Answers questions until there are none."""
    # Whatever the libraries print must not meet the answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # XLA starts as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    worker: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        do = question.pop("do")
        try:
            if do == "load":
                worker = Worker(**question)
                answer = {"versions": worker.versions}
            else:
                answer = getattr(worker, do)(**question)
        except ImportError as error:
            answer = {"error": f"not installed for {sys.executable}: {error}"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


class Worker:
    """One set of weights, and the search that was prepared last."""

    def __init__(self, weights: str) -> None:
        import jax
        import jaxlib
        import mctx
        import numpy as np

        with np.load(weights) as found:
            self._weights = {name: jax.numpy.asarray(found[name]) for name in found.files}
        self.versions = {"mctx": mctx.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
        self._search: Any = None
        self._roots: Any = None

    def advance(self, roots: str, out: str) -> dict[str, float]:
        import numpy as np

        hidden, memory, tokens = _load(roots)
        g = begin(self._weights, hidden)
        logits, values = [], []
        for position in range(tokens.shape[1]):
            g, logit, value = step(self._weights, memory, g, tokens[:, position])
            logits.append(np.asarray(logit))
            values.append(np.asarray(value))
        np.savez(out, logits=np.stack(logits, axis=1), values=np.stack(values, axis=1))
        return {}

    def prepare(self, roots: str, simulations: int, max_depth: int) -> dict[str, float]:
        import jax

        self._roots = _load(roots)
        self._search = jax.jit(search, static_argnums=(0, 1))
        self._settings = (simulations, max_depth)
        self.search()
        return {}

    def search(self) -> dict[str, float]:
        import jax

        hidden, memory, tokens = self._roots
        started = time.perf_counter()
        jax.block_until_ready(self._search(*self._settings, self._weights, hidden, memory, tokens[:, 0]))
        return {"seconds": time.perf_counter() - started}


def _load(path: str) -> tuple[Any, ...]:
    import jax.numpy as jnp
    import numpy as np

    with np.load(path) as found:
        return tuple(jnp.asarray(found[name]) for name in ("hidden", "memory", "tokens"))


def search(simulations: int, max_depth: int, w: Any, hidden: Any, memory: Any, token: Any) -> Any:
    """From a snapshot and the token after it to the visit distribution: what a deliberation does before it writes."""
    import jax
    import jax.numpy as jnp
    import mctx

    def recurrent(params: Any, key: Any, action: Any, g: Any) -> Any:
        del key
        w, memory = params
        g, logits, value = step(w, memory, g, action)
        ones = jnp.ones_like(value)
        return mctx.RecurrentFnOutput(reward=0 * ones, discount=ones, prior_logits=logits, value=value), g

    g, logits, value = step(w, memory, begin(w, hidden), token)
    found = mctx.muzero_policy(
        (w, memory),
        jax.random.PRNGKey(0),
        mctx.RootFnOutput(prior_logits=logits, value=value, embedding=g),
        recurrent,
        num_simulations=simulations,
        max_depth=max_depth,
        dirichlet_fraction=0.0,
        temperature=0.0,
        pb_c_init=1.0,
        pb_c_base=19652,
    )
    return found.action_weights


def begin(w: Any, hidden: Any) -> Any:
    """g of the snapshot's position: (B, L, D) to (B, G)."""
    import jax.numpy as jnp

    return jnp.tanh(hidden.reshape(len(hidden), -1) @ w["encoder"] + w["encoder_bias"])


def step(w: Any, memory: Any, g: Any, token: Any) -> tuple[Any, Any, Any]:
    """Consumes one token: the new g (B, G), logits (B, V), consensus value (B,)."""
    import jax
    import jax.numpy as jnp

    embedded = w["embedding"][token]
    batch, layers, _, _, states = memory.shape
    query = (jnp.concatenate([g, embedded], axis=1) @ w["query"] + w["query_bias"]).reshape(batch, layers, states)
    read = jnp.einsum("bmhpn,bmn->bmhp", memory, query).reshape(batch, -1)
    read = _rms_norm(read, 1e-6)
    inputs = jnp.concatenate([embedded, read @ w["read"] + w["read_bias"]], axis=1)
    i_r, i_z, i_n = jnp.split(inputs @ w["cell_in"] + w["cell_in_bias"], 3, axis=1)
    h_r, h_z, h_n = jnp.split(g @ w["cell_hidden"] + w["cell_hidden_bias"], 3, axis=1)
    update = jax.nn.sigmoid(i_z + h_z)
    new = jnp.tanh(i_n + jax.nn.sigmoid(i_r + h_r) * h_n)
    g = (1 - update) * new + update * g

    inner = jax.nn.silu(g @ w["decoder_in"] + w["decoder_in_bias"])
    flat = g @ w["decoder_linear"] + w["decoder_linear_bias"] + inner @ w["decoder_out"] + w["decoder_out_bias"]
    hidden = flat.reshape(batch, len(w["fusion"]), -1)
    mixed = (w["fusion"][:, None] * hidden).sum(axis=1)
    logits = (_rms_norm(mixed, w["norm_eps"]) * w["norm"]) @ w["head"]
    values = jax.nn.sigmoid((_rms_norm(hidden, 1e-5) * w["critic"]).sum(axis=-1) + w["critic_bias"])
    value = (w["consensus"] * values).sum(axis=-1) - w["penalty"] * values.std(axis=-1)
    return g, logits, value


def _rms_norm(x: Any, eps: Any) -> Any:
    import jax

    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this script, whose modules have the names of the libraries that they drive
    answers(int(sys.argv[1]))
