"""The adapter to reasoning-gym: allowed tasks, sound scores, limits."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from crsm.config import GymConfig
from crsm.tasks import build_task, problems, split_of
from crsm.tasks.gym import ALLOWED
from crsm.tasks.sandbox import Sandbox, Verdict

SPLITS = ("train", "valid", "test")


def test_a_task_that_is_not_allowed_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"dataset = 'game_of_life_halting'; allowed: aiw, .*word_sorting"):
        build_task(GymConfig(dataset="game_of_life_halting"))


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from crsm.tasks import gym

    gym._library.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="needs the extra `gym`"):
        build_task(GymConfig())
    gym._library.cache_clear()


@pytest.mark.parametrize("name", ALLOWED)
def test_an_allowed_scorer_gives_full_marks_to_the_answer_alone(name: str) -> None:
    library = pytest.importorskip("reasoning_gym")
    dataset = library.create_dataset(name, seed=11, size=12)
    entries = [dataset[i] for i in range(12)]
    for place, entry in enumerate(entries):
        assert dataset.score_answer(entry["answer"], entry) >= 1.0
        other = entries[place - 1]["answer"]
        for wrong in (
            "",
            f"{entry['answer']} x",
            f"x {entry['answer']}",
            *([other] if other != entry["answer"] else []),
        ):
            assert dataset.score_answer(wrong, entry) < 1.0, (entry, wrong)


@pytest.fixture(scope="module")
def chain_sum():
    pytest.importorskip("reasoning_gym")
    return build_task(GymConfig(seconds=5.0))


def test_problems_are_fixed_by_seed_and_split(chain_sum) -> None:
    for split in SPLITS:
        problem = chain_sum.generate(1, split, 3)
        assert problem == chain_sum.generate(1, split, 3) and problem.split == split == split_of(problem.key)
        assert problem.prompt.startswith("Question: ") and chain_sum.verify(problem, problem.solution)
    held_out = {problem.key for problem in problems(chain_sum, 0, "test", 30)}
    assert not held_out & {chain_sum.generate(0, "train", index).key for index in range(300)}


def test_attempts_are_labelled_as_the_scorer_judges_them(chain_sum) -> None:
    drawn = [
        (problem, attempt)
        for index, problem in enumerate(problems(chain_sum, 0, "train", 10))
        for attempt in chain_sum.attempts(problem, np.random.default_rng(index), 6)
    ]
    assert 0.3 < np.mean([attempt.correct for _, attempt in drawn]) < 0.8
    assert all(chain_sum.verify(problem, attempt.text) == attempt.correct for problem, attempt in drawn)


def test_the_scorer_says_what_else_is_right(chain_sum) -> None:
    problem = chain_sum.generate(0, "train", 0)
    assert chain_sum.verify(problem, f"{problem.data['answer']}.0 <right>")
    for garbage in ("", "9**9**9**9", "__import__('os').system('true')", "1" * 200_000, "\0", "nan"):
        assert not chain_sum.verify(problem, garbage)


def test_a_scorer_of_the_library_that_runs_text_is_stopped() -> None:
    library = pytest.importorskip("reasoning_gym")
    assert "countdown" not in ALLOWED
    sandbox = Sandbox("crsm.tasks.gym_scorer:score", 1.0, 512)
    right = library.create_dataset("countdown", seed=5, size=1)[0]["answer"]
    assert sandbox.score({"dataset": "countdown", "seed": 5, "answer": right}) == Verdict(1.0)
    verdict = sandbox.score({"dataset": "countdown", "seed": 5, "answer": "9**9**9**9"})
    assert verdict.score == 0.0 and verdict.error is not None
    assert sandbox.score({"dataset": "countdown", "seed": 5, "answer": right}) == Verdict(1.0)
    sandbox.close()
