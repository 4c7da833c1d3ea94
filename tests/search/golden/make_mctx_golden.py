"""Makes the trees that ours must equal, with mctx on random tables.

Made with Python 3.11, mctx 0.0.71, jax 0.10.2, jaxlib 0.10.2, chex 0.1.92, numpy 2.4.6 (CPU). To make them again, in an
environment of their own::

    pip install mctx==0.0.71 jax==0.10.2 jaxlib==0.10.2 && python tests/search/golden/make_mctx_golden.py

Each file holds the tables (a finite decision process with reward 0 and discount 1; state, transition, log-probabilities
and value), the settings, and per tree what mctx built. mctx breaks ties at random; in these tables there are none.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import mctx
import numpy as np

NUM_STATES = 60
NUM_TREES = 3


def make_tables(seed: int, num_actions: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.2, size=(NUM_STATES, num_actions))
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return {
        "roots_B": rng.permutation(NUM_STATES)[:NUM_TREES],
        "next_state_ZA": rng.integers(NUM_STATES, size=(NUM_STATES, num_actions)),
        "prior_logits_ZA": logits.astype(np.float32),
        "values_Z": rng.uniform(size=NUM_STATES).astype(np.float32),
    }


def invalid_by_prior_mass(logits_BA: np.ndarray, mass: float) -> np.ndarray:
    invalid_BA = np.ones(logits_BA.shape, np.int32)
    for row, logits_A in enumerate(logits_BA):
        gathered = 0.0
        for action in np.argsort(-logits_A):
            if gathered >= mass:
                break
            invalid_BA[row, action] = 0
            gathered += float(np.exp(logits_A[action]))
    return invalid_BA


def run(case: dict) -> dict:
    tables = make_tables(case["seed"], case["num_actions"])
    next_state, logits, values = (jnp.asarray(tables[k]) for k in ("next_state_ZA", "prior_logits_ZA", "values_Z"))
    roots = jnp.asarray(tables["roots_B"])

    def recurrent_fn(params, rng_key, action, embedding):
        del params, rng_key
        state = next_state[embedding, action]
        output = mctx.RecurrentFnOutput(
            reward=jnp.zeros(NUM_TREES), discount=jnp.ones(NUM_TREES), prior_logits=logits[state], value=values[state]
        )
        return output, state

    settings = case["settings"]
    shared = {
        "params": (),
        "rng_key": jax.random.PRNGKey(case["seed"]),
        "root": mctx.RootFnOutput(prior_logits=logits[roots], value=values[roots], embedding=roots),
        "recurrent_fn": recurrent_fn,
        "num_simulations": settings["simulations"],
        "max_depth": settings["max_depth"],
        "invalid_actions": jnp.asarray(
            invalid_by_prior_mass(tables["prior_logits_ZA"][tables["roots_B"]], settings["root_prior_mass"])
        ),
    }
    if settings["policy"] == "puct":
        output = mctx.muzero_policy(
            **shared, dirichlet_fraction=0.0, pb_c_init=settings["puct_c_init"], pb_c_base=settings["puct_c_base"]
        )
        gumbel = None
    else:
        output = mctx.gumbel_muzero_policy(
            **shared,
            max_num_considered_actions=settings["max_considered_actions"],
            gumbel_scale=settings["gumbel_scale"],
        )
        gumbel = np.asarray(output.search_tree.extra_data.root_gumbel)
    tree = output.search_tree
    return {
        "made_with": {name: metadata.version(name) for name in ("mctx", "jax", "jaxlib", "numpy")},
        "settings": settings,
        "tables": {name: array.tolist() for name, array in tables.items()},
        "root_gumbel_BA": None if gumbel is None else gumbel.tolist(),
        "action_weights_BA": np.asarray(output.action_weights).tolist(),
        "trees": [
            {
                "node_visits": np.asarray(tree.node_visits[row]).tolist(),
                "node_values": np.asarray(tree.node_values[row]).round(7).tolist(),
                "parents": np.asarray(tree.parents[row]).tolist(),
                "action_from_parent": np.asarray(tree.action_from_parent[row]).tolist(),
                "children_index": np.asarray(tree.children_index[row]).tolist(),
                "children_visits": np.asarray(tree.children_visits[row]).tolist(),
            }
            for row in range(NUM_TREES)
        ],
    }


PUCT = {"policy": "puct", "q_transform": "minmax", "puct_c_init": 1.25, "puct_c_base": 19652.0}
GUMBEL = {"policy": "gumbel", "max_considered_actions": 16, "gumbel_scale": 0.0}
# The tables' seeds are arbitrary.
CASES = {
    "mctx_puct": {"seed": 1, "num_actions": 4, "settings": {**PUCT, "simulations": 40, "max_depth": 40}},
    # A small base makes the logarithm matter.
    "mctx_puct_depth_2": {
        "seed": 2,
        "num_actions": 4,
        "settings": {**PUCT, "puct_c_base": 20.0, "simulations": 40, "max_depth": 2},
    },
    "mctx_puct_cut": {
        "seed": 3,
        "num_actions": 6,
        "settings": {**PUCT, "simulations": 24, "max_depth": 6, "root_prior_mass": 0.8},
    },
    "mctx_gumbel": {"seed": 4, "num_actions": 4, "settings": {**GUMBEL, "simulations": 40, "max_depth": 40}},
    "mctx_gumbel_considered_3": {
        "seed": 5,
        "num_actions": 6,
        "settings": {**GUMBEL, "simulations": 24, "max_depth": 2, "max_considered_actions": 3},
    },
    "mctx_gumbel_noise": {
        "seed": 6,
        "num_actions": 5,
        "settings": {**GUMBEL, "simulations": 24, "max_depth": 6, "gumbel_scale": 1.0},
    },
    "mctx_gumbel_cut": {
        "seed": 7,
        "num_actions": 6,
        "settings": {**GUMBEL, "simulations": 24, "max_depth": 6, "root_prior_mass": 0.8},
    },
}


def main() -> None:
    for name, case in CASES.items():
        case["settings"].setdefault("root_prior_mass", 1.0)
        path = Path(__file__).with_name(f"{name}.json")
        path.write_text(json.dumps(run(case), separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
