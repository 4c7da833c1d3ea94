"""What the graph tasks share: a fixed shape, random labels, shuffled edges, one path to say.

    7 3 | 3 12 | 7 9 | … / 7 12 = the path 7 3 12 yes
    edges                 start goal preamble path verdict

The shape is a template over node numbers; a problem labels the nodes, shuffles the edges and picks one of the routes.
Both tasks write in the same words, so that one model can learn them together.
"""

from __future__ import annotations

import numpy as np

from crsm.tasks.base import VERDICT_RIGHT, VERDICT_WRONG, Attempt, Problem, Split, draw_in_split, keyed_bits
from crsm.tasks.closed import PATH_PREAMBLE, ClosedTask


class GraphTask(ClosedTask):
    """Problems on one directed shape.

    Args:
        name: the task's name.
        weight: its share of the training mix.
        labels: node labels to draw from, the words ``0`` … ``labels - 1``.
        preamble: number of words before the path.
        edges_E2: the shape's edges, from the start outwards; node 0 is the start. (E, 2)
        routes_RS: paths from node 0 to each possible goal, of equal length. (R, S)
        decisions: indices into a route at which the next node is a choice.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        labels: int,
        preamble: int,
        edges_E2: np.ndarray,
        routes_RS: np.ndarray,
        decisions: range,
    ) -> None:
        super().__init__(name, weight, preamble, PATH_PREAMBLE)
        self._labels = [str(label) for label in range(labels)]
        self._edges_E2 = edges_E2
        self._routes_RS = routes_RS
        self._decisions = decisions
        self._num_nodes = int(edges_E2.max()) + 1

    def words(self) -> list[str]:
        """Structure, verdicts, every preamble word (whatever the setting, so that it can change later), labels."""
        return ["|", "/", "=", VERDICT_RIGHT, VERDICT_WRONG, *PATH_PREAMBLE, *self._labels]

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """The problem at ``index`` of the stream of ``seed`` and ``split``."""
        num_labels, num_edges = len(self._labels), len(self._edges_E2)

        def draw(trial: int) -> tuple[np.ndarray, np.ndarray, int, str]:
            bits = keyed_bits(num_labels + num_edges + 1, self.name, seed, split, index, trial)
            label_of_node = bits[:num_labels].argsort()[: self._num_nodes]
            goal = int(bits[-1] % np.uint64(len(self._routes_RS)))
            return bits, label_of_node, goal, self._key(label_of_node, goal)

        bits, label_of_node, goal, key = draw_in_split(draw, lambda drawn: drawn[3], split, self.name)
        order = bits[num_labels:-1].argsort()
        edges: list[list[int]] = label_of_node[self._edges_E2[order]].tolist()
        routes: list[list[int]] = label_of_node[self._routes_RS].tolist()
        route = routes[goal]
        prompt = f"{''.join([f'{u} {v} | ' for u, v in edges])}/ {route[0]} {route[-1]} ="
        data = {"edges": edges, "start": route[0], "goal": route[-1], "path": route, "routes": routes}
        return Problem(self.name, split, prompt, self._route_answer(route), key, data)

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Routes to goals drawn uniformly, the right one included."""
        routes: list[list[int]] = problem.data["routes"]
        goal = problem.data["goal"]
        return [
            Attempt(self._route_answer(routes[choice]), routes[choice][-1] == goal)
            for choice in rng.integers(len(routes), size=count).tolist()
        ]

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is the path, with the preamble or without; what follows a verdict does not count."""
        # The path in a star or a tree is unique, so comparing is verifying.
        return self._words_of(answer) == [str(node) for node in problem.data["path"]]

    def decision_positions(self, problem: Problem) -> list[int]:
        """Indices among the solution's words at which the graph branches."""
        return [len(self._preamble) + step for step in self._decisions]

    def _route_answer(self, route: list[int]) -> str:
        return self._answer([str(node) for node in route])

    def _key(self, label_of_node: np.ndarray, goal: int) -> str:
        # No task name: a tree of depth 1 is a star of 2 arms, and must not be in training under one of the names only.
        edges = sorted(label_of_node[self._edges_E2].tolist())
        start, end = label_of_node[self._routes_RS[goal, [0, -1]]].tolist()
        return f"graph {edges} from {start} to {end}"
