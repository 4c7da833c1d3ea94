"""Monte Carlo tree search in a learned latent space, over a batch of trees. NumPy only.

The order of definition: ``numerics`` (exact arithmetic) → ``consensus``, ``evaluator`` (the network's side) → ``tree``
(the data) → ``puct``, ``seq_halving``, ``gumbel``, ``root_actions`` (pure scoring rules) → ``policies`` → ``search``.
"""

from crsm.search.consensus import consensus
from crsm.search.evaluator import Evaluation, Evaluator
from crsm.search.policies import gumbel_action_weights
from crsm.search.root_actions import root_actions_by_prior_mass
from crsm.search.search import search
from crsm.search.seq_halving import considered_visits
from crsm.search.tree import SearchSummary, Tree, export_tree, summarize

__all__ = [
    "Evaluation",
    "Evaluator",
    "SearchSummary",
    "Tree",
    "consensus",
    "considered_visits",
    "export_tree",
    "gumbel_action_weights",
    "root_actions_by_prior_mass",
    "search",
    "summarize",
]
