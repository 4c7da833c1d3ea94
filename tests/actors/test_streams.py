"""From the decode thread to readers: everything arrives once and in order, bundled, and nobody is held up."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.decode_loop import Closed, Refused
from actors.streams import Stream, Streams, Tokens, bundled, ended, ends, lighten
from crsm.types import Injection, Token
from tests.fixtures import a_request, make_plan, tiny_checkpoint


def token(name: str, position: int, last: bool = False) -> Token:
    return Token(name, position, position % 7, -0.5, last, "length" if last else None)


async def read(stream: Stream, name: str) -> tuple[list[Token], int]:
    """All tokens of a stream of one generation, and in how many messages they came."""
    said: list[Token] = []
    messages = 0
    while True:
        messages += 1
        for message in await stream.take():
            assert isinstance(message, Token) and message.generation_id == name
            said.append(message)
            if ends(message):
                return said, messages


def test_what_many_generations_say_reaches_each_reader_in_order_and_in_few_messages() -> None:
    names = [f"g{i}" for i in range(5)]
    count = 2000

    async def main() -> None:
        streams = Streams(interval=0.01)
        readers = {name: Stream() for name in names}
        for name, stream in readers.items():
            streams.open([name], stream)

        def speak() -> None:
            for position in range(count):
                streams.deliver([token(name, position, position == count - 1) for name in names])

        thread = threading.Thread(target=speak)
        thread.start()
        results = await asyncio.gather(*(read(stream, name) for name, stream in readers.items()))
        thread.join()
        for said, messages in results:
            assert [t.position for t in said] == list(range(count))
            assert messages < count / 10, "bundled, not one by one"

    asyncio.run(main())


def test_one_reader_may_read_many_generations() -> None:
    async def main() -> None:
        streams, reader = Streams(interval=0.0), Stream()
        streams.open(["a", "b"], reader)
        assert len(streams) == 2 and "a" in streams and "c" not in streams
        streams.deliver([token("a", 0), token("b", 0), token("c", 0)])
        streams.deliver([token("a", 1)])
        said: list[Token] = []
        while len(said) < 3:
            said += [message for message in await reader.take() if isinstance(message, Token)]
        assert [(t.generation_id, t.position) for t in said] == [("a", 0), ("b", 0), ("a", 1)]
        streams.close(["a", "b"])
        assert len(streams) == 0

    asyncio.run(main())


def test_closing_reaches_every_reader_once() -> None:
    async def main() -> None:
        streams, one, two = Streams(interval=0.0), Stream(), Stream()
        streams.open(["a", "b"], one)
        streams.open(["c"], two)
        streams.deliver([Closed("over")])
        assert await one.take() == [Closed("over")] == await two.take()
        assert streams.closed == Closed("over")

    asyncio.run(main())


def test_a_message_after_a_pause_comes_at_once_whatever_the_interval() -> None:
    """The interval bounds how often the event loop is woken, not how long a first token takes."""

    async def main() -> None:
        streams, reader = Streams(interval=30.0), Stream()
        streams.open(["a"], reader)
        streams.deliver([token("a", 0)])
        assert len(await asyncio.wait_for(reader.take(), timeout=20.0)) == 1

    asyncio.run(main())


def test_a_streamed_token_has_no_arrays_of_the_write() -> None:
    checkpoint = tiny_checkpoint()
    plan = make_plan(a_request(), checkpoint)
    plan = dataclasses.replace(plan, tree={"a": 1})
    heavy = Token("g", 3, 4, -0.1, injection=Injection(plan, 3, (0.5, 0.5)))
    light = lighten(heavy)
    assert light.injection is not None and light.injection.plan.write_u_LRE.size == 0
    assert light.injection.plan.write_b_LRN.size == 0 and light.injection.plan.tree is None
    assert light._replace(injection=None) == heavy._replace(injection=None)
    assert light.injection.alpha_L == (0.5, 0.5) and light.injection.plan.line == plan.line
    assert np.array_equal(light.injection.plan.value_plan_L, plan.value_plan_L)
    assert lighten(token("g", 0)) == token("g", 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]), st.integers(0, 2**40), st.integers(-1, 99), st.floats(-9, 0), st.booleans()
        ),
        max_size=20,
    )
)
def test_tokens_of_one_message_come_back_from_a_journey_as_they_were(
    rows: list[tuple[str, int, int, float, bool]],
) -> None:
    injection = Injection(make_plan(a_request(), tiny_checkpoint()), 3, (0.5, 0.5))
    tokens = Tokens(
        Token(name, position, token, logprob, last, "length" if last else None, injection if token == 7 else None)
        for name, position, token, logprob, last in rows
    )
    arrived = pickle.loads(pickle.dumps(tokens))
    assert isinstance(arrived, Tokens) and isinstance(arrived, tuple) and len(arrived) == len(tokens)
    for mine, theirs in zip(tokens, arrived, strict=True):
        assert theirs._replace(injection=None) == mine._replace(injection=None)
        assert (theirs.injection is None) == (mine.injection is None)
        if theirs.injection is not None:
            assert theirs.injection.alpha_L == (0.5, 0.5) and theirs.injection.plan.line == (21, 22)


def test_a_bundle_is_what_came_in_order_with_runs_of_tokens_drawn_together() -> None:
    a, b, c = token("a", 0), token("b", 0), token("a", 1, last=True)
    refused = Refused("d", "no")
    assert bundled([]) == [] and bundled([a, b]) == [Tokens((a, b))]
    assert bundled([refused, a, b, refused, c]) == [refused, Tokens((a, b)), refused, Tokens((c,))]
    assert ended([a, b, c, refused, Closed("over")]) == {"a", "d"}


def test_generations_of_one_reader_leave_together_and_count_as_one() -> None:
    async def main() -> None:
        streams = Streams(interval=0.0)
        mine, other = Stream(), Stream()
        streams.open(["a", "b", "c"], mine)
        streams.open(["d"], other)
        assert len(streams._readers) == 2
        streams.close(["b"])
        assert sorted(streams.close_all(mine)) == ["a", "c"] and list(streams._readers) == [other]
        assert "a" not in streams and "d" in streams

    asyncio.run(main())


def test_what_ends_a_stream() -> None:
    assert ends(token("g", 0, last=True)) and ends(Refused("g", "no")) and ends(Closed("over"))
    assert not ends(token("g", 0))
