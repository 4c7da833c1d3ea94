"""Paths in a complete binary tree: from the root to a goal leaf, one decision at every level."""

from __future__ import annotations

import numpy as np

from crsm.config import TreePathConfig
from crsm.tasks.graph import GraphTask


def tree_path(config: TreePathConfig) -> GraphTask:
    """The task for these settings; ``depth`` decisions in a row."""
    child = np.arange(1, 2 ** (config.depth + 1) - 1)
    edges_E2 = np.stack([(child - 1) // 2, child], axis=1)
    route = np.arange(2**config.depth - 1, 2 ** (config.depth + 1) - 1)
    steps = [route]
    for _ in range(config.depth):
        route = (route - 1) // 2
        steps.append(route)
    routes_RS = np.stack(steps[::-1], axis=1)
    decisions = range(1, config.depth + 1)
    return GraphTask(config.label, config.weight, config.labels, config.preamble, edges_E2, routes_RS, decisions)
