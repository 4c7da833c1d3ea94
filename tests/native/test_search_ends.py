"""How a native search ends before its budget does: time, clocks, questions, cancellation."""

from __future__ import annotations

import signal
import sys
import threading
import time

import numpy as np
import pytest

from crsm import native
from crsm.config import SearchConfig
from crsm.search import CancelToken, Evaluation, Tree
from tests.native.searches import RandomTables, run
from tests.search.fakes import HashEvaluator

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)


ENDLESS = 200_000


def endless() -> tuple[object, SearchConfig]:
    """Some hundred milliseconds of work."""
    return RandomTables(1, 4, 4, 2, holes=False, coarse=False).native(), SearchConfig(simulations=ENDLESS, max_depth=40)


def assert_is_a_whole_tree(tree: Tree) -> None:
    """What was stopped is the search of a smaller budget."""
    done = int(tree.num_simulations_B.max())
    assert tree.num_simulations_B.tolist() == [done] * tree.num_trees
    assert 0 <= done < ENDLESS
    np.testing.assert_array_equal(tree.node_visits_BS[:, 0], tree.num_simulations_B + 1)
    assert (tree.node_visits_BS[:, done + 1 :] == 0).all()
    short = min(done, 50)
    smaller = run(*endless(), simulations=short)
    np.testing.assert_array_equal(tree.parents_BS[:, : short + 1], smaller.parents_BS)


@pytest.mark.parametrize("microseconds", [0.0, 3000.0])
@pytest.mark.parametrize("engine", ["python", "native"])
def test_a_search_by_time_answers(microseconds: float, engine: str) -> None:
    evaluator, config = endless()
    tree = run(evaluator, config, engine, microseconds=microseconds)
    assert_is_a_whole_tree(tree)
    assert microseconds or tree.num_simulations_B.max() == 0


@pytest.mark.parametrize("microseconds", [-1.0, float("nan")])
def test_no_time_at_all_is_refused(microseconds: float) -> None:
    with pytest.raises(ValueError, match=r"microseconds = .*; allowed: at least 0"):
        run(*endless(), microseconds=microseconds)


def test_time_without_end_is_allowed() -> None:
    tables = RandomTables(1, 1, 4, 2, holes=False, coarse=False)
    tree = run(tables.native(), SearchConfig(simulations=5), microseconds=float("inf"))
    assert tree.num_simulations_B.tolist() == [5]


def test_a_deadline_on_the_default_clock_is_kept() -> None:
    assert_is_a_whole_tree(run(*endless(), deadline=time.monotonic() + 0.003))
    assert run(*endless(), deadline=time.monotonic() - 1.0).num_simulations_B.tolist() == [0] * 4


def test_a_native_search_asks_python_now_and_then() -> None:
    asked = []

    def should_stop() -> bool:
        asked.append(time.monotonic())
        return len(asked) == 5

    began = time.monotonic()
    assert_is_a_whole_tree(run(*endless(), should_stop=should_stop))
    # At once, and then not before another 200 µs have gone by.
    assert len(asked) == 5 and asked[4] - began >= 4 * 200e-6


def test_a_clock_of_ones_own_is_read_before_every_simulation() -> None:
    ticks = iter(range(1000))
    tables = RandomTables(1, 2, 4, 2, holes=False, coarse=False)
    tree = run(tables.native(), SearchConfig(simulations=50), deadline=7.0, clock=lambda: float(next(ticks)))
    assert tree.num_simulations_B.tolist() == [7, 7]
    assert next(ticks) == 8


@pytest.mark.parametrize("engine", ["python", "native"])
def test_cancelled_before_it_began_a_search_still_answers(engine: str) -> None:
    token = CancelToken()
    assert not token.cancelled
    token.cancel()
    assert token.cancelled
    assert run(*endless(), engine, cancel=token).num_simulations_B.tolist() == [0] * 4


@pytest.mark.parametrize("leaves", [1, 3])
def test_cancelled_from_another_thread_a_search_ends(leaves: int) -> None:
    evaluator, config = endless()
    token = CancelToken()
    under_way = threading.Event()
    thread = threading.Thread(target=lambda: under_way.wait() and token.cancel())
    thread.start()
    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        if len(asked) == 3:
            under_way.set()
        return False

    config = config.model_copy(update={"leaves": leaves, "virtual_loss": 1})
    tree = run(evaluator, config, cancel=token, should_stop=should_stop)
    thread.join()
    assert 0 < tree.num_simulations_B.max() < ENDLESS
    np.testing.assert_array_equal(tree.node_visits_BS[:, 0], tree.num_simulations_B + 1)


def test_a_signal_ends_a_search_in_the_main_thread() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    handler = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.01)
        with pytest.raises(Interrupted):
            run(*endless())
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, handler)


def test_cancelled_while_the_evaluator_works_the_simulation_is_dropped() -> None:
    token = CancelToken()

    class Cancelling(HashEvaluator):
        def expand(self, *arguments: np.ndarray) -> Evaluation:
            if len(self.calls) == 4:
                token.cancel()
            return super().expand(*arguments)

    tree = run(Cancelling([1, 2], 4, 2), SearchConfig(), cancel=token)
    assert tree.num_simulations_B.tolist() == [4, 4]


def test_other_threads_run_while_a_native_search_does() -> None:
    evaluator, config = endless()
    token = CancelToken()
    done = threading.Event()

    def in_the_background() -> None:
        run(evaluator, config, cancel=token)
        done.set()

    thread = threading.Thread(target=in_the_background)
    interval = sys.getswitchinterval()
    try:
        # A thread that held the GIL would now never give it up.
        sys.setswitchinterval(1e5)
        thread.start()
        token.cancel()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert done.is_set()
