"""The scorer that ``sandbox`` runs for ``gym``; imported, with the whole library, where no answer has been seen."""

from __future__ import annotations

from typing import Any

import reasoning_gym


def score(payload: dict[str, Any]) -> float:
    """The library's score of an answer to the first problem of a seed."""
    dataset = reasoning_gym.create_dataset(payload["dataset"], seed=payload["seed"], size=1)
    return float(dataset.score_answer(payload["answer"], dataset[0]))
