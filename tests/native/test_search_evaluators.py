"""Evaluators of the native search: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from crsm import native
from crsm.config import SearchConfig
from crsm.search import Evaluation
from crsm.search.native import PythonView
from tests.native.searches import RandomTables, assert_same, run
from tests.search.fakes import FakeEvaluator, HashEvaluator, TableEvaluator

pytestmark = pytest.mark.skipif(not native.available(), reason=native.MISSING)
core = native.core


@pytest.mark.parametrize(
    ("state", "layer", "value", "logit", "message"),
    [
        (1, 1, np.nan, None, r"^evaluator: tree 1, layer 1: value = nan; allowed: \[0, 1\]$"),
        (1, 0, 1.5, None, r"^evaluator: tree 1, layer 0: value = 1.5; allowed: \[0, 1\]$"),
        (0, 0, -0.25, None, r"^evaluator: tree 0, layer 0: value = -0.25; allowed: \[0, 1\]$"),
        (1, None, None, np.nan, r"^evaluator: tree 1: prior logits = \[-1.0, nan, -1.0\]; allowed: log-prob"),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_native_evaluation_is_checked_as_one_in_python(
    state: int, layer: int | None, value: float, logit: float | None, message: str, deep: bool
) -> None:
    # States 0 and 1 are where trees 0 and 1 come to: at once, or by their first action.
    next_state_ZA = np.array([[0] * 3, [1] * 3, [0] * 3, [1] * 3])
    logits_ZA = np.full((4, 3), -1.0, np.float32)
    values_ZL = np.full((4, 2), 0.5, np.float32)
    if layer is not None:
        values_ZL[state, layer] = value
    if logit is not None:
        logits_ZA[state, 1] = logit
    roots_B = np.array([2, 3]) if deep else np.array([0, 1])
    said = []
    for engine in ("python", "native"):
        for evaluator in (TableEvaluator(roots_B, next_state_ZA, logits_ZA, values_ZL), None):
            with pytest.raises(ValueError, match=message) as caught:
                run(
                    evaluator or core.TableEvaluator(roots_B, next_state_ZA, logits_ZA, values_ZL),
                    SearchConfig(simulations=4),
                    engine,
                )
            said.append(str(caught.value))
    assert len(set(said)) == 1


class Said(FakeEvaluator):
    """Returns what it is told to, from the second expansion on."""

    def __init__(self, change: object) -> None:
        super().__init__(2, 3, 2)
        self.change = change

    def evaluation(self) -> Evaluation:
        actions_BA = np.tile(np.arange(3), (2, 1))
        return Evaluation(actions_BA, np.full((2, 3), -1.0, np.float32), np.full((2, 2), 0.5, np.float32))

    def root(self) -> Evaluation:
        return self.evaluation()

    def expand(self, *arguments: np.ndarray) -> Evaluation:
        self.calls.append(arguments)
        return self.change(self.evaluation()) if len(self.calls) > 1 else self.evaluation()


@pytest.mark.parametrize(
    "change",
    [
        lambda said: dataclasses.replace(said, actions_BA=said.actions_BA.astype(np.int32)),
        lambda said: dataclasses.replace(said, actions_BA=said.actions_BA[:1]),
        lambda said: dataclasses.replace(said, actions_BA=said.actions_BA[0]),
        lambda said: dataclasses.replace(said, prior_logits_BA=said.prior_logits_BA.astype(np.float64)),
        lambda said: dataclasses.replace(said, prior_logits_BA=said.prior_logits_BA.view(np.int32)),
        lambda said: dataclasses.replace(said, values_BL=said.values_BL[:, :1]),
        lambda said: dataclasses.replace(said, values_BL=said.values_BL + np.float32(0.7)),
        lambda said: dataclasses.replace(said, values_BL=said.values_BL.astype(object)),
        lambda said: dataclasses.replace(said, values_BL=None),
        lambda said: None,
    ],
)
def test_what_is_no_evaluation_is_refused_in_the_same_words(change: object) -> None:
    said = []
    for engine in ("python", "native"):
        with pytest.raises((ValueError, AttributeError)) as caught:
            run(Said(change), SearchConfig(simulations=4), engine)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def test_arrays_of_any_strides_are_read() -> None:
    def turned(said: Evaluation) -> Evaluation:
        values_BL = np.zeros((4, 6), np.float32)[::2, ::3]
        values_BL[...] = said.values_BL
        values_BL.flags.writeable = False
        return Evaluation(np.asfortranarray(said.actions_BA), said.prior_logits_BA[:, ::-1], values_BL)

    assert_same(*(run(Said(turned), SearchConfig(simulations=9), engine) for engine in ("python", "native")))


@pytest.mark.parametrize("where", ["root", "expand", "clock", "should_stop"])
def test_an_exception_comes_through_as_the_same_object_and_frees_the_tree(where: str) -> None:
    class Lost(Exception):
        pass

    lost = Lost("the device is gone")

    class Failing(HashEvaluator):
        def root(self) -> Evaluation:
            if where == "root":
                raise lost
            return super().root()

        def expand(self, *arguments: np.ndarray) -> Evaluation:
            if where == "expand" and len(self.calls) == 3:
                raise lost
            return super().expand(*arguments)

    def fail() -> float:
        raise lost

    changes: dict = {"clock": {"clock": fail, "deadline": 1.0}, "should_stop": {"should_stop": fail}}.get(where, {})
    evaluator = Failing([1, 2], 4, 2)
    with pytest.raises(Lost) as caught:
        run(evaluator, SearchConfig(), **changes)
    assert caught.value is lost
    gone = weakref.ref(evaluator)
    lost.__traceback__ = None
    del evaluator, caught
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("index", "array", "message"),
    [
        (0, np.array([7]), "roots holds 7; allowed: 0 to 1"),
        (1, np.array([[0, -1], [0, 0]]), "next_state holds -1; allowed: 0 to 1"),
        (1, np.array([[0, 1], [0, 0]], np.int32), "next_state_ZA: wrong dtype; allowed: int64"),
        (2, np.zeros((2, 3), np.float32), r"prior_logits_ZA has shape \(2, 3\); allowed: \(2, 2\)"),
        (3, np.zeros((2, 4), np.float32)[:, ::2], "values_ZL: not contiguous"),
    ],
)
def test_tables_that_do_not_fit_are_refused(index: int, array: np.ndarray, message: str) -> None:
    tables = [
        np.zeros(1, np.int64),
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), np.float32),
        np.zeros((2, 1), np.float32),
    ]
    tables[index] = array
    with pytest.raises(ValueError, match=message):
        core.TableEvaluator(*tables)


def test_a_native_evaluator_answers_python() -> None:
    tables = RandomTables(5, 2, 3, 2, holes=False, coarse=False)
    view, known = PythonView(tables.native(), 4), tables.python()
    arguments = np.array([0, 0]), np.array([2, 1]), np.array([1, 1]), np.array([True, True])
    for one, other in ((view.root(), known.root()), (view.expand(*arguments), known.expand(*arguments))):
        for field in dataclasses.fields(Evaluation):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), strict=True)
    with pytest.raises(ValueError, match="tree_R = 2; allowed"):
        tables.native().evaluate_leaves(*(np.array([2]) for _ in range(4)))
