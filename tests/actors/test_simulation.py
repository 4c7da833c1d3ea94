"""The simulated pool against hit rates that are worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.simulation import Costs, Demand, simulate

SEARCH = Costs(overhead=0.6, per_step=0.0, per_simulation=0.0, request_bytes=1000, spread=0.0)


def test_one_planner_answers_one_of_two_generations_in_time() -> None:
    """A token a second, lag 0, no lateness: a plan has one second, a search takes 0.6 s. The first request of a step
    is back in time; the second would be back 0.2 s too late. The budget is the least there is: nothing can be cut."""
    outcome = simulate(
        1,
        Demand(2, 1.0, lag=0, max_lag=0, simulations=16),
        SEARCH,
        seconds=50,
        max_in_flight=1,
        max_batch=1,
        probe_interval=99,
    )
    assert (outcome.due, outcome.asked, outcome.hits, outcome.in_time) == (100, 100, 50, 50)
    assert outcome.hit_rate == 0.5 and outcome.busy == pytest.approx(0.6)
    assert outcome.messages_per_second == 2.0 and outcome.bytes_per_second == 1000.0


def test_merged_into_one_search_both_are_in_time() -> None:
    outcome = simulate(1, Demand(2, 1.0, lag=0, max_lag=0), SEARCH, seconds=50, max_in_flight=1, max_batch=2)
    assert outcome.hit_rate == 1.0 and outcome.searches_per_second == 1.0


def test_a_second_planner_does_the_other_half() -> None:
    outcome = simulate(2, Demand(2, 1.0, lag=0, max_lag=0), SEARCH, seconds=50, max_in_flight=1, max_batch=1)
    assert outcome.hit_rate == 1.0 and outcome.busy == pytest.approx(0.6)


def test_with_more_lag_what_was_late_is_in_time_and_what_is_beyond_the_room_is_not_asked_for() -> None:
    demand = Demand(3, 1.0, lag=1, max_lag=0)
    outcome = simulate(1, demand, SEARCH, seconds=100, max_in_flight=1, max_batch=1, max_waiting=1)
    # 1 / 0.6 = 1.67 searches a second is all that one planner can do, of three that are due.
    assert 0.45 <= outcome.hit_rate <= 1 / 1.8 and outcome.asked < outcome.due


def test_a_search_that_takes_longer_than_a_plan_is_of_use_hits_nothing() -> None:
    outcome = simulate(1, Demand(1, 1.0, lag=0, max_lag=0), replace(SEARCH, overhead=1.5), seconds=20)
    assert outcome.hits == 0 and 0 < outcome.requests_per_second < 1


def test_budgets_shrink_to_the_deadline() -> None:
    costs = Costs(overhead=0.0, per_step=0.025, per_simulation=0.0, request_bytes=1, spread=0.0)
    # 64 steps of 25 ms are 1.6 s; one second is 40 steps, once the pool has learned it.
    outcome = simulate(1, Demand(1, 1.0, lag=0, max_lag=1), costs, seconds=200, warm_up=100, max_in_flight=1)
    assert 20 <= outcome.simulations <= 40 and outcome.in_time == outcome.due == 200


def test_the_pool_s_own_process_and_the_link_bound_what_it_can_do() -> None:
    quick, demand = replace(SEARCH, overhead=0.001), Demand(8, 1.0, lag=0, max_lag=0)
    rules = {"max_batch": 1, "max_in_flight": 1}
    assert simulate(8, demand, quick, seconds=20, **rules).hit_rate == 1.0
    assert simulate(8, demand, replace(quick, call=0.5), seconds=20, **rules).hit_rate <= 0.25
    link = replace(quick, bandwidth=2000.0)
    assert 0 < simulate(8, demand, link, seconds=20, **rules).hit_rate <= 0.25


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    demand, costs = Demand(20, 10.0), replace(SEARCH, overhead=0.05, per_simulation=1e-4, spread=0.3)
    first, again, other = (simulate(2, demand, costs, seconds=5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
