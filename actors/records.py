"""Requests and plans as bytes in a slot of shared memory, and the small messages that say which slots to look at.

Invariants:

* nothing is executed when bytes are read: fixed-width numbers, UTF-8, and arrays of the dtypes listed here;
* a record is written whole or not at all (:class:`DoesNotFit`), and what is read from one lies inside of it;
* bytes that are no record raise :class:`Malformed`, whatever they are;
* arrays come back with the shape, dtype and bits that they had; a plan's search tree stays behind.

A record is a header, its texts and tokens, the *layout* of its arrays (dtype and shape of each), and the arrays.
Messages of one model have few layouts, so that both sides look them up instead of working them out.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from crsm.types import Plan, PlanRequest

_ALIGN = 16
_DTYPES = tuple(map(np.dtype, ("float32", "uint16", "int64", "float64", "int32", "float16")))
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_ABSENT = 0xFF
_MAX_DIMENSIONS = 8

_REQUEST = struct.Struct("<6q3d2q4I")
"""request_id, position, target, token, simulations, hypotheses, deadline, expires, value, seed, model_version; whether
a sketch is wanted; bytes of generation_id and of the layout; bytes of the record."""
_PLAN = struct.Struct("<5q2d6I")
"""request_id, position, target, simulations, model_version, uncertainty, seconds; number of assumed tokens and of those
of the line; bytes of generation_id, planner_id and of the layout; bytes of the record."""


_PLAN_ARRAYS = 8
"""The last one, the sketch, may be absent."""


class DoesNotFit(ValueError):
    """The slot is too small, or the record holds something that cannot be written down."""


class Malformed(ValueError):
    """These bytes are no record, or no message."""


# ------------------------------------------------------------------------------------------------------------ layouts


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the arrays of a record lie, counted from the first one's place."""

    code: bytes
    fields: tuple[tuple[np.dtype, tuple[int, ...], int, int] | None, ...]
    """dtype, shape, offset, end; None: there is no such array."""
    size: int


@lru_cache(maxsize=256)
def _layout_for(*kinds: tuple[np.dtype, tuple[int, ...]] | None) -> _Layout:
    """The layout of arrays of these dtypes and shapes."""
    code = bytearray()
    for kind in kinds:
        if kind is None:
            code.append(_ABSENT)
            continue
        dtype, shape = kind
        if dtype not in _CODES or len(shape) > _MAX_DIMENSIONS or max(shape, default=0) >= 2**32:
            raise DoesNotFit(f"an array of {dtype}{list(shape)}; allowed: {', '.join(map(str, _DTYPES))}")
        code += struct.pack(f"<2B{len(shape)}I", _CODES[dtype], len(shape), *shape)
    return _layout_from(bytes(code), len(kinds))


@lru_cache(maxsize=256)
def _layout_from(code: bytes, count: int) -> _Layout:
    """The layout that a record names, of this many arrays."""
    fields: list[tuple[np.dtype, tuple[int, ...], int, int] | None] = []
    place = end = 0
    try:
        for _ in range(count):
            if code[place] == _ABSENT:
                fields.append(None)
                place += 1
                continue
            dtype, dimensions = _DTYPES[code[place]], code[place + 1]
            if dimensions > _MAX_DIMENSIONS:
                raise Malformed(f"an array of {dimensions} dimensions; allowed: at most {_MAX_DIMENSIONS}")
            shape = struct.unpack_from(f"<{dimensions}I", code, place + 2)
            place += 2 + 4 * dimensions
            offset = _aligned(end)
            end = offset + dtype.itemsize * math.prod(shape)
            fields.append((dtype, shape, offset, end))
    except (IndexError, struct.error) as error:
        raise Malformed(f"no layout of {count} arrays: {error}") from error
    if place != len(code):
        raise Malformed(f"{len(code) - place} bytes behind a layout of {count} arrays")
    return _Layout(code, tuple(fields), end)


