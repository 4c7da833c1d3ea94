"""Saved states by handle: for their time, within the bytes there are, and none that is not there."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.state_store import StateStore
from crsm.config import SamplingConfig
from crsm.engine import Engine
from crsm.generation import GenerationRequest
from crsm.saved_generation import SavedGeneration
from tests.fixtures import PROMPT, FakeClock, tiny_checkpoint


def a_saved_one() -> SavedGeneration:
    engine = Engine(tiny_checkpoint())
    engine.submit(GenerationRequest(PROMPT, SamplingConfig(max_tokens=5), generation_id="g"))
    engine.step()
    return engine.snapshot("g")


SAVED = a_saved_one()


def test_a_state_is_there_for_its_time_any_number_of_times() -> None:
    clock = FakeClock()
    store = StateStore(10**6, clock)
    handle = store.put(SAVED, 5.0)
    assert (handle.generation_id, handle.position, handle.num_bytes) == ("g", SAVED.position, SAVED.num_bytes)
    for _ in range(3):
        clock.now += 1.6
        assert store.get(handle.handle) is SAVED
    clock.now += 0.3
    with pytest.raises(ValueError, match="is not known, or its time is over"):
        store.get(handle.handle)
    assert len(store) == 0 == store.num_bytes


def test_a_dropped_state_is_gone() -> None:
    store = StateStore(10**6)
    handle = store.put(SAVED, 60.0).handle
    assert store.drop(handle) and not store.drop(handle)
    with pytest.raises(ValueError, match="not known"):
        store.get(handle)


def test_what_cannot_be_kept_is_refused_in_words() -> None:
    store = StateStore(SAVED.num_bytes - 1)
    with pytest.raises(ValueError, match=f"the state has {SAVED.num_bytes} bytes; allowed: at most"):
        store.put(SAVED, 1.0)
    with pytest.raises(ValueError, match="seconds = 0"):
        store.put(SAVED, 0.0)


@given(times=st.lists(st.floats(1, 100), min_size=1, max_size=20), room=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_the_store_never_holds_more_than_it_may_and_drops_what_ends_first(times: list[float], room: int) -> None:
    clock = FakeClock()
    store = StateStore(room * SAVED.num_bytes, clock)
    alive: dict[str, float] = {}
    for seconds in times:
        handle = store.put(dataclasses.replace(SAVED), seconds)
        while len(alive) >= room:
            del alive[min(alive, key=lambda name: alive[name])]
        alive[handle.handle] = clock() + seconds  # as rounded: of equal ends the older one goes
        assert store.num_bytes <= room * SAVED.num_bytes
    assert len(store) == len(alive)
    for name in alive:
        store.get(name)


def test_only_its_owner_finds_a_state() -> None:
    store = StateStore(10**6)
    handle = store.put(SAVED, 60.0, "mine").handle
    for stranger in ("", "yours"):
        with pytest.raises(ValueError, match="is not known, or its time is over"):
            store.get(handle, stranger)
        assert not store.drop(handle, stranger)
    assert store.get(handle, "mine") is SAVED
    assert store.drop(handle, "mine")


def test_what_is_left_of_the_time_is_told() -> None:
    clock = FakeClock()
    store = StateStore(10**6, clock)
    handle = store.put(SAVED, 5.0, "mine")
    clock.now += 2.0
    assert store.describe(handle.handle, "mine") == dataclasses.replace(handle, seconds=3.0)


def test_who_keeps_much_pushes_out_his_own_states_first() -> None:
    store = StateStore(3 * SAVED.num_bytes)
    yours = store.put(SAVED, 1.0, "yours").handle
    mine = [store.put(SAVED, seconds, "mine").handle for seconds in (9.0, 8.0)]
    store.put(SAVED, 5.0, "mine")
    assert store.get(yours, "yours") is SAVED and store.get(mine[0], "mine") is SAVED
    with pytest.raises(ValueError, match="not known"):
        store.get(mine[1], "mine")  # of mine, the one that would have ended first
    newcomer = store.put(SAVED, 5.0, "new").handle
    assert store.get(newcomer, "new") is SAVED
    with pytest.raises(ValueError, match="not known"):
        store.get(yours, "yours")  # who has nothing to lose pushes out what ends first
