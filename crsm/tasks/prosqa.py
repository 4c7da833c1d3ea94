"""Which of two things is the root? Reachability in a graph of "every X is a Y" (ProsQA, arXiv 2412.06769).

    prosqa 7 3 | 3 12 | 7 9 | … / 7 12 40 = the path 7 3 12 yes
    statements "7 is a 3"         root and two candidates, of which one can be reached

The last node of the answer is the answer; what stands before it is the way there. Each statement is easily looked up;
which of several to follow shows only at the end of the way.

Graphs grow as the paper's: node by node, each with a few earlier nodes that point to it, a part of them kept from
descending from one of the first two nodes, of which one is the root and the other one leads to the wrong candidate. The
figures of this module's constants were fitted to the public validation problems. Names are drawn for each problem, and
problems that differ in them only are one problem.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate, pairwise
from math import exp, factorial
from typing import Any

import numpy as np

from crsm.config import ProsqaConfig
from crsm.tasks.base import (
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Attempt,
    Problem,
    Split,
    draw_in_split,
    keyed_bits,
)
from crsm.tasks.closed import PATH_PREAMBLE, ClosedTask
from crsm.tasks.jsonl import read_bytes

_MEAN_PARENTS = 1.7
_ORPHANS = 0.2
"""Share of the nodes that a Poisson distribution leaves without a parent and that stay so; the others have one."""
_DEPTH_WEIGHT = 1.5
"""How much likelier a node of one more level is to become a parent."""
_APART = 0.35
"""Share of nodes that do not descend from the second node, and the same of the first."""
_FAR = 0.7
"""Share of problems that ask for one of the farthest targets, and not for any."""
_MAX_PARENTS = 8

_UNIT = 2.0**-64


def _parents_table() -> list[float]:
    shares = [exp(-_MEAN_PARENTS) * _MEAN_PARENTS**k / factorial(k) for k in range(_MAX_PARENTS)]
    shares[1] += shares[0] * (1 - _ORPHANS)
    shares[0] *= _ORPHANS
    return list(accumulate(shares))


_PARENTS = _parents_table()

Edges = list[tuple[int, int]]
"""From a lower to a higher node."""


class Prosqa(ClosedTask):
    """The task for some settings; reads its file, if it has one.

    Raises:
        ValueError: the file cannot be read or has another form; the record is named.
    """

    def __init__(self, config: ProsqaConfig) -> None:
        super().__init__(config.label, config.weight, config.preamble, PATH_PREAMBLE)
        self._config = config
        self._read = [] if config.path is None else self._read_file(config.path)

    def words(self) -> list[str]:
        """Structure, verdicts, labels."""
        labels = map(str, range(self._config.labels))
        return ["|", "/", "=", VERDICT_RIGHT, VERDICT_WRONG, *PATH_PREAMBLE, "prosqa", *labels]

    def size(self, split: Split) -> int | None:
        """No known end, but for the test split where it is a file."""
        return len(self._read) if self._read and split == "test" else None

    def generate(self, seed: int, split: Split, index: int) -> Problem:
        """A grown graph; a test problem of the file, in its order, if there is one."""
        if self._read and split == "test":
            return self._read[index % len(self._read)]
        config = self._config
        num_bits = 16 * config.max_nodes

        def draw(trial: int) -> tuple[list[int], Question | None]:
            bits = keyed_bits(num_bits, self.name, seed, split, index, trial).tolist()
            return bits, _grow(config, bits)

        def key_of(drawn: tuple[list[int], Question | None]) -> str | None:
            return drawn[1].key if drawn[1] is not None else None

        bits, question = draw_in_split(draw, key_of, split, self.name)
        assert question is not None
        return self._problem(question, split, keyed_bits(config.labels + 2 * num_bits, *map(str, bits[:2])))

    def attempts(self, problem: Problem, rng: np.random.Generator, count: int) -> list[Attempt]:
        """Half of them shortest ways to the target; the others leave one for a node from which it cannot be reached."""
        steps = len(problem.data["path"])
        children: dict[int, list[int]] = problem.data["children"]
        distance: dict[int, int] = problem.data["distance"]
        attempts = []
        for kind, share, *ties in rng.random((count, steps + 2)).tolist():
            nodes = [problem.data["start"]]
            for tie in ties[: steps - 1]:
                nearer = [v for v in children[nodes[-1]] if distance.get(v) == distance[nodes[-1]] - 1]
                nodes.append(nearer[int(tie * len(nearer))])
            if correct := kind < 0.5:
                attempts.append(Attempt(self._answer([str(node) for node in nodes]), correct))
                continue
            exits = [at for at, node in enumerate(nodes) if any(v not in distance for v in children.get(node, ()))]
            if exits:
                del nodes[exits[int(share * len(exits))] + 1 :]
                onward = [v for v in children[nodes[-1]] if v not in distance]
                while onward:
                    nodes.append(onward[int(rng.integers(len(onward)))] if len(onward) > 1 else onward[0])
                    onward = children.get(nodes[-1], [])
            else:
                nodes = nodes[: 1 + int(share * (len(nodes) - 1))]  # Every way leads there: one that stops too soon.
            attempts.append(Attempt(self._answer([str(node) for node in nodes]), correct))
        return attempts

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the last node is the target and, if settings ask for it, every step from the root an edge."""
        words = self._words_of(answer)
        data = problem.data
        if not words or len(words) > len(data["nodes"]) or not all(word in data["nodes"] for word in words):
            return False
        if words[-1] != str(data["goal"]):
            return False
        if self._config.judge == "answer":
            return True
        nodes = [int(word) for word in words]
        return nodes[0] == data["start"] and all(v in data["children"].get(u, ()) for u, v in pairwise(nodes))

    def _problem(self, question: Question, split: Split, bits: np.ndarray) -> Problem:
        """Names, order of statements and candidates, all by ``bits``."""
        labels: list[int] = bits[: self._config.labels].argsort().tolist()
        order = bits[self._config.labels :][: len(question.edges)].argsort().tolist()
        ties = bits[self._config.labels + len(question.edges) :].tolist()
        edges = [(labels[u], labels[v]) for u, v in (question.edges[place] for place in order)]
        distance = {labels[node]: steps for node, steps in question.distances_to_target().items()}
        children: dict[int, list[int]] = {}
        for u, v in edges:
            children.setdefault(u, []).append(v)
        root, target, other = labels[question.root], labels[question.target], labels[question.other]
        path, decisions = [root], []
        while path[-1] != target:
            nearer = [v for v in children[path[-1]] if distance.get(v) == distance[path[-1]] - 1]
            if len(children[path[-1]]) > 1:
                decisions.append(len(path))
            path.append(nearer[ties[len(path)] % len(nearer)])
        pair = (target, other) if ties[0] & 1 else (other, target)
        prompt = f"prosqa {''.join([f'{u} {v} | ' for u, v in edges])}/ {root} {pair[0]} {pair[1]} ="
        data = {
            "edges": [list(edge) for edge in edges],
            "start": root,
            "goal": target,
            "other": other,
            "path": path,
            "nodes": {str(node) for edge in edges for node in edge},
            "children": children,
            "distance": distance,
            "decisions": decisions,
        }
        return Problem(self.name, split, prompt, self._answer([str(node) for node in path]), question.key, data)

    def _read_file(self, path: str) -> list[Problem]:
        content = read_bytes(path)
        try:
            records = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path!r} is not JSON: {error}") from error
        if not isinstance(records, list) or not records:
            raise ValueError(f"{path!r} holds a {type(records).__name__}; allowed: a list of at least one problem")
        found = []
        for number, record in enumerate(records):
            question = _question(record, f"{path!r} record {number}", self._config.labels)
            bits = keyed_bits(self._config.labels + 4 * len(question.edges) + 64, "names", question.key)
            found.append(self._problem(question, "test", bits))
        return found


