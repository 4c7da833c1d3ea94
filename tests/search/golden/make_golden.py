"""Makes the golden trees of this search itself, from an evaluator that hashes. To make them again::

    python -m tests.search.golden.make_golden

They pin every array to the last bit: an implementation in another language, and every later version of this one, must
produce them. Numbers are float32, written out in full.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from crsm.config import SearchConfig
from crsm.search import Tree, search
from tests.search.fakes import HashEvaluator

FOLDER = Path(__file__).parent
SEEDS = [11, 12, 13]
NUM_ACTIONS = 4
NUM_LAYERS = 3
WEIGHTS_L = [0.5, 0.25, 0.25]
PENALTY = 0.25
TERMINAL_TOKENS = [3, 7]
SETTINGS: dict[str, dict[str, Any]] = {
    "puct_raw": {"policy": "puct", "q_transform": "raw"},
    "puct_minmax": {"policy": "puct", "q_transform": "minmax"},
    "gumbel": {"policy": "gumbel"},
    "gumbel_noise": {"policy": "gumbel", "gumbel_scale": 1.0, "max_considered_actions": 3},
}
SHARED: dict[str, Any] = {"simulations": 20, "max_depth": 4, "root_prior_mass": 0.15}


def settings_of(name: str) -> SearchConfig:
    return SearchConfig(**SHARED, **SETTINGS[name])


def run(name: str, rows: list[int] | None = None) -> Tree:
    """The search of one golden file, of all its trees or of some."""
    rows = list(range(len(SEEDS))) if rows is None else rows
    return search(
        HashEvaluator([SEEDS[row] for row in rows], NUM_ACTIONS, NUM_LAYERS),
        settings_of(name),
        consensus_weights_L=WEIGHTS_L,
        uncertainty_penalty=PENALTY,
        terminal_tokens=TERMINAL_TOKENS,
        seed=np.array([100 + row for row in rows]),
        # A budget of its own for the last tree.
        simulations=np.array([20, 20, 12])[rows],
    )


def array_fields(tree: Tree) -> dict[str, np.ndarray]:
    """Every array of a tree that has a row per tree, by name."""
    fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return {name: array for name, array in fields.items() if isinstance(array, np.ndarray) and "_B" in name}


def main() -> None:
    for name in SETTINGS:
        path = FOLDER / f"{name}.json"
        arrays = {field: array.tolist() for field, array in array_fields(run(name)).items()}
        path.write_text(json.dumps(arrays, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
