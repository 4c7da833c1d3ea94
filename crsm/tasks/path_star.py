"""Path-star graphs (arXiv 2403.06963): arms leave one centre, the goal is the end of one of them.

Inside an arm each next node can be looked up; at the centre nothing but looking ahead to the goal helps, so a model
trained on next tokens alone stays at chance there.
"""

from __future__ import annotations

import numpy as np

from crsm.config import PathStarConfig
from crsm.tasks.graph import GraphTask


def path_star(config: PathStarConfig) -> GraphTask:
    """The task for these settings; one decision, at the centre."""
    steps = config.length - 1
    arms_AS = 1 + np.arange(config.arms * steps).reshape(config.arms, steps)
    routes_RS = np.concatenate([np.zeros((config.arms, 1), dtype=np.int64), arms_AS], axis=1)
    edges_E2 = np.stack([routes_RS[:, :-1].ravel(), routes_RS[:, 1:].ravel()], axis=1)
    return GraphTask(config.label, config.weight, config.labels, config.preamble, edges_E2, routes_RS, range(1, 2))
