"""Who may begin, and when to come again."""

from __future__ import annotations

import pytest

from actors.serving.admission import MAX_RETRY, MIN_RETRY, Admission, Ticket, seconds_to_room
from actors.serving.errors import ApiError
from actors.serving.telemetry import NO_TELEMETRY
from tests.fixtures import FakeClock
from tests.serving.fakes import Counts


def a_ticket(said: int, max_tokens: int, since: float) -> Ticket:
    return Ticket("g", "", max_tokens, since, said)


def test_come_again_when_the_first_generation_will_have_said_all_it_may() -> None:
    slow, fast = a_ticket(10, 100, since=0.0), a_ticket(50, 100, since=5.0)
    # slow: 90 tokens left at 1/s; fast: 50 left at 10/s.
    assert seconds_to_room([slow, fast], now=10.0) == 5
    assert seconds_to_room([slow], now=10.0) == MAX_RETRY
    assert seconds_to_room([a_ticket(99, 100, since=0.0)], now=1.0) == MIN_RETRY
    assert seconds_to_room([a_ticket(0, 100, since=0.0)], now=9.0) == MIN_RETRY == seconds_to_room([], now=0.0)


def test_all_generations_of_a_request_are_let_in_or_none() -> None:
    clock = FakeClock()
    admission = Admission(3, NO_TELEMETRY, clock=clock)
    first, _ = admission.enter([("a", 9), ("b", 9)], "me")
    with pytest.raises(ApiError, match="2 generations run or wait; allowed: 3 \\(max_concurrent\\)") as refused:
        admission.enter([("c", 9), ("d", 9)], "me")
    assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "1"})
    assert len(admission) == 2
    clock.now += 2.0
    admission.says(first, 3)  # 6 more at 1.5/s
    admission.enter([("c", 9)], "me")
    with pytest.raises(ApiError) as refused:
        admission.enter([("d", 9)], "me")
    assert refused.value.headers == {"retry-after": "4"}
    admission.leave(first)
    admission.leave(first)
    admission.enter([("d", 9)], "me")


def test_a_generation_is_only_its_owners() -> None:
    admission = Admission(3, NO_TELEMETRY)
    (ticket,) = admission.enter([("a", 9)], "me")
    assert admission.is_running("a", "me")
    assert not admission.is_running("a", "you") and not admission.is_running("b", "me")
    admission.leave(ticket)
    assert not admission.is_running("a", "me")


def test_nobody_is_let_in_while_the_server_drains() -> None:
    admission = Admission(3, NO_TELEMETRY, lambda: True)
    with pytest.raises(ApiError) as refused:
        admission.enter([("a", 9)], "me")
    assert refused.value.status == 503 and refused.value.headers == {"retry-after": "1"}


def test_the_gauges_follow_who_waits_and_who_speaks() -> None:
    counts = Counts()
    admission = Admission(3, counts)
    one, two = admission.enter([("a", 9), ("b", 9)], "")
    admission.says(one, 1)
    admission.says(one, 1)
    admission.leave(two)
    admission.leave(one)
    assert counts.gauges == [(0, 2), (1, 1), (1, 0), (0, 0)]