class Question:
    """A graph without names, a root and two candidates; ``target`` can be reached from the root, ``other`` cannot."""

    __slots__ = ("edges", "key", "other", "root", "target")

    def __init__(self, edges: Edges, root: int, target: int, other: int) -> None:
        self.edges, self.root, self.target, self.other = edges, root, target, other
        # Nodes are numbered as they were grown, which no name, and no order of statements, tells.
        self.key = f"prosqa {sorted(edges)} from {root} to {target} not {other}"

    def distances_to_target(self) -> dict[int, int]:
        """Of every node that leads to the target, the number of edges."""
        parents: dict[int, list[int]] = {}
        for u, v in self.edges:
            parents.setdefault(v, []).append(u)
        distance, frontier = {self.target: 0}, [self.target]
        for node in frontier:
            for parent in parents.get(node, ()):
                if parent not in distance:
                    distance[parent] = distance[node] + 1
                    frontier.append(parent)
        return distance


def _grow(config: ProsqaConfig, random_bits: list[int]) -> Question | None:
    """A graph with a question to it; None: this draw has none."""
    bits = iter(random_bits)
    count = config.min_nodes + next(bits) % (config.max_nodes - config.min_nodes + 1)
    descent, depth = [1, 2], [0, 0]
    # Possible parents and their summed weights: nodes that do not descend from the second, from the first, all.
    pools: tuple[tuple[list[int], list[float]], ...] = (([0], [1.0]), ([1], [1.0]), ([0, 1], [1.0, 2.0]))
    edges: Edges = []
    try:
        for node in range(2, count):
            share = next(bits) * _UNIT
            pool, weights = pools[0 if share <= _APART else 1 if share <= 2 * _APART else 2]
            wanted = min(bisect_right(_PARENTS, next(bits) * _UNIT), len(pool))
            parents: set[int] = set()
            while len(parents) < wanted:
                parents.add(pool[bisect_right(weights, next(bits) * _UNIT * weights[-1])])
            edges += [(parent, node) for parent in sorted(parents)]
            of = 0
            for parent in parents:
                of |= descent[parent]
            descent.append(of)
            depth.append(min((depth[parent] + 1 for parent in parents), default=0))
            weight = 1.0 + _DEPTH_WEIGHT * depth[node]
            for kind, (nodes, sums) in enumerate(pools):
                if kind == 2 or not of & (2, 1)[kind]:
                    nodes.append(node)
                    sums.append(sums[-1] + weight)
        return _ask(config, edges, descent, next(bits), next(bits), next(bits))
    except StopIteration:
        return None


