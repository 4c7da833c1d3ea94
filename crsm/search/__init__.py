"""Monte Carlo tree search in a learned latent space, over a batch of trees. NumPy, and C++ where it is installed.

The order of definition: ``numerics`` (exact arithmetic) → ``consensus``, ``evaluator`` (the network's side) → ``tree``
(the data) → ``puct``, ``seq_halving``, ``gumbel``, ``root_actions`` (pure scoring rules) → ``policies`` → ``search``
(the definition) → ``reroot``, ``cancel``, ``sketch`` → ``native`` (the same search in C++) → ``engines`` (the choice of
the two).
"""

from crsm.search.cancel import CancelToken
from crsm.search.consensus import consensus
from crsm.search.engines import search
from crsm.search.evaluator import Evaluation, Evaluator
from crsm.search.policies import gumbel_action_weights
from crsm.search.reroot import Rerooted, reroot
from crsm.search.root_actions import root_actions_by_prior_mass
from crsm.search.search import search as python_search
from crsm.search.seq_halving import considered_visits
from crsm.search.sketch import sketch_tree
from crsm.search.tree import SearchSummary, Tree, export_tree, summarize

__all__ = [
    "CancelToken",
    "Evaluation",
    "Evaluator",
    "Rerooted",
    "SearchSummary",
    "Tree",
    "consensus",
    "considered_visits",
    "export_tree",
    "gumbel_action_weights",
    "python_search",
    "reroot",
    "root_actions_by_prior_mass",
    "search",
    "sketch_tree",
    "summarize",
]