def _aligned(place: int) -> int:
    return -(-place // _ALIGN) * _ALIGN


def _put(buffer: memoryview, start: int, layout: _Layout, arrays: Iterable[np.ndarray | None]) -> None:
    for array, field in zip(arrays, layout.fields, strict=True):
        if field is None or field[3] == field[2]:
            continue
        assert array is not None
        flat = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        buffer[start + field[2] : start + field[3]] = flat.data.cast("B")


# ----------------------------------------------------------------------------------------------------------- requests


def write_request(buffer: memoryview, request: PlanRequest) -> int:
    """Writes a request into a slot; returns its bytes.

    Raises:
        DoesNotFit: it is larger than the slot, or cannot be written down.
    """
    hidden, ssm, conv = request.hidden_LD, request.ssm_LHPN, request.conv_LCK
    layout = _layout_for(
        (hidden.dtype, hidden.shape), (ssm.dtype, ssm.shape), None if conv is None else (conv.dtype, conv.shape)
    )
    name = request.generation_id.encode()
    texts = _REQUEST.size + len(name)
    start = _aligned(texts + len(layout.code))
    size = start + layout.size
    if size > len(buffer):
        raise DoesNotFit(f"a request of {size} bytes; allowed: {len(buffer)}")
    deadline, expires = request.deadline, request.expires
    try:
        _REQUEST.pack_into(
            buffer,
            0,
            request.request_id,
            request.position,
            request.target,
            request.token,
            request.simulations,
            request.hypotheses,
            math.nan if deadline is None else deadline,
            math.nan if expires is None else expires,
            request.value,
            request.seed,
            request.model_version,
            request.sketch,
            len(name),
            len(layout.code),
            size,
        )
    except struct.error as error:
        raise DoesNotFit(f"request {request.request_id}: {error}") from error
    buffer[_REQUEST.size : texts] = name
    buffer[texts : texts + len(layout.code)] = layout.code
    _put(buffer, start, layout, (hidden, ssm, conv))
    return size


def read_request(buffer: memoryview, size: int) -> PlanRequest:
    """The request in the first ``size`` bytes of a slot. Its arrays are views: they hold as long as the slot is left
    alone, and are read-only if the buffer is.

    Raises:
        Malformed: there is none.
    """
    try:
        (*numbers, deadline, expires, value, seed, version, sketch, n_name, n_code, whole) = _REQUEST.unpack_from(
            buffer
        )
        texts = _REQUEST.size + n_name
        start = _aligned(texts + n_code)
        layout = _layout_from(bytes(buffer[texts : texts + n_code]), 3)
        if whole != size or size > len(buffer) or start + layout.size != size:
            raise Malformed(f"a request of {whole} bytes in {size}")
        hidden, ssm, conv = (
            None if field is None else np.ndarray(field[1], field[0], buffer, start + field[2])
            for field in layout.fields
        )
        if hidden is None or ssm is None:
            raise Malformed("a request without its snapshot")
        request_id, position, target, token, simulations, hypotheses = numbers
        return PlanRequest(
            request_id,
            str(buffer[_REQUEST.size : texts], "utf-8"),
            position,
            target,
            token,
            hidden,
            ssm,
            conv,
            simulations,
            hypotheses,
            None if deadline != deadline else deadline,
            None if expires != expires else expires,
            value,
            seed,
            version,
            bool(sketch),
        )
    except Malformed:
        raise
    except (struct.error, ValueError, TypeError, OverflowError) as error:
        raise Malformed(f"no request: {error}") from error


# -------------------------------------------------------------------------------------------------------------- plans


def write_plans(buffer: memoryview, plans: Sequence[Plan]) -> int:
    """Writes the plans of one request into its slot, one behind the other; returns their bytes.

    Raises:
        DoesNotFit: they are larger than the slot, or cannot be written down.
    """
    place = 0
    for plan in plans:
        place = _write_plan(buffer, _aligned(place), plan)
    return place


def read_plans(buffer: memoryview, size: int) -> list[Plan]:
    """The plans in the first ``size`` bytes of a slot, with arrays of their own.

    Raises:
        Malformed: there is something else.
    """
    if size > len(buffer):
        raise Malformed(f"plans of {size} bytes in a slot of {len(buffer)}")
    # One copy of everything, which the arrays share: the slot is free from then on.
    copy = bytearray(buffer[:size])
    plans: list[Plan] = []
    place = 0
    try:
        while place < size:
            plan, place = _read_plan(copy, place)
            plans.append(plan)
            place = place if place == size else _aligned(place)
    except Malformed:
        raise
    except (struct.error, ValueError, TypeError, OverflowError) as error:
        raise Malformed(f"no plan: {error}") from error
    return plans


def _write_plan(buffer: memoryview, place: int, plan: Plan) -> int:
    arrays = (
        plan.value_root_L,
        plan.value_plan_L,
        plan.confidence_L,
        plan.write_u_LRE,
        plan.write_b_LRN,
        plan.policy_tokens_A,
        plan.policy_probs_A,
    )
    try:
        sketch = plan.sketch_S6
        kinds = [(array.dtype, array.shape) for array in arrays]
        layout = _layout_for(*kinds, None if sketch is None else (sketch.dtype, sketch.shape))
        name, planner = plan.generation_id.encode(), plan.planner_id.encode()
        tokens = struct.pack(f"<{len(plan.assumed) + len(plan.line)}q", *plan.assumed, *plan.line)
        texts = b"".join((tokens, name, planner, layout.code))
        start = _aligned(_PLAN.size + len(texts))
        size = start + layout.size
        if place + size > len(buffer):
            raise DoesNotFit(f"plans of {place + size} bytes or more; allowed: {len(buffer)}")
        _PLAN.pack_into(
            buffer,
            place,
            plan.request_id,
            plan.position,
            plan.target,
            plan.simulations,
            plan.model_version,
            plan.uncertainty,
            plan.seconds,
            len(plan.assumed),
            len(plan.line),
            len(name),
            len(planner),
            len(layout.code),
            size,
        )
    except (struct.error, AttributeError, TypeError) as error:
        raise DoesNotFit(f"plan of request {plan.request_id}: {error}") from error
    buffer[place + _PLAN.size : place + _PLAN.size + len(texts)] = texts
    _put(buffer, place + start, layout, (*arrays, sketch))
    return place + size


def _read_plan(copy: bytearray, place: int) -> tuple[Plan, int]:
    numbers = _PLAN.unpack_from(copy, place)
    request_id, position, target, simulations, version, uncertainty, seconds = numbers[:7]
    n_assumed, n_line, n_name, n_planner, n_code, size = numbers[7:]
    tokens = place + _PLAN.size
    name = tokens + 8 * (n_assumed + n_line)
    planner = name + n_name
    code = planner + n_planner
    start = place + _aligned(code + n_code - place)
    layout = _layout_from(bytes(copy[code : code + n_code]), _PLAN_ARRAYS)
    if start + layout.size != place + size or place + size > len(copy):
        raise Malformed(f"a plan of {size} bytes at {place} of {len(copy)}")
    said = struct.unpack_from(f"<{n_assumed + n_line}q", copy, tokens)
    fields = layout.fields
    if None in fields[:-1]:
        raise Malformed("a plan without one of its arrays")
    root, gain, confidence, u, b, actions, probs, *sketch = [
        np.ndarray(field[1], field[0], copy, start + field[2]) for field in fields if field is not None
    ]
    return (
        Plan(
            request_id,
            copy[name:planner].decode(),
            position,
            target,
            said[:n_assumed],
            said[n_assumed:],
            root,
            gain,
            uncertainty,
            confidence,
            u,
            b,
            actions,
            probs,
            simulations,
            seconds,
            copy[planner:code].decode(),
            version,
            sketch_S6=sketch[0] if sketch else None,
        ),
        place + size,
    )


# ----------------------------------------------------------------------------------------------------------- messages


class Kind(IntEnum):
    """What a message says."""

    REQUESTS = 1
    """Generator to pool: requests lie in these slots."""
    NEWS = 2
    """Pool to generator: these requests are settled (perhaps none), and this is the room."""


class Outcome(IntEnum):
    """What an entry says of its request."""

    ASKED = 0
    PLANNED = 1
    """Its plans lie in its slot."""
    LOST = 2
    SHED = 3


class Entry(NamedTuple):
    """One request of a message."""

    slot: int
    outcome: int
    request_id: int
    size: int
    """Bytes of the record in the slot."""


_MAGIC = 0x4D535243  # "CRSM"
_HEAD = struct.Struct("<4IqQ")
"""Magic, kind, entries, microseconds of the smallest search; room, requests seen."""
_ENTRY = struct.Struct("<2IqQ")
MAX_ENTRIES = 1024
"""Entries of one message at most: a message fits any socket's buffer."""
MESSAGE_BYTES = _HEAD.size + MAX_ENTRIES * _ENTRY.size

ANY_ROOM = -1
"""The pool takes any number of requests."""


def write_message(
    kind: Kind, entries: Sequence[tuple[int, int, int, int]], room: int = 0, seen: int = 0, soonest: float = 0.0
) -> bytes:
    """A message, of at most ``MAX_ENTRIES`` entries.

    Args:
        kind: what it says.
        entries: as in :class:`Entry`.
        room: requests that the pool takes beyond those that it has; ``ANY_ROOM``.
        seen: requests that the pool had when it said so, since the two met.
        soonest: seconds in which the smallest search would be back; 0: not known.
    """
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"{len(entries)} entries; allowed: at most {MAX_ENTRIES}")
    head = _HEAD.pack(_MAGIC, kind, len(entries), min(int(1e6 * soonest), 2**32 - 1), room, seen)
    return b"".join((head, *(_ENTRY.pack(*entry) for entry in entries)))


def read_message(message: memoryview, kind: Kind) -> tuple[int, int, Iterator[tuple[int, int, int, int]]]:
    """Room, requests seen, and the entries of a message of this kind.

    Raises:
        Malformed: it is none.
    """
    if len(message) < _HEAD.size:
        raise Malformed(f"a message of {len(message)} bytes")
    magic, found, count, _, room, seen = _HEAD.unpack_from(message)
    if magic != _MAGIC or found != kind or len(message) != _HEAD.size + count * _ENTRY.size:
        raise Malformed(f"magic {magic:#x}, kind {found}, {count} entries in {len(message)} bytes")
    return room, seen, _ENTRY.iter_unpack(message[_HEAD.size :])


def read_soonest(message: memoryview) -> float:
    """Seconds in which the smallest search would be back, of a message that :func:`read_message` has read."""
    microseconds: int = _HEAD.unpack_from(message)[3]
    return 1e-6 * microseconds
