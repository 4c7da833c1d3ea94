"""Path-star and tree-path problems: format, outcomes, splits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import PathStarConfig, TreePathConfig
from crsm.tasks import Task, build_task, build_tasks, problems, split_of
from crsm.tasks.closed import PATH_PREAMBLE as PREAMBLE

TASKS = build_tasks([PathStarConfig(), TreePathConfig()])
SPLITS = ("train", "valid", "test")

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.mark.parametrize(("task", "length"), [(TASKS[0], 38), (TASKS[1], 53)])
def test_a_problem_its_solution_and_the_verdict_have_the_published_length(task: Task, length: int) -> None:
    for index in range(20):
        problem = task.generate(0, "train", index)
        assert len(f"{problem.prompt} {problem.solution} yes".split(" ")) == length


def test_the_text_is_edges_then_question_then_answer() -> None:
    problem = build_task(PathStarConfig()).generate(3, "test", 0)
    words = problem.prompt.split(" ")
    edges = [[int(words[3 * e]), int(words[3 * e + 1])] for e in range(9)]
    assert [words[3 * e + 2] for e in range(9)] == ["|"] * 9
    assert words[27:] == ["/", str(problem.data["start"]), str(problem.data["goal"]), "="]
    assert problem.data["edges"] == edges
    path = [int(word) for word in problem.solution.split(" ")[2:]]
    assert problem.solution.startswith("the path ") and path[0] == problem.data["start"]
    assert len(path) == 4 and path[-1] == problem.data["goal"]
    assert all([u, v] in edges for u, v in itertools.pairwise(path))


@each_task
def test_every_edge_leads_away_from_the_start_and_every_node_has_one_parent(task: Task) -> None:
    for index in range(50):
        data = task.generate(1, "train", index).data
        parent = {v: u for u, v in data["edges"]}
        assert len(parent) == len(data["edges"]) and data["start"] not in parent
        for node in parent:
            while node in parent:
                node = parent[node]
            assert node == data["start"]


def test_a_tree_has_two_children_at_every_inner_node() -> None:
    data = TASKS[1].generate(0, "train", 0).data
    children = [u for u, _ in data["edges"]]
    assert len(children) == 14 and all(children.count(u) == 2 for u in children)
    assert sorted(route[-1] for route in data["routes"]) == sorted(v for _, v in data["edges"] if v not in children)


@each_task
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(-(2**63), 2**63), index=st.integers(0, 2**40), split=st.sampled_from(SPLITS))
def test_solutions_verify_attempts_are_labelled_by_the_verifier(task: Task, seed: int, index: int, split: str) -> None:
    problem = task.generate(seed, split, index)
    assert problem.split == split == split_of(problem.key)
    assert task.verify(problem, problem.solution)
    for attempt in task.attempts(problem, np.random.default_rng(0), 8):
        assert task.verify(problem, attempt.text) == attempt.correct
    assert task.generate(seed, split, index) == problem


@pytest.mark.parametrize(("task", "chance"), [(TASKS[0], 1 / 3), (TASKS[1], 1 / 8)])
def test_attempts_are_uniform_over_goals(task: Task, chance: float) -> None:
    problem = task.generate(0, "train", 0)
    attempts = task.attempts(problem, np.random.default_rng(1), 4000)
    # Five standard deviations: a false alarm once in 1.7 million seeds, and the seed is fixed.
    assert abs(np.mean([a.correct for a in attempts]) - chance) < 5 * (chance * (1 - chance) / 4000) ** 0.5
    assert len({a.text for a in attempts}) == len(problem.data["routes"])


@each_task
def test_an_answer_may_carry_a_verdict_and_nothing_else(task: Task) -> None:
    problem = task.generate(0, "test", 1)
    solution, path = problem.solution, " ".join(map(str, problem.data["path"]))
    wrong = next(a.text for a in task.attempts(problem, np.random.default_rng(0), 50) if not a.correct)
    for right in (
        solution,
        f"{solution} yes",
        f"{solution} no",
        f"  {solution}  yes <eos>",
        f"{solution}<right>",
        path,
    ):
        assert task.verify(problem, right), right
    garbage = ["", "yes", "the path", f"{solution} 1", f"{solution} {solution}", path[:-1], f"0 {path}", "\0", "٣ ٤"]
    garbage += [wrong, f"{wrong} yes", f"the {path}", f"yes {solution}", "9**9**9", "1 " * 100_000, solution.upper()]
    for answer in garbage:
        assert not task.verify(problem, answer), answer[:50]


@each_task
def test_no_test_problem_among_20000_training_draws(task: Task) -> None:
    held_out = {p.key for split in ("valid", "test") for p in problems(task, 7, split, 200)}
    assert not held_out & {task.generate(0, "train", index).key for index in range(20_000)}


def test_the_split_does_not_depend_on_how_a_graph_is_written() -> None:
    star = build_task(PathStarConfig(arms=2, length=2, labels=4))
    tree = build_task(TreePathConfig(depth=1, labels=4))
    # 4 centres, 3 pairs of leaves, 2 goals: the two tasks name the same 24 problems.
    keys = {task.name: {p.key for p in problems(task, 0, "train", 1000)} for task in (star, tree)}
    assert keys["path_star"] == keys["tree_path"] and 0 < len(keys["path_star"]) <= 24
    prompts: dict[str, set[str]] = {}
    for index in range(500):
        problem = star.generate(1, "train", index)
        prompts.setdefault(problem.key, set()).add(problem.prompt)
    assert all(len(written) == 2 for written in prompts.values())  # both orders of the two edges


def test_a_graph_too_small_for_a_split_says_so() -> None:
    task = build_task(TreePathConfig(depth=1, labels=3))  # 3 roots, 2 goals: 6 problems
    found, empty = 0, 0
    for split in SPLITS:
        try:
            found += len(problems(task, 0, split, 9))
        except ValueError as error:
            assert f"task 'tree_path' has no {split} problems with these settings; allowed: more labels" in str(error)
            empty += 1
    assert found == 6 and empty > 0


def test_drawing_problems_and_batches_needs_no_torch() -> None:
    code = "import sys, crsm.tasks, crsm.data; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


@each_task
def test_streams_differ_by_seed_and_index_and_repeat_exactly(task: Task) -> None:
    first = problems(task, 0, "test", 30)
    assert [p.prompt for p in first] == [p.prompt for p in problems(task, 0, "test", 30)]
    assert len({p.key for p in first}) == 30
    assert not {p.key for p in first} & {p.key for p in problems(task, 1, "test", 30)}


def test_problems_are_the_same_on_every_machine_and_release() -> None:
    assert TASKS[0].generate(7, "test", 0).prompt == (
        "18 26 | 13 27 | 0 12 | 18 16 | 16 13 | 18 0 | 24 19 | 26 24 | 12 3 | / 18 27 ="
    )


def test_count_must_be_positive() -> None:
    with pytest.raises(ValueError, match="count = 0"):
        problems(TASKS[0], 0, "test", 0)


def test_decisions_are_where_the_graph_branches() -> None:
    for task, expected in zip(TASKS, ([3], [3, 4, 5]), strict=True):
        problem = task.generate(0, "test", 0)
        assert task.decision_positions(problem) == expected
        words, children = problem.solution.split(), [u for u, _ in problem.data["edges"]]
        branching = [i for i in range(3, len(words)) if children.count(int(words[i - 1])) > 1]
        assert branching == expected


@pytest.mark.parametrize("preamble", [0, 1, 7, len(PREAMBLE)])
def test_the_preamble_is_as_long_as_asked_and_in_the_vocabulary(preamble: int) -> None:
    task = build_task(TreePathConfig(preamble=preamble))
    problem = task.generate(0, "train", 0)
    words = problem.solution.split()
    assert words[:preamble] == task.preamble.split() == list(PREAMBLE[:preamble]) and len(words) == preamble + 4
    assert set(problem.prompt.split()) | set(words) <= set(task.words()) and task.verify(problem, problem.solution)


def test_a_preamble_longer_than_the_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"path_star.preamble = 17; allowed: 0 to 16 words"):
        build_task(PathStarConfig(preamble=17))
