"""Requests and plans as bytes: what goes in comes out, and bytes that are something else are named so."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from actors.records import (
    MAX_ENTRIES,
    DoesNotFit,
    Kind,
    Malformed,
    Outcome,
    read_message,
    read_plans,
    read_request,
    write_message,
    write_plans,
    write_request,
)
from crsm.types import Plan, PlanRequest

INTEGERS = st.integers(-(2**63), 2**63 - 1)
NUMBERS = st.floats(allow_nan=False)
TIMES = st.none() | NUMBERS
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TOKENS = st.lists(INTEGERS, max_size=9).map(tuple)


def some_array(*dtypes: str) -> st.SearchStrategy[np.ndarray]:
    shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    return st.sampled_from(dtypes).flatmap(lambda dtype: arrays(np.dtype(dtype), shapes))


SNAPSHOTS = some_array("float32", "uint16")
REQUESTS = st.builds(
    PlanRequest,
    *(INTEGERS, TEXT, INTEGERS, INTEGERS, INTEGERS, SNAPSHOTS, SNAPSHOTS, st.none() | SNAPSHOTS, INTEGERS, INTEGERS),
    *(TIMES, TIMES, NUMBERS, INTEGERS, INTEGERS, st.booleans()),
)
ANY_ARRAY = some_array("float32", "uint16", "int64", "float64")
PLANS = st.builds(
    Plan,
    *(INTEGERS, TEXT, INTEGERS, INTEGERS, TOKENS, TOKENS, ANY_ARRAY, ANY_ARRAY, NUMBERS),
    *(ANY_ARRAY, ANY_ARRAY, ANY_ARRAY, ANY_ARRAY, ANY_ARRAY, INTEGERS, NUMBERS, TEXT, INTEGERS),
    sketch_S6=st.none() | some_array("float32"),
)


def a_slot(size: int = 60_000) -> memoryview:
    return memoryview(bytearray(size))


def assert_same(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
        else:
            assert mine == theirs and type(mine) is type(theirs), field.name


@given(REQUESTS)
def test_a_request_comes_out_as_it_went_in(request: PlanRequest) -> None:
    slot = a_slot()
    found = read_request(slot.toreadonly(), write_request(slot, request))
    assert_same(request, found)
    assert not found.hidden_LD.flags.writeable


@given(st.lists(PLANS, min_size=1, max_size=4))
def test_plans_come_out_as_they_went_in_and_keep_their_arrays_when_the_slot_is_used_again(plans: list[Plan]) -> None:
    slot = a_slot()
    found = read_plans(slot, write_plans(slot, plans))
    slot[:] = bytes(len(slot))
    for plan, mine in zip(plans, found, strict=True):
        assert_same(plan, mine)


def test_a_search_tree_stays_behind_and_rows_of_a_batch_are_sent_whole() -> None:
    across = np.arange(12, dtype=np.float32).reshape(3, 4).T
    plan = Plan(1, "g", 2, 3, (), (), across, across[0], 0.0, *(across,) * 5, tree={"nodes": 3})
    slot = a_slot()
    (found,) = read_plans(slot, write_plans(slot, [plan]))
    assert found.tree is None
    np.testing.assert_array_equal(found.value_root_L, across)
    np.testing.assert_array_equal(found.value_plan_L, across[0])


@given(REQUESTS, st.integers(0, 300))
def test_what_does_not_fit_is_never_cut_off(request: PlanRequest, size: int) -> None:
    whole = write_request(a_slot(), request)
    if size >= whole:
        assert write_request(a_slot(size), request) == whole
    else:
        with pytest.raises(DoesNotFit):
            write_request(a_slot(size), request)


@given(st.lists(PLANS, min_size=2, max_size=3))
def test_plans_that_do_not_fit_together_are_not_written_in_part(plans: list[Plan]) -> None:
    size = write_plans(a_slot(), plans)
    with pytest.raises(DoesNotFit):
        write_plans(a_slot(size - 1), plans)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**63},
        {"hidden_LD": np.zeros(2, np.complex64)},
        {"ssm_LHPN": np.zeros((1,) * 9, np.float32)},
        {"hidden_LD": np.array(["a"], object)},
    ],
)
def test_what_cannot_be_written_down_is_refused(changes: dict[str, Any]) -> None:
    nothing = np.zeros(0, np.float32)
    request = dataclasses.replace(PlanRequest(1, "g", 2, 3, 4, nothing, nothing), **changes)
    with pytest.raises(DoesNotFit):
        write_request(a_slot(), request)


@pytest.mark.parametrize("changes", [{"confidence_L": None}, {"line": (2**70,)}, {"assumed": ("a",)}])
def test_a_planner_that_answers_with_something_else_is_refused(changes: dict[str, Any]) -> None:
    nothing = np.zeros(0, np.float32)
    plan = dataclasses.replace(Plan(1, "g", 2, 3, (), (), nothing, nothing, 0.0, *(nothing,) * 5), **changes)
    with pytest.raises(DoesNotFit):
        write_plans(a_slot(), [plan])


@given(REQUESTS | PLANS, st.data())
def test_damaged_bytes_are_read_as_a_record_or_named_malformed(record: PlanRequest | Plan, data: st.DataObject) -> None:
    slot = a_slot(16_000)
    is_request = isinstance(record, PlanRequest)
    size = write_request(slot, record) if isinstance(record, PlanRequest) else write_plans(slot, [record])
    for _ in range(data.draw(st.integers(1, 4))):
        # The front holds everything that says where something lies.
        place = data.draw(st.integers(0, min(size - 1, 200)))
        slot[place] = data.draw(st.integers(0, 255))
    claimed = data.draw(st.sampled_from([size, size - 1, size + 16, 0, 1, 16_000, 2**40]))
    try:
        found = [read_request(slot, claimed)] if is_request else read_plans(slot, claimed)
    except Malformed:
        return
    assert claimed <= size and all(isinstance(one, PlanRequest if is_request else Plan) for one in found)


@given(st.binary(max_size=400))
def test_any_bytes_at_all_are_no_reason_to_fail(noise: bytes) -> None:
    slot = memoryview(bytearray(noise))
    for read in (lambda: read_request(slot, len(noise)), lambda: read_message(slot, Kind.NEWS)):
        with pytest.raises(Malformed):
            read()
    if noise:
        with pytest.raises(Malformed):
            read_plans(slot, len(noise))


ENTRIES = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from(Outcome), INTEGERS, st.integers(0, 2**64 - 1))


@given(st.sampled_from(Kind), st.lists(ENTRIES, max_size=20), INTEGERS, st.integers(0, 2**64 - 1))
def test_a_message_comes_out_as_it_went_in(kind: Kind, entries: list[Any], room: int, seen: int) -> None:
    message = memoryview(write_message(kind, entries, room, seen))
    found_room, found_seen, found = read_message(message, kind)
    assert (found_room, found_seen, list(found)) == (room, seen, entries)
    with pytest.raises(Malformed):
        read_message(message, Kind(3 - kind))
    with pytest.raises(Malformed):
        read_message(message[:-1], kind)


def test_a_message_is_bounded() -> None:
    assert write_message(Kind.NEWS, [(0, 0, 0, 0)] * MAX_ENTRIES)
    with pytest.raises(ValueError, match="allowed: at most 1024"):
        write_message(Kind.NEWS, [(0, 0, 0, 0)] * (MAX_ENTRIES + 1))
    assert struct.calcsize("<4IqQ") == len(write_message(Kind.NEWS, []))
