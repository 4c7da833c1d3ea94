"""What a deliberation is expected to be worth beside others: which positions deserve the planners' time.

``value = (entropy + ε) · (disagreement + ε) · (expected gate + ε)``

* **entropy** of the next token's distribution, in nats: where System 1 knows what to say, a plan changes nothing;
* **disagreement**, the standard deviation over layers of the critics' values: where all layers judge the position
  alike, a search has little to find out;
* **expected gate**, the mean confidence of the plans that this generation has got: what is not written is not worth
  making.

The product, since each factor alone can make a plan worthless. The tiny ε lets a request with a factor of 0 still rank
by the other two, and above nothing at all: a generation whose gates have been shut so far would otherwise never be
asked about again, and its expected gate could never recover. Values order requests; they have no unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-3
"""Added to every factor. Entropies are of the order of 1, disagreements and gates of 0.1."""


def entropy(log_probs_BV: np.ndarray) -> np.ndarray:
    """Entropy (B,) in nats of distributions that are given by their log-probabilities; ``-inf`` is a probability of
    0."""
    probs_BV = np.exp(log_probs_BV)
    # 0 · −inf would be NaN; the limit is 0.
    terms_BV = probs_BV * np.where(probs_BV > 0, log_probs_BV, 0.0)
    return np.maximum(-terms_BV.sum(axis=-1), 0.0)


def disagreement(values_BL: np.ndarray) -> np.ndarray:
    """Standard deviation (B,) over layers."""
    return np.asarray(values_BL.std(axis=-1))


def value_of_computation(
    log_probs_BV: np.ndarray, values_BL: np.ndarray, expected_gate_B: np.ndarray | float
) -> np.ndarray:
    """What a plan for each of B positions is expected to be worth: positive, finite, rising with every factor.

    Args:
        log_probs_BV: of the next token.
        values_BL: the critics' values per layer, in [0, 1].
        expected_gate_B: mean confidence to expect of a plan (:class:`ExpectedGate`).

    Returns:
        (B,) float64. A factor that is NaN or infinite counts as 0: what cannot be judged ranks last, and still ranks.
    """
    return value_at_entropy(entropy(log_probs_BV), values_BL, expected_gate_B)


def value_at_entropy(entropy_B: np.ndarray, values_BL: np.ndarray, expected_gate_B: np.ndarray | float) -> np.ndarray:
    """The same, where the entropies of the next tokens are known."""
    value_B = np.ones(len(entropy_B))
    for factor_B in (entropy_B, disagreement(values_BL), np.asarray(expected_gate_B)):
        value_B = value_B * (np.nan_to_num(factor_B.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) + EPSILON)
    return value_B


class ExpectedGate:
    """Running mean of the confidence of each generation's plans.

    A generation's mean starts from that of all generations, which weighs as much as ``prior_weight`` plans, and both
    forget: a plan weighs at least ``1 / memory``, so that a text that has become hard is noticed. One thread owns it.
    """

    def __init__(
        self, initial: float = 0.5, *, prior_weight: float = 4.0, memory: int = 64, pool_memory: int = 1024
    ) -> None:
        """
        Args:
            initial: expected before any plan was seen; high enough that planners are asked at all.
            prior_weight: plans' worth of the mean over all generations in the mean of one.
            memory: plans that the mean of one generation remembers.
            pool_memory: plans that the mean over all remembers.
        """
        self._prior_weight, self._memory, self._pool_memory = prior_weight, memory, pool_memory
        self._overall, self._overall_count = initial, prior_weight
        self._means: dict[str, tuple[float, int]] = {}
        """Mean and number of plans, per generation."""

    def observe(self, generation_id: str, confidence_L: np.ndarray | float) -> None:
        """A plan has arrived."""
        gate = confidence_L if isinstance(confidence_L, float) else float(np.mean(confidence_L))
        self._overall_count = min(self._overall_count + 1, float(self._pool_memory))
        self._overall += (gate - self._overall) / self._overall_count
        mean, count = self._means.get(generation_id, (0.0, 0))
        count = min(count + 1, self._memory)
        self._means[generation_id] = mean + (gate - mean) / count, count

    def expected(self, generation_id: str) -> float:
        mean, count = self._means.get(generation_id, (0.0, 0))
        return (mean * count + self._overall * self._prior_weight) / (count + self._prior_weight)

    def expected_all(self, generation_ids: Sequence[str]) -> np.ndarray:
        """(B,) float64."""
        return np.fromiter(map(self.expected, generation_ids), np.float64, len(generation_ids))

    def end(self, generation_id: str) -> None:
        """Forgets a generation; what it taught about all stays."""
        self._means.pop(generation_id, None)

    def __len__(self) -> int:
        return len(self._means)
