"""Whose turn it is: equal shares, shares by value, and nobody starves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.ranking import Ask, FairShare


def pick(share: FairShare, asks: list[Ask]) -> Ask:
    """The first one is served."""
    turn = share.order(asks)[0]
    share.serve([turn])
    return turn.ask


def test_the_most_valuable_goes_first_and_of_equals_of_one_generation_the_newest() -> None:
    asks = [Ask(0, "a", 1.0), Ask(1, "a", 3.0), Ask(2, "b", 9.0), Ask(3, "a", 1.0)]
    order = [turn.ask.ticket for turn in FairShare().order(asks)]
    # The mean of the best values, 3 and 9, is 6. Weights: a 0.5 + 0.5 · 3/6 = 0.75, then 0.583; b 1.25.
    # Turns end: a 1.33, 3.05, 4.76; b 0.8.
    assert order == [2, 1, 3, 0]


def test_shares_go_half_equally_and_half_by_value() -> None:
    share = FairShare(0.5)
    # Weights 0.5 + 0.5 · (3, 1)/2 = 1.25 and 0.75: five turns to three.
    served = Counter(pick(share, [Ask(2 * i, "a", 3.0), Ask(2 * i + 1, "b", 1.0)]).generation for i in range(800))
    assert served["a"] == pytest.approx(500, abs=2) and served["b"] == pytest.approx(300, abs=2)


@given(st.integers(1, 9), st.integers(1, 60), st.floats(0, 5), st.integers(1, 4))
def test_with_equal_values_everyone_gets_the_same_within_one(
    generations: int, picks: int, value: float, backlog: int
) -> None:
    share = FairShare()
    served: Counter[str] = Counter({f"g{g}": 0 for g in range(generations)})
    for i in range(picks):
        waiting = [
            Ask((i * backlog + b) * generations + g, f"g{g}", value) for b in range(backlog) for g in range(generations)
        ]
        served[pick(share, waiting).generation] += 1
        assert max(served.values()) - min(served.values()) <= 1


@given(st.integers(1, 6), st.lists(st.lists(st.floats(0, 100), min_size=6, max_size=6), min_size=1, max_size=150))
def test_nobody_who_waits_starves_whatever_the_others_are_worth_also_if_its_requests_are_shed(
    generations: int, rounds: list[list[float]]
) -> None:
    """The requests of every round are new: those of the last one were shed, all but the one that was served."""
    share = FairShare(0.5)
    since: Counter[str] = Counter()
    for i, values in enumerate(rounds):
        asks = [Ask(i * generations + g, f"g{g}", values[g]) for g in range(generations)]
        served = pick(share, asks).generation
        for ask in asks:
            since[ask.generation] += 1
        since[served] = 0
        # A turn lasts at most 1 / 0.5, and every pick of another takes at least 1 / G of virtual time off its turns.
        assert max(since.values()) <= generations**2 / 0.5 + 2 * generations


def test_who_has_asked_for_nothing_has_saved_nothing_up() -> None:
    share = FairShare()
    for i in range(100):
        pick(share, [Ask(i, "early", 1.0)])
    served = [pick(share, [Ask(200 + 2 * i, "early", 1.0), Ask(201 + 2 * i, "new", 1.0)]).generation for i in range(20)]
    assert abs(served.count("early") - served.count("new")) <= 1


def test_who_waits_is_not_starved_by_generations_that_come_and_go() -> None:
    share = FairShare()
    picked = [pick(share, [Ask(2 * i, "stays", 1.0), Ask(2 * i + 1, f"g{i}", 1.0)]).generation for i in range(100)]
    assert picked.count("stays") == pytest.approx(50, abs=2)


def test_generations_that_end_without_a_word_are_forgotten() -> None:
    share = FairShare()
    for i in range(5000):
        pick(share, [Ask(2 * i, f"g{i}", 1.0), Ask(2 * i + 1, f"h{i}", 1.0)])
    assert len(share._begins) < 2000 and len(share._ended) < 2000


def test_without_fairness_somebody_would_starve() -> None:
    with pytest.raises(ValueError, match=r"fairness = 0; allowed: above 0, at most 1"):
        FairShare(0)
