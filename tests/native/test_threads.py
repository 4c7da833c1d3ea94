"""Native calls from several threads at once: no races under ThreadSanitizer (`make native-tsan`), no mixed results."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from crsm import native
from crsm.config import SearchConfig
from crsm.search import CancelToken
from tests.native.searches import RandomTables, assert_same, run

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)
core = native.core


def at_once(count: int, body: object) -> None:
    """Runs ``body(index)`` in that many threads, and raises what one of them raises."""
    raised: list[BaseException] = []
    start = threading.Barrier(count)

    def one(index: int) -> None:
        try:
            start.wait()
            body(index)  # type: ignore[operator]
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.fixture
def two_threads() -> object:
    before = core.num_threads()
    native.set_num_threads(2)
    yield
    native.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_products_of_several_callers_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    factors = [[rng.normal(size=shape).astype(np.float32) for shape in ((64, 96), (80, 96))] for _ in range(4)]

    def multiply(index: int) -> None:
        x, weight = factors[index]
        for _ in range(20):
            y = np.empty((64, 80), np.float32)
            core.linear(x, weight, y)
            np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-4)

    at_once(4, multiply)


@pytest.mark.usefixtures("two_threads")
def test_searches_of_several_callers_do_not_mix() -> None:
    # Enough trees for two tasks.
    config = SearchConfig(policy="gumbel", simulations=8)
    tables = [RandomTables(seed, 200, 9, 2, holes=False, coarse=False) for seed in range(3)]
    alone = [run(table.native(), config) for table in tables]

    def again(index: int) -> None:
        for _ in range(3):
            assert_same(run(tables[index].native(), config), alone[index])

    at_once(3, again)


@pytest.mark.usefixtures("two_threads")
def test_one_token_ends_searches_of_several_threads() -> None:
    token = CancelToken()
    config = SearchConfig(simulations=100_000)

    def search_or_cancel(index: int) -> None:
        if index == 0:
            token.cancel()
            return
        tree = run(RandomTables(index, 4, 4, 2, holes=False, coarse=False).native(), config, cancel=token)
        np.testing.assert_array_equal(tree.node_visits_BS[:, 0], tree.num_simulations_B + 1)

    at_once(3, search_or_cancel)
