"""Decisions of the pool: every rule at once small enough to be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.autoscaling import ScalingPolicy
from actors.fleet import Failure, Phase, RestartPolicy
from actors.health import HealthPolicy
from actors.ranking import Ask
from actors.scheduling import Decision, PoolState

HEALTH = HealthPolicy(interval=1.0, timeout=5.0, search_timeout=20.0)


def ready_pool(count: int = 2, max_in_flight: int = 2, **settings: Any) -> PoolState:
    state = PoolState(count, max_in_flight, **({"max_batch": 1, "health": HEALTH} | settings))
    assert state.decide(0.0).start == tuple(range(count))
    for planner in range(count):
        assert state.ready(planner, 1, 0.0)
    return state


def submit(state: PoolState, *tickets: int, now: float = 0.0) -> Decision:
    for ticket in tickets:
        state.arrived([Ask(ticket)])
    return state.decide(now)


def sent(decision: Decision) -> list[tuple[int, tuple[int, ...]]]:
    """(planner, tickets)"""
    return [(planner, batch.tickets) for planner, batch in decision.send]


def numbers(state: PoolState, planner: int) -> list[int]:
    return [batch.number for batch in state.slots[planner].in_flight]


def tickets(state: PoolState, planner: int) -> list[int]:
    return [ticket for batch in state.slots[planner].in_flight for ticket in batch.tickets]


# -------------------------------------------------------------------------------------------------- in order


def test_in_order_the_least_loaded_planner_gets_the_oldest_batch_as_it_was_submitted() -> None:
    state = ready_pool(shed=False)
    state.arrived([Ask(0, value=0.0), Ask(1, value=9.0), Ask(2, deadline=-1.0, expires=-1.0)])
    assert sent(submit(state, 3, 4)) == [(0, (0, 1, 2)), (1, (3,)), (0, (4,))]
    assert state.answered(0, 1, 0, 0.0) and state.answered(0, 1, 2, 0.0)
    assert sent(submit(state, 5, 6)) == [(0, (5,)), (0, (6,))]
    assert state.room() is None


def test_in_order_batches_wait_for_their_turn_and_nothing_is_shed_or_cut() -> None:
    state = ready_pool(count=1, max_in_flight=1, shed=False)
    assert sent(submit(state, *range(50))) == [(0, (0,))]
    for number in range(49):
        assert state.answered(0, 1, number, 100.0 * number)
        decision = state.decide(100.0 * number)
        assert sent(decision) == [(0, (number + 1,))] and not decision.shed
        assert decision.send[0][1].grants[0].simulations == 64


def test_requests_wait_for_the_first_start_of_a_planner_and_for_no_restart() -> None:
    state = PoolState(1, 2, health=HEALTH)
    state.arrived([Ask(0)])
    assert state.decide(0.0) == Decision(start=(0,))
    assert state.ready(0, 1, 0.0)
    assert sent(state.decide(0.0)) == [(0, (0,))]
    assert state.failed(0, 1, Failure.ACTOR_DIED, 5.0) == (0,)
    assert submit(state, 1, now=5.0) == Decision(stranded=(1,)) and state.room() == 0
    assert state.decide(6.0) == Decision(start=(0,))
    assert submit(state, 2, now=6.0) == Decision(stranded=(2,))


def test_without_planners_everything_is_stranded_and_there_is_no_room() -> None:
    state = PoolState(0, 2)
    assert submit(state, 0, 1) == Decision(stranded=(0, 1)) and state.room() == 0
    assert submit(PoolState(0, 2, shed=False), 0, 1) == Decision(stranded=(0, 1))


# -------------------------------------------------------------------------------------------------- ranked


def test_requests_that_wait_become_one_search_most_valuable_first() -> None:
    state = ready_pool(count=1, max_in_flight=1, max_batch=3)
    assert sent(submit(state, 0)) == [(0, (0,))]
    for ticket, value in ((1, 1.0), (2, 5.0), (3, 2.0), (4, 3.0)):
        state.arrived([Ask(ticket, f"g{ticket}", value)])
        assert state.decide(0.0).send == ()  # the fourth has to go: the waiting room holds one batch
    assert state.answered(0, 1, 0, 0.01)
    assert sent(state.decide(0.01)) == [(0, (2, 4, 3))]
    assert (state.counts["batches"], state.counts["batched"], state.counts["settled"]) == (2, 4, 2)


def test_no_planner_has_more_in_flight_than_allowed_and_what_cannot_wait_is_shed() -> None:
    state = ready_pool(count=2, max_in_flight=1)
    assert state.room() == 4
    # Of equals of one generation the newest goes first.
    decision = submit(state, 0, 1, 2, 3)
    assert sent(decision) == [(0, (3,)), (1, (2,))] and decision.shed == ()
    assert state.room() == 0
    assert submit(state, 4, 5) == Decision(shed=(0, 1))
    assert state.answered(1, 1, 1, 0.0)
    assert sent(state.decide(0.0)) == [(1, (5,))] and state.room() == 1


def test_with_no_planner_free_the_waiting_room_is_all_the_room_there_is() -> None:
    state = ready_pool(count=1, max_in_flight=1, max_batch=4, max_waiting=3)
    assert state.room() == 7
    submit(state, 0)
    assert state.room() == 3
    submit(state, 1, 2, 3)
    assert state.room() == 0
    assert submit(state, 4).shed == (1,)


def learned(state: PoolState, seconds: float, now: float = 0.0) -> None:
    """Planner 0 takes so long for a search, whatever its budget."""
    state.service._overhead = seconds
    state.service.answers = 1
    assert state.service.estimate(64, 64) == seconds


def test_who_cannot_be_back_before_it_expires_is_shed_oldest_first_and_who_is_only_late_is_sent() -> None:
    state = ready_pool(count=1, max_in_flight=1, max_batch=4)
    submit(state, 0)
    assert state.answered(0, 1, 0, 0.0)
    learned(state, 1.0)
    times = {1: (0.5, 0.9), 2: (0.5, 1.5), 3: (0.1, 0.2), 4: (2.0, 3.0)}
    state.arrived([Ask(ticket, deadline=deadline, expires=expires) for ticket, (deadline, expires) in times.items()])
    state._sent_at = 0.0
    decision = state.decide(0.0)
    assert decision.shed == (1, 3) and sent(decision) == [(0, (4, 2))]
    grants = {grant.ask.ticket: grant for grant in decision.send[0][1].grants}
    assert (grants[2].simulations, grants[2].deadline) == (16, 1.5) and grants[4].simulations == 64
    assert state.counts["shrunk"] == 1
    assert state.answered(0, 1, 1, 1.2)
    assert (state.counts["late"], state.counts["in_time"], state.counts["settled"]) == (1, 2, 5)


def test_a_request_that_expires_while_it_waits_is_shed_when_it_does() -> None:
    state = ready_pool(count=1, max_in_flight=1, max_batch=4)
    submit(state, 0)
    state.arrived([Ask(1, deadline=0.3, expires=0.4)])
    assert state.decide(0.0) == Decision() and state.wake_at() == 0.4
    assert state.decide(0.4) == Decision()
    assert state.decide(0.401).shed == (1,)


def test_once_in_a_while_a_request_is_tried_that_looks_too_late() -> None:
    state = ready_pool(count=1, max_in_flight=1, max_batch=4, probe_interval=0.5)
    submit(state, 0)
    assert state.answered(0, 1, 0, 0.0)
    learned(state, 10.0)
    state.arrived([Ask(1, deadline=0.5, expires=0.6), Ask(2, value=1.0, deadline=0.5, expires=0.6)])
    assert state.decide(0.4) == Decision(shed=(1, 2))
    state.arrived([Ask(3, deadline=0.9, expires=1.0), Ask(4, value=1.0, deadline=0.9, expires=1.0)])
    decision = state.decide(0.6)
    assert sent(decision) == [(0, (4,))] and decision.shed == (3,)
    assert (decision.send[0][1].grants[0].simulations, decision.send[0][1].grants[0].deadline) == (16, None)
    assert state.answered(0, 1, 1, 0.61) and state.counts["probes"] == 1
    assert state.service.mean(16, 16) < 10.0


# -------------------------------------------------------------------------------------------------- deaths and health


def test_the_first_answer_of_every_start_of_a_planner_is_no_measure_of_a_search() -> None:
    state = ready_pool(count=1, max_in_flight=1)
    submit(state, 0)
    assert state.answered(0, 1, numbers(state, 0)[0], 30.0)
    assert state.service.answers == 0 and state.soonest(30.0) == 0.0
    submit(state, 1, now=30.0)
    assert state.answered(0, 1, numbers(state, 0)[0], 30.5)
    assert state.service.answers == 1 and 0.4 < state.soonest(30.5) < 0.5
    state.failed(0, 1, Failure.ACTOR_DIED, 31.0)
    assert state.decide(40.0).start == (0,) and state.ready(0, 2, 41.0)
    submit(state, 2, now=41.0)
    assert state.answered(0, 2, numbers(state, 0)[0], 60.0)
    assert state.service.answers == 1 and state.soonest(60.0) < 0.5


def test_a_death_costs_what_was_in_flight_and_nothing_else() -> None:
    state = ready_pool(shed=False)
    submit(state, 0, 1, 2, 3)
    assert state.failed(0, 1, Failure.ACTOR_DIED, 1.0) == (0, 2)
    assert state.slots[0].phase is Phase.DOWN and tickets(state, 1) == [1, 3]
    assert submit(state, 4) == Decision()  # waits for the planner that is left
    assert state.answered(1, 1, 1, 0.0)
    assert sent(state.decide(0.0)) == [(1, (4,))]


def test_an_error_of_one_deliberation_costs_its_batch_only() -> None:
    state = ready_pool(count=1, shed=False)
    submit(state, 0, 1)
    assert state.failed(0, 1, Failure.PLANNER_ERROR, 1.0, 0) == (0,)
    assert state.failed(0, 1, Failure.RESULT_LOST, 1.0, 0) == ()
    assert state.slots[0].phase is Phase.READY and tickets(state, 0) == [1]


def test_news_of_a_replaced_planner_changes_nothing() -> None:
    state = ready_pool(count=1, shed=False)
    submit(state, 0, 1)
    assert state.failed(0, 1, Failure.UNREACHABLE, 0.0, 0) == (0, 1)
    assert state.answered(0, 1, 1, 0.0) is None
    assert state.failed(0, 1, Failure.ACTOR_DIED, 0.0) == ()
    assert state.decide(10.0).start == (0,)
    assert not state.ready(0, 1, 10.0)
    assert state.failed(0, 1, Failure.ACTOR_DIED, 10.0, 1) == ()
    assert state.ready(0, 2, 10.0) and state.slots[0].restarts == 1


def test_pauses_double_until_an_answer_comes_and_have_a_bound() -> None:
    policy = RestartPolicy(first_delay=1.0, max_delay=5.0)
    assert [policy.delay(n) for n in (1, 2, 3, 4, 10_000)] == [1, 2, 4, 5, 5]
    state = PoolState(1, 2, restart=policy)
    now = 0.0
    for incarnation, delay in enumerate((1.0, 2.0, 4.0, 5.0), start=1):
        assert state.decide(now).start == (0,)
        state.failed(0, incarnation, Failure.ACTOR_DIED, now)
        assert state.wake_at() == now + delay
        assert state.decide(now + delay - 0.01).start == ()
        now += delay
    assert state.decide(now).start == (0,)
    assert state.ready(0, 5, now)
    submit(state, 0, now=now)
    assert state.answered(0, 5, 0, now)
    state.failed(0, 5, Failure.ACTOR_DIED, now)
    state.decide(now)
    assert state.wake_at() == now + 1.0


def test_a_planner_is_retired_after_its_last_restart() -> None:
    state = ready_pool(count=1, restart=RestartPolicy(max_restarts=1))
    state.failed(0, 1, Failure.ACTOR_DIED, 0.0)
    assert state.decide(1.0).start == (0,)
    state.failed(0, 2, Failure.ACTOR_DIED, 1.0)
    assert state.slots[0].phase is Phase.RETIRED
    assert submit(state, 0) == Decision(stranded=(0,)) and state.wake_at() is None


def until(state: PoolState, now: float, end: float) -> list[tuple[float, Decision]]:
    """Asks for decisions as a dispatcher does to whom nothing is said; those that are not empty, with their times."""
    made = []
    while now <= end:
        decision = state.decide(now)
        if decision != Decision():
            made.append((now, decision))
        wake_at = state.wake_at()
        now = end + 1 if wake_at is None else max(wake_at, now + 1e-3)
    return made


def test_a_frozen_planner_gets_nothing_more_and_is_replaced_and_started_again() -> None:
    state = ready_pool(count=1, max_in_flight=2, restart=RestartPolicy(first_delay=0.5))
    submit(state, 0)
    made = until(state, 0.0, 7.0)
    assert made == [(1.0, Decision(ask=(0,))), (6.0, Decision(stop=(0,), lost=(0,))), (6.5, Decision(start=(0,)))]
    assert state.counts["stalled"] == state.counts["replaced"] == 1
    assert state.slots[0].incarnation == 2 and state.slots[0].restarts == 1


def test_a_stalled_planner_costs_only_what_it_has_and_its_answer_brings_it_back() -> None:
    state = ready_pool(count=2, max_in_flight=2, max_waiting=1)
    submit(state, 0)
    until(state, 0.0, 1.5)
    state.heard(0, 1, 1.5)
    state.heard(1, 1, 1.5)
    assert state.slots[0].stalled and not state.slots[1].stalled
    assert sent(submit(state, 1, 2, now=1.5)) == [(1, (2,)), (1, (1,))] and state.room() == 1
    assert submit(state, 3, now=1.5) == Decision() and state.room() == 0
    assert state.answered(0, 1, 0, 1.6)
    assert sent(state.decide(1.6)) == [(0, (3,))]


def test_a_search_that_does_not_end_is_cancelled_and_its_answer_saves_the_planner() -> None:
    state = ready_pool(count=1, max_in_flight=1)
    submit(state, 0)
    now = 0.0
    cancelled = []
    while now < 24.0:
        decision = state.decide(now)
        if decision.ask:
            state.heard(0, 1, now)
        cancelled += [now] * len(decision.cancel)
        assert not decision.stop
        now += 0.25
    assert cancelled == [20.0]
    assert state.answered(0, 1, 0, 24.0)
    assert sent(submit(state, 1, now=24.0)) == [(0, (1,))]
    while now < 60.0 and not (decision := state.decide(now)).stop:
        if decision.ask:
            state.heard(0, 1, now)
        now += 0.25
    # Cancelled after 20 s, and 5 s were not enough.
    assert now == 49.0 and decision.lost == (1,)


def test_when_all_planners_are_silent_a_quarter_is_replaced_at_a_time() -> None:
    state = ready_pool(count=8, max_in_flight=1)
    made = until(state, 0.0, 17.0)
    stopped = [(now, decision.stop) for now, decision in made if decision.stop]
    assert [(round(now), len(planners)) for now, planners in stopped] == [(6, 2), (11, 2), (16, 2)]


def test_a_large_pool_asks_its_planners_in_turns_and_leaves_none_out() -> None:
    state = ready_pool(count=40)
    asked: list[int] = []
    now = 0.0
    while now < 3.0:
        decision = state.decide(now)
        assert len(decision.ask) <= 8
        for planner in decision.ask:
            state.heard(planner, 1, now)
        asked += decision.ask
        now += 0.05
    assert set(asked) == set(range(40))


def test_a_pool_that_was_held_up_itself_replaces_nobody_for_it() -> None:
    state = ready_pool(count=2)
    assert state.decide(1.0).ask == (0, 1)
    assert state.decide(500.0) == Decision()  # the answers may be lying there unread
    made = until(state, 500.0, 505.0)
    # From now on silence counts: asked at 1.0, held up for 498 s of the time since.
    assert [(now, decision.stop) for now, decision in made if decision.stop] == [(504.0, (0,))]


# -------------------------------------------------------------------------------------------------- scaling


def test_planners_are_added_when_deadlines_are_missed_and_removed_when_there_is_little_to_do() -> None:
    policy = ScalingPolicy(1, 3, period=1.0, cool_down=2.0, min_settled=5)
    state = ready_pool(count=1, max_in_flight=1, scaling=policy)
    now, ticket, number = 0.0, 0, 0
    while state.count(Phase.STARTING) == 0:
        now += 0.1
        state.arrived([Ask(ticket, deadline=now, expires=now + 9.0)])
        for planner, batch in state.decide(now).send:
            state.answered(planner, 1, batch.number, now + 0.09)
            number += 1
        ticket += 1
        assert now < 10
    assert len(state.slots) == 2 and state.counts["scaled_up"] == 1
    assert state.ready(1, 1, now)
    stopped: list[int] = []
    for _ in range(200):
        now += 0.1
        decision = state.decide(now)
        stopped += decision.stop
        for planner in decision.ask:
            state.heard(planner, 1, now)
    assert stopped == [1] and state.slots[1].phase is Phase.PARKED and state.counts["scaled_down"] == 1
    assert state.count(Phase.READY) == 1


@pytest.mark.parametrize("policy", [None, ScalingPolicy(1, 2)])
def test_a_pool_that_is_resized_has_so_many_planners_whatever_the_load(policy: ScalingPolicy | None) -> None:
    state = ready_pool(count=2, max_in_flight=1, scaling=policy)
    state.fleet.resize(4, 1.0)
    assert state.decide(1.0).start == (2, 3)
    assert all(state.ready(planner, 1, 1.5) for planner in (2, 3))
    state.fleet.resize(1, 2.0)
    assert state.decide(2.0).stop == (3, 2, 1) and state.count(Phase.READY) == 1
    state.fleet.resize(0, 3.0)
    assert state.decide(3.0).stop == (0,) and state.room() == 0
    state.fleet.resize(1, 4.0)
    assert len(state.decide(4.0).start) == 1


def test_a_planner_that_is_too_many_while_it_starts_leaves_when_it_is_ready() -> None:
    state = ready_pool(count=1, max_in_flight=1)
    state.fleet.resize(2, 1.0)
    assert state.decide(1.0).start == (1,)
    state.fleet.resize(1, 1.1)
    submit(state, 0)  # keeps the first one busy
    state.decide(1.1)
    assert state.ready(1, 1, 1.2)
    stopped: tuple[int, ...] = ()
    for tick in range(40):
        stopped += state.decide(1.2 + tick / 10).stop
    assert len(stopped) == 1 or state.slots[0].phase is Phase.LEAVING


def test_a_planner_that_is_no_longer_needed_finishes_what_it_has_and_may_come_back() -> None:
    state = ready_pool(count=2, max_in_flight=1, scaling=ScalingPolicy(1, 2))
    submit(state, 0, 1)
    state.fleet._remove()
    assert state.slots[1].phase is Phase.LEAVING and state.decide(0.0) == Decision()
    assert sent(submit(state, 2)) == []
    assert state.answered(1, 1, numbers(state, 1)[0], 0.1)
    assert state.decide(0.1).stop == (1,)
    assert not state.heard(1, 1, 0.2) and state.failed(1, 1, Failure.ACTOR_DIED, 0.2) == ()
    state.fleet._add(0.3)
    state.fleet._look_at(0.3)
    assert state.decide(0.3).start == (1,) and state.slots[1].restarts == 0
    assert state.ready(1, 2, 0.4) and sent(state.decide(0.4)) == [(1, (2,))]


def test_one_that_dies_while_it_leaves_is_not_started_again() -> None:
    state = ready_pool(count=2, max_in_flight=1, scaling=ScalingPolicy(1, 2))
    submit(state, 0, 1)
    state.fleet._remove()
    assert len(state.failed(1, 1, Failure.ACTOR_DIED, 0.0)) == 1
    assert state.slots[1].phase is Phase.PARKED
    assert not [decision for _, decision in until(state, 0.0, 3.0) if 1 in (*decision.start, *decision.stop)]


# -------------------------------------------------------------------------------------------------- whatever happens

EVENTS = ["new", "answer", "fail", "die", "ready", "wait", "hear"]
SECONDS = st.none() | st.floats(0, 3)
NEWS = st.tuples(st.sampled_from(EVENTS), st.integers(0, 9), st.floats(0, 1), SECONDS, SECONDS)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans(), st.lists(NEWS))
def test_every_request_is_in_one_place_whatever_happens(
    count: int, cap: int, max_batch: int, shed: bool, scale: bool, events: list[Any]
) -> None:
    policy = ScalingPolicy(count, count + 2, period=0.5, cool_down=1.0, min_settled=2) if scale else None
    state = PoolState(
        count, cap, max_batch=max_batch, shed=shed, scaling=policy, probe_interval=0.3, health=HealthPolicy(0.2, 0.6, 2)
    )
    now, arrived = 0.0, 0
    out: list[int] = []
    alive: set[int] = set()
    for kind, number, value, deadline, expires in events:
        now += 0.05
        planner = number % max(len(state.slots), 1)
        slot = state.slots[planner] if state.slots else None
        if kind == "new":
            times = [None if after is None else now + after for after in (deadline, expires)]
            state.arrived([Ask(arrived + i, f"g{number % 3}", value, 64, 1, *times) for i in range(number % 3 + 1)])
            arrived += number % 3 + 1
        elif slot is None:
            continue
        elif kind == "ready":
            state.ready(planner, slot.incarnation, now)
        elif kind == "hear":
            state.heard(planner, slot.incarnation, now)
        elif kind == "die":
            alive -= {planner} if slot.phase in (Phase.STARTING, Phase.READY, Phase.LEAVING) else set()
            out += state.failed(planner, slot.incarnation, Failure.ACTOR_DIED, now)
        elif kind in ("answer", "fail") and slot.in_flight:
            batch = slot.in_flight[number % len(slot.in_flight)]
            if kind == "answer":
                assert state.answered(planner, slot.incarnation, batch.number, now) is batch
                out += batch.tickets
            else:
                out += state.failed(planner, slot.incarnation, Failure.PLANNER_ERROR, now, batch.number)
        elif kind == "wait":
            now += 3 * value
        room = state.room()
        waiting = len(state.waiting)
        decision = state.decide(now)
        out += (*decision.shed, *decision.stranded, *decision.lost)
        # Actors are started and stopped in pairs, so that none is left over.
        assert alive.issuperset(decision.stop)
        alive -= set(decision.stop)
        assert alive.isdisjoint(decision.start)
        alive |= set(decision.start)
        assert alive == {
            i for i, each in enumerate(state.slots) if each.phase in (Phase.STARTING, Phase.READY, Phase.LEAVING)
        }
        in_flight = [ticket for i in range(len(state.slots)) for ticket in tickets(state, i)]
        assert sorted([*out, *in_flight, *state.waiting]) == list(range(arrived))
        assert all(len(each.in_flight) <= cap for each in state.slots)
        assert not any(each.in_flight for each in state.slots if each.phase not in (Phase.READY, Phase.LEAVING))
        assert all(len(batch.tickets) <= (max_batch if shed else 3) for _, batch in decision.send)
        assert not any(state.slots[target].stalled for target, _ in decision.send)
        if shed:
            sound = sum(each.is_sound for each in state.slots)
            assert len(state.waiting) <= max_batch * max(1, sound)
            assert room is not None and room >= 0 and waiting >= 0
        else:
            assert not decision.shed
        settled = state.counts["settled"]
        assert state.counts["in_time"] + state.counts["late"] <= settled <= len(out)
        assert count <= sum(each.phase is not Phase.PARKED for each in state.slots) or policy is None or count == 0


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 30))
def test_as_many_as_there_is_room_for_are_taken_without_shedding_any(
    count: int, cap: int, max_batch: int, before: int
) -> None:
    state = ready_pool(count=count, max_in_flight=cap, max_batch=max_batch)
    submit(state, *range(before))
    room = state.room()
    assert room is not None
    assert submit(state, *range(100, 100 + room)).shed == ()
    assert state.room() == 0
    assert len(submit(state, 999).shed) == 1
