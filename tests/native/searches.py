"""Random searches for the tests of the native engine, and how two trees are compared."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st

from crsm import native
from crsm.config import SearchConfig
from crsm.search import Tree, search
from tests.search.fakes import TableEvaluator

POLICIES: dict[str, dict] = {
    "puct_raw": {"policy": "puct", "q_transform": "raw"},
    "puct_minmax": {"policy": "puct", "q_transform": "minmax"},
    "gumbel": {"policy": "gumbel"},
    "gumbel_noise": {"policy": "gumbel", "gumbel_scale": 1.0},
}


def bits(array: np.ndarray) -> np.ndarray:
    """An array as integers, so that -0 differs from 0."""
    return array.view(np.int32) if array.dtype == np.float32 else array


def assert_same(one: Tree, other: Tree) -> None:
    for field in dataclasses.fields(Tree):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if isinstance(first, np.ndarray):
            np.testing.assert_array_equal(bits(first), bits(second), err_msg=field.name, strict=True)
        else:
            assert type(first) is type(second) and first == second, field.name


def run(evaluator: object, config: SearchConfig, engine: str = "native", **changes: object) -> Tree:
    layers = evaluator.num_layers  # type: ignore[attr-defined]
    arguments: dict = {
        "consensus_weights_L": np.linspace(0.1, 0.7, layers, dtype=np.float32),
        "uncertainty_penalty": 0.3,
        "terminal_tokens": [],
        **changes,
    }
    return search(evaluator, config, engine=engine, **arguments)  # type: ignore[arg-type]


class RandomTables:
    """Decision processes of 12 states drawn from a seed, as a native evaluator and as one in Python."""

    def __init__(self, seed: int, trees: int, actions: int, layers: int, *, holes: bool, coarse: bool) -> None:
        rng = np.random.default_rng(seed)
        states = 12
        logits_ZA = rng.normal(scale=2.0, size=(states, actions))
        if coarse:
            # Ties, which go to the lowest index.
            logits_ZA = np.round(logits_ZA)
        logits_ZA -= np.log(np.exp(logits_ZA).sum(axis=1, keepdims=True))
        if holes:
            logits_ZA[rng.random((states, actions)) < 0.3] = -np.inf
            logits_ZA[np.arange(states), rng.integers(actions, size=states)] = -0.5
        values_ZL = rng.uniform(size=(states, layers))
        if coarse:
            values_ZL = np.round(values_ZL * 2) / 2
        self.tables = (
            rng.integers(states, size=trees),
            rng.integers(states, size=(states, actions)),
            logits_ZA.astype(np.float32),
            values_ZL.astype(np.float32),
        )

    def native(self) -> object:
        return native.require().TableEvaluator(*self.tables)

    def python(self) -> TableEvaluator:
        return TableEvaluator(*self.tables)


cases = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(sorted(POLICIES)),
        "seed": st.integers(0, 2**32),
        "num_actions": st.integers(1, 9),
        "num_layers": st.integers(1, 6),
        "simulations": st.lists(st.integers(0, 60), min_size=1, max_size=4),
        "max_depth": st.integers(1, 8),
        "num_terminal": st.integers(0, 4),
        "root_prior_mass": st.sampled_from([0.05, 0.3, 0.9, 1.0]),
        "max_considered_actions": st.integers(1, 9),
        "penalty": st.sampled_from([0.0, 0.3, 2.0]),
        "c_init": st.sampled_from([0.0, 1.25, 5.0]),
        "c_base": st.sampled_from([1.0, 19652.0]),
        "value_scale": st.sampled_from([0.1, 1.0]),
        "holes": st.booleans(),
        "coarse": st.booleans(),
    }
)


def of_case(case: dict) -> tuple[SearchConfig, RandomTables, dict]:
    config = SearchConfig(
        **POLICIES[case["policy"]],
        max_depth=case["max_depth"],
        root_prior_mass=case["root_prior_mass"],
        max_considered_actions=case["max_considered_actions"],
        puct_c_init=case["c_init"],
        puct_c_base=case["c_base"],
        gumbel_value_scale=case["value_scale"],
    )
    sizes = len(case["simulations"]), case["num_actions"], case["num_layers"]
    tables = RandomTables(case["seed"], *sizes, holes=case["holes"], coarse=case["coarse"])
    arguments = {
        "simulations": case["simulations"],
        "terminal_tokens": range(case["num_terminal"]),
        "seed": [case["seed"] % 1000 + row for row in range(len(case["simulations"]))],
        "uncertainty_penalty": case["penalty"],
    }
    return config, tables, arguments
