"""Decisions of the pool: every rule at once small enough to be worked out by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.scheduling import Decision, Failure, Phase, PoolState, RestartPolicy


def ready_pool(count: int = 2, max_in_flight: int = 2, **settings: object) -> PoolState:
    state = PoolState(count, max_in_flight, **settings)  # type: ignore[arg-type]
    assert state.decide(0.0).start == tuple(range(count))
    for planner in range(count):
        assert state.ready(planner, 1)
    return state


def submit(state: PoolState, *batches: int) -> Decision:
    for batch in batches:
        state.arrived(batch)
    return state.decide(0.0)


def test_the_least_loaded_planner_gets_the_oldest_batch() -> None:
    state = ready_pool()
    assert submit(state, 0, 1, 2).send == ((0, 0), (1, 1), (0, 2))
    assert state.answered(0, 1, 0) and state.answered(0, 1, 2)
    assert submit(state, 3, 4).send == ((0, 3), (0, 4))


def test_no_planner_has_more_in_flight_than_allowed_and_the_oldest_waiting_batch_is_shed() -> None:
    state = ready_pool(count=2, max_in_flight=1)
    assert submit(state, 0, 1, 2, 3) == Decision(send=((0, 0), (1, 1)))
    assert submit(state, 4, 5) == Decision(shed=(2, 3))
    assert state.answered(1, 1, 1)
    assert state.decide(0.0) == Decision(send=((1, 4),))


def test_without_shedding_batches_wait_for_their_turn() -> None:
    state = ready_pool(count=1, max_in_flight=1, shed=False)
    assert submit(state, *range(50)) == Decision(send=((0, 0),))
    for batch in range(49):
        assert state.answered(0, 1, batch)
        assert state.decide(0.0) == Decision(send=((0, batch + 1),))


def test_batches_wait_for_the_first_start_of_a_planner_and_for_no_restart() -> None:
    state = PoolState(1, 2)
    state.arrived(0)
    assert state.decide(0.0) == Decision(start=(0,))
    assert state.ready(0, 1)
    assert state.decide(0.0) == Decision(send=((0, 0),))
    assert state.failed(0, 1, Failure.ACTOR_DIED, 5.0) == (0,)
    assert submit(state, 1) == Decision(stranded=(1,))
    assert state.decide(6.0) == Decision(start=(0,))
    assert submit(state, 2) == Decision(stranded=(2,))


def test_without_planners_everything_is_stranded() -> None:
    assert submit(PoolState(0, 2), 0, 1) == Decision(stranded=(0, 1))


def test_a_death_costs_what_was_in_flight_and_nothing_else() -> None:
    state = ready_pool()
    submit(state, 0, 1, 2, 3)
    assert state.failed(0, 1, Failure.ACTOR_DIED, 1.0) == (0, 2)
    assert state.slots[0].phase is Phase.DOWN and state.slots[1].in_flight == [1, 3]
    assert submit(state, 4) == Decision()  # waits for the planner that is left
    assert state.answered(1, 1, 1)
    assert state.decide(1.0).send == ((1, 4),)


def test_an_error_of_one_deliberation_costs_its_batch_only() -> None:
    state = ready_pool(count=1)
    submit(state, 0, 1)
    assert state.failed(0, 1, Failure.PLANNER_ERROR, 1.0, batch=0) == (0,)
    assert state.failed(0, 1, Failure.RESULT_LOST, 1.0, batch=0) == ()
    assert state.slots[0].phase is Phase.READY and state.slots[0].in_flight == [1]
    assert state.wake_at() is None


def test_news_of_a_replaced_planner_changes_nothing() -> None:
    state = ready_pool(count=1)
    submit(state, 0, 1)
    assert state.failed(0, 1, Failure.UNREACHABLE, 0.0, batch=0) == (0, 1)
    assert not state.answered(0, 1, 1)
    assert state.failed(0, 1, Failure.ACTOR_DIED, 0.0) == ()
    assert state.decide(10.0).start == (0,)
    assert not state.ready(0, 1)
    assert state.failed(0, 1, Failure.ACTOR_DIED, 10.0, batch=1) == ()
    assert state.ready(0, 2) and state.slots[0].restarts == 1


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
    assert state.ready(0, 5)
    submit(state, 0)
    assert state.answered(0, 5, 0)
    state.failed(0, 5, Failure.ACTOR_DIED, now)
    assert state.wake_at() == now + 1.0


def test_a_planner_is_retired_after_its_last_restart() -> None:
    state = ready_pool(count=1, restart=RestartPolicy(max_restarts=1))
    state.failed(0, 1, Failure.ACTOR_DIED, 0.0)
    assert state.decide(1.0).start == (0,)
    state.failed(0, 2, Failure.ACTOR_DIED, 1.0)
    assert state.slots[0].phase is Phase.RETIRED and state.wake_at() is None
    assert submit(state, 0) == Decision(stranded=(0,))


@given(
    st.integers(0, 3),
    st.integers(1, 3),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["new", "answer", "fail", "die", "ready", "wait"]), st.integers(0, 9))),
)
def test_every_batch_is_in_one_place_whatever_happens(
    count: int, cap: int, shed: bool, events: list[tuple[str, int]]
) -> None:
    state = PoolState(count, cap, shed=shed)
    now, batches = 0.0, 0
    out: list[int] = []
    for kind, number in events:
        now += 0.05
        planner = number % max(count, 1)
        slot = state.slots[planner] if count else None
        if kind == "new":
            state.arrived(batches)
            batches += 1
        elif slot is None:
            continue
        elif kind == "ready":
            state.ready(planner, slot.incarnation)
        elif kind == "die":
            out += state.failed(planner, slot.incarnation, Failure.ACTOR_DIED, now)
        elif kind in ("answer", "fail") and slot.in_flight:
            batch = slot.in_flight[number % len(slot.in_flight)]
            if kind == "answer":
                assert state.answered(planner, slot.incarnation, batch)
                out.append(batch)
            else:
                out += state.failed(planner, slot.incarnation, Failure.PLANNER_ERROR, now, batch)
        elif kind == "wait":
            now += 1.0
        decision = state.decide(now)
        out += (*decision.shed, *decision.stranded)
        in_flight = [batch for each in state.slots for batch in each.in_flight]
        assert sorted([*out, *in_flight, *state.waiting]) == list(range(batches))
        assert all(len(each.in_flight) <= cap for each in state.slots)
        assert not shed or len(state.waiting) <= max(count, 1)
        assert not any(each.in_flight for each in state.slots if each.phase is not Phase.READY)