def _ask(config: ProsqaConfig, edges: Edges, descent: list[int], *bits: int) -> Question | None:
    used = sorted({0, 1}.union(*edges))
    if len(used) < config.min_nodes:
        return None
    number = {node: place for place, node in enumerate(used)}
    edges = [(number[u], number[v]) for u, v in edges]
    children: list[list[int]] = [[] for _ in used]
    for u, v in edges:
        children[u].append(v)
    found: dict[int, list[tuple[int, int]]] = {}
    for root in (0, 1):
        if not any(descent[node] == 2 - root and not children[number[node]] for node in used[2:]):
            continue
        distance, frontier = {root: 0}, [root]
        for node in frontier:
            for child in children[node]:
                if child not in distance:
                    distance[child] = distance[node] + 1
                    frontier.append(child)
            if not children[node] and config.min_steps <= distance[node] <= config.max_steps:
                found.setdefault(distance[node], []).append((root, node))
    if not found:
        return None
    pairs = [pair for steps in sorted(found) for pair in found[steps]]
    if bits[0] * _UNIT < _FAR:
        pairs = found[max(found)]
    root, target = pairs[bits[1] % len(pairs)]
    others = [number[node] for node in used[2:] if descent[node] == 2 - root and not children[number[node]]]
    return Question(edges, root, target, others[bits[2] % len(others)])


def _question(record: Any, where: str, labels: int) -> Question:
    """A record of the public form, checked."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a {type(record).__name__}; allowed: an object")
    symbols, edges = record.get("idx_to_symbol"), record.get("edges")
    if not isinstance(symbols, list) or not 0 < len(symbols) <= labels:
        count = len(symbols) if isinstance(symbols, list) else None
        raise ValueError(f"{where}: idx_to_symbol has {count} names; allowed: 1 to labels = {labels}")
    names = range(len(symbols))
    if (
        not isinstance(edges, list)
        or not edges
        or not all(
            isinstance(edge, list) and len(edge) == 2 and all(type(node) is int and node in names for node in edge)
            for edge in edges
        )
    ):
        raise ValueError(f"{where}: edges = {str(edges)[:40]}; allowed: pairs of numbers below {len(symbols)}")
    nodes = []
    for field in ("root", "target", "neg_target"):
        if type(record.get(field)) is not int or record[field] not in names:
            raise ValueError(f"{where}: {field} = {str(record.get(field))[:40]}; allowed: 0 to {len(symbols) - 1}")
        nodes.append(record[field])
    question = Question([(u, v) for u, v in edges], *nodes)
    if question.root not in question.distances_to_target() or question.root == question.target:
        raise ValueError(f"{where}: the target cannot be reached from the root; allowed: one of the candidates can")
    return question
