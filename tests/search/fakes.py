"""Evaluators for tests: deterministic, on the CPU, without a network. NumPy only.

Each keeps one integer per node (its "latent") and makes everything it says out of that integer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crsm.search.evaluator import Evaluation

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: a hash of 64-bit integers."""
    z = np.asarray(x, np.uint64) + _GOLDEN_RATIO
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Call(NamedTuple):
    parent_B: np.ndarray
    action_B: np.ndarray
    node_B: np.ndarray
    active_B: np.ndarray


class FakeEvaluator:
    """Keeps latents per tree and node slot and records every call; a subclass says what they mean."""

    def __init__(self, num_trees: int, num_actions: int, num_layers: int) -> None:
        self.num_trees = num_trees
        self.num_actions = num_actions
        self.num_layers = num_layers
        self.latents: list[dict[int, np.uint64 | int]] = [{} for _ in range(num_trees)]
        self.calls: list[Call] = []

    def root_states(self) -> np.ndarray:
        raise NotImplementedError

    def next_states(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def evaluate(self, states: np.ndarray) -> Evaluation:
        raise NotImplementedError

    def root(self) -> Evaluation:
        states = self.root_states()
        for tree in range(self.num_trees):
            self.latents[tree] = {0: states[tree]}
        return self.evaluate(states)

    def expand(
        self, parent_B: np.ndarray, action_B: np.ndarray, node_B: np.ndarray, active_B: np.ndarray
    ) -> Evaluation:
        self.calls.append(Call(parent_B.copy(), action_B.copy(), node_B.copy(), active_B.copy()))
        parents = np.array([self.latents[tree][int(node)] for tree, node in enumerate(parent_B)])
        states = self.next_states(parents, action_B)
        for tree in np.flatnonzero(active_B):
            assert int(node_B[tree]) not in self.latents[tree], "a slot is filled once"
            self.latents[tree][int(node_B[tree])] = states[tree]
        return self.evaluate(states)


class HashEvaluator(FakeEvaluator):
    """Priors and values are hashes of the token sequence; all are exact binary fractions, the same on any machine."""

    def __init__(self, seeds: list[int], num_actions: int, num_layers: int, vocab_size: int = 20) -> None:
        super().__init__(len(seeds), num_actions, num_layers)
        self.seeds = seeds
        self.vocab_size = vocab_size

    def root_states(self) -> np.ndarray:
        return mix(np.array(self.seeds, np.uint64))

    def next_states(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return mix(states ^ mix(tokens.astype(np.uint64)))

    def evaluate(self, states: np.ndarray) -> Evaluation:
        vocabulary_V = np.arange(self.vocab_size, dtype=np.uint64)
        hash_BV = mix(states[:, np.newaxis] ^ mix(vocabulary_V + np.uint64(1000)))
        # Between -6 and -2: the probabilities of up to seven actions add up to less than 1.
        logits_BV = -2.0 - (hash_BV >> np.uint64(48)).astype(np.float32) / np.float32(2**14)
        actions_BA = np.argsort(-logits_BV, axis=1, kind="stable")[:, : self.num_actions]
        layers_L = np.arange(self.num_layers, dtype=np.uint64)
        hash_BL = mix(states[:, np.newaxis] ^ mix(layers_L + np.uint64(2000)))
        return Evaluation(
            actions_BA=actions_BA.astype(np.int64),
            prior_logits_BA=np.take_along_axis(logits_BV, actions_BA, axis=1).astype(np.float32),
            values_BL=(hash_BL >> np.uint64(40)).astype(np.float32) / np.float32(2**24),
        )


class TableEvaluator(FakeEvaluator):
    """A finite decision process: tokens are the actions 0 … A-1, a latent is the number of a state."""

    def __init__(
        self, roots_B: np.ndarray, next_state_ZA: np.ndarray, prior_logits_ZA: np.ndarray, values_ZL: np.ndarray
    ) -> None:
        super().__init__(len(roots_B), next_state_ZA.shape[1], values_ZL.shape[1])
        self.roots_B = np.asarray(roots_B, np.int64)
        self.next_state_ZA = np.asarray(next_state_ZA, np.int64)
        self.prior_logits_ZA = np.asarray(prior_logits_ZA, np.float32)
        self.values_ZL = np.asarray(values_ZL, np.float32)

    def root_states(self) -> np.ndarray:
        return self.roots_B

    def next_states(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.next_state_ZA[states, tokens]

    def evaluate(self, states: np.ndarray) -> Evaluation:
        actions_BA = np.tile(np.arange(self.num_actions, dtype=np.int64), (len(states), 1))
        return Evaluation(actions_BA, self.prior_logits_ZA[states], self.values_ZL[states])


def bandit(priors: list[float], values: list[float], *, root_value: float = 0.5, num_trees: int = 1) -> TableEvaluator:
    """One decision: action a is worth ``values[a]``. Search it with ``max_depth=1``.

    State 0 is the root, state 1 + a the end of action a.
    """
    actions = len(priors)
    next_state_ZA = np.tile(np.arange(1, actions + 1), (actions + 1, 1))
    logits_ZA = np.tile(np.log(np.array(priors, np.float32)), (actions + 1, 1))
    return TableEvaluator(
        np.zeros(num_trees, np.int64), next_state_ZA, logits_ZA, np.array([[root_value], *([v] for v in values)])
    )


class HiddenPathEvaluator(FakeEvaluator):
    """Find the one right path of ``depth`` tokens: a noisy prior, an uninformed value on the way, exact leaves.

    Tokens are 0 … A-1 and a latent encodes the path in base A with a leading 1. The prior's log-odds favour the right
    token by 1 on average, with Gaussian noise of 1.5: its first choice is often wrong. A node on the way has value 0.4
    to 0.6 by hash, right or wrong; a leaf has value 0.95 if the path is right, else 0.05.
    """

    def __init__(self, num_trees: int, num_actions: int, depth: int, seed: int) -> None:
        super().__init__(num_trees, num_actions, num_layers=2)
        self.depth = depth
        rng = np.random.default_rng(seed)
        self.targets_BD = rng.integers(num_actions, size=(num_trees, depth))
        self.noise_BZA = rng.normal(scale=1.5, size=(num_trees, num_actions**depth * 2, num_actions))
        self.hints_BZ = rng.uniform(0.4, 0.6, size=(num_trees, num_actions**depth * 2))
        self.starts_D = [num_actions**d for d in range(depth + 1)]

    def root_states(self) -> np.ndarray:
        return np.ones(self.num_trees, np.int64)

    def next_states(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return states * self.num_actions + tokens

    def evaluate(self, states: np.ndarray) -> Evaluation:
        batch, actions = self.num_trees, self.num_actions
        actions_BA = np.zeros((batch, actions), np.int64)
        logits_BA = np.zeros((batch, actions), np.float32)
        values_BL = np.zeros((batch, self.num_layers), np.float32)
        for tree, state in enumerate(states):
            depth = next(d for d in reversed(range(self.depth + 1)) if state >= self.starts_D[d])
            path = [(int(state) // actions**k) % actions for k in reversed(range(depth))]
            right = path == self.targets_BD[tree, :depth].tolist()
            logits = np.zeros(actions)
            if depth < self.depth:
                logits = self.noise_BZA[tree, state].copy()
                logits[self.targets_BD[tree, depth]] += 1.0 if right else 0.0
            logits -= np.log(np.exp(logits).sum())
            order = np.argsort(-logits, kind="stable")
            actions_BA[tree], logits_BA[tree] = order, logits[order]
            values_BL[tree] = (0.95 if right else 0.05) if depth == self.depth else self.hints_BZ[tree, state]
        return Evaluation(actions_BA, logits_BA, values_BL)
