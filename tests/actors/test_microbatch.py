"""Micro-batches with a service time that is known: 1 ms, 10 µs a step, 10 µs a simulation."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from actors.microbatch import Grant, fill, hopeless, in_excess
from actors.ranking import Ask, FairShare, Turn
from actors.service_time import ServiceTime


def known_service() -> ServiceTime:
    service = ServiceTime()
    service._overhead, service._per_step, service._per_work = 1e-3, 64 * 10e-6, 64 * 10e-6
    return service


SERVICE = known_service()


def turns(*asks: Ask) -> list[Turn]:
    """In this order."""
    return [Turn(ask, 0.0, float(i)) for i, ask in enumerate(asks)]


def filled(*asks: Ask, start: float = 0.0, max_batch: int = 8, least: int = 16) -> tuple[Grant, ...]:
    return fill(turns(*asks), start, SERVICE, max_batch, least)[1]


def simulations(grants: tuple[Grant, ...]) -> dict[int, int]:
    return {grant.ask.ticket: grant.simulations for grant in grants}


def test_as_many_as_fit_into_one_search_in_the_order_of_the_ranking() -> None:
    taken, grants = fill(turns(*(Ask(i) for i in range(5))), 0.0, SERVICE, 3, 16)
    assert [turn.ask.ticket for turn in taken] == [0, 1, 2] and simulations(grants) == {0: 64, 1: 64, 2: 64}


def test_a_request_that_would_be_late_gets_fewer_simulations() -> None:
    # 1 ms + 64 · 20 µs = 2.28 ms in full; 2 ms leave 1 ms for simulations: 50 of 20 µs.
    assert simulations(filled(Ask(0, deadline=0.002))) == {0: 50}
    assert simulations(filled(Ask(0, deadline=0.0023))) == {0: 64}
    assert simulations(filled(Ask(0, deadline=1.002), start=1.0)) == {0: 50}


def test_a_request_that_is_late_anyway_gets_the_least_and_is_cut_off_when_it_expires() -> None:
    # The least takes 1 ms + 16 · 20 µs = 1.32 ms.
    assert filled(ask := Ask(0, deadline=0.001, expires=0.002)) == (Grant(ask, 16, 0.002),)
    assert filled(ask := Ask(0, deadline=0.001)) == (Grant(ask, 16, None),)
    assert filled(Ask(0, deadline=0.001, expires=0.0013)) == ()
    assert hopeless(Ask(0, deadline=0.001, expires=0.0013), 0.0, SERVICE, 16)
    assert not hopeless(Ask(0, deadline=0.001, simulations=8, expires=0.0013), 0.0, SERVICE, 16)


def test_all_of_a_search_are_cut_alike_so_that_the_most_urgent_is_in_time() -> None:
    # 2 ms of simulations for two trees of 10 µs each beside 10 µs a step: 66 in full, so three trees get 50.
    urgent, others = Ask(0, deadline=0.003), [Ask(i, deadline=0.1) for i in (1, 2)]
    assert simulations(filled(urgent, others[0])) == {0: 64, 1: 64}
    assert simulations(filled(urgent, *others)) == {0: 50, 1: 50, 2: 50}


def test_nobody_is_cut_below_the_least_for_the_sake_of_another() -> None:
    # 1 ms of simulations: 10 µs · (1 + n) · 16 ≤ 1 ms holds for n ≤ 5.
    asks = [Ask(i, deadline=0.002) for i in range(8)]
    assert simulations(filled(*asks)) == dict.fromkeys(range(5), 16)


def test_who_would_cost_the_others_more_than_it_gets_waits() -> None:
    calm, urgent = [Ask(i, deadline=0.1) for i in range(3)], Ask(9, deadline=0.0015)
    assert simulations(filled(*calm, urgent)) == {0: 64, 1: 64, 2: 64}
    # Alone the urgent one is served: 0.5 ms for simulations of 20 µs.
    assert simulations(filled(urgent)) == {9: 25}


def test_requests_without_a_deadline_are_never_cut_nor_mixed_with_those_that_have_one() -> None:
    free, bound = [Ask(i) for i in range(2)], Ask(9, deadline=0.002)
    assert simulations(filled(free[0], bound, free[1])) == {0: 64, 1: 64}
    assert simulations(filled(bound, *free)) == {9: 50}
    assert simulations(filled(Ask(0), start=1e6)) == {0: 64}


def test_more_trees_of_one_request_cost_more() -> None:
    # 1 ms for simulations of 10 µs · (1 + 4).
    assert simulations(filled(Ask(0, deadline=0.002, hypotheses=4))) == {0: 20}


TIMES = st.none() | st.floats(0, 0.02)
ASKS = st.builds(
    Ask, st.just(0), st.sampled_from("abc"), st.floats(0, 1), st.integers(1, 128), st.integers(1, 3), TIMES, TIMES
)


@given(st.lists(ASKS, max_size=20), st.floats(0, 0.01), st.integers(1, 8), st.integers(1, 32))
def test_every_budget_is_in_bounds_and_who_can_be_in_time_is(
    asks: list[Ask], start: float, max_batch: int, least: int
) -> None:
    asks = [replace(ask, ticket=i) for i, ask in enumerate(asks)]
    order = FairShare().order(asks)
    taken, grants = fill(order, start, SERVICE, max_batch, least)
    assert [turn.ask for turn in taken] == [grant.ask for grant in grants]
    assert len(grants) <= max_batch and len({grant.ask.ticket for grant in grants}) == len(grants)
    for grant in grants:
        assert min(least, grant.ask.simulations) <= grant.simulations <= grant.ask.simulations
        assert not hopeless(grant.ask, start, SERVICE, least)
        assert grant.ask.deadline is not None or (grant.simulations, grant.deadline) == (grant.ask.simulations, None)
    if grants:
        steps = max(grant.simulations for grant in grants)
        end = start + SERVICE.estimate(steps, sum(grant.simulations * grant.ask.hypotheses for grant in grants))
        for grant in grants:
            assert grant.deadline is None or end <= grant.deadline + 1e-9
    elif asks:
        assert all(hopeless(ask, start, SERVICE, least) for ask in asks)


def test_beyond_the_waiting_room_those_whose_target_has_passed_go_first_and_then_the_last() -> None:
    order = turns(Ask(5, deadline=2.0), Ask(3, deadline=0.5), Ask(2), Ask(1, deadline=0.7), Ask(4, deadline=3.0))
    assert [ask.ticket for ask in in_excess(order, 5, now=1.0)] == []
    assert [ask.ticket for ask in in_excess(order, 4, now=1.0)] == [1]
    assert [ask.ticket for ask in in_excess(order, 1, now=1.0)] == [1, 3, 4, 2]
