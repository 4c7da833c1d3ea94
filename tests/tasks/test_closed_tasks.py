"""Countdown, maze, sudoku and ProsQA: each against an oracle of its own that searches by brute force."""

from __future__ import annotations

import itertools
import json
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import Config, CountdownConfig, MazeConfig, PathStarConfig, ProsqaConfig, SudokuConfig, load_config
from crsm.data.tokenizer import build_tokenizer
from crsm.tasks import Problem, Task, build_task, build_tasks, problems, split_of
from crsm.tasks.countdown import live_steps, reachable

SPLITS = ("train", "valid", "test")
CONFIGS = (
    CountdownConfig(),
    CountdownConfig(id="countdown_3", numbers=3, max_number=9, min_target=1),
    MazeConfig(),
    MazeConfig(id="maze_wide", height=3, width=6, min_moves=2, preamble=0),
    SudokuConfig(),
    SudokuConfig(id="sudoku_6", size=6),
    ProsqaConfig(),
    ProsqaConfig(id="prosqa_strict", judge="path", min_nodes=9, max_nodes=14),
)
TASKS = build_tasks(CONFIGS)
TOKENIZER = build_tokenizer(Config().tokenizer, TASKS)

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def oracle(task: Task, problem: Problem, words: list[str]) -> bool:
    """Whether words are a right answer, from the words of the prompt alone and by other means than the task's."""
    asked = problem.prompt.split()
    config = next(config for config in CONFIGS if config.label == task.name)
    if isinstance(config, MazeConfig):
        return _maze(asked, words, config.width)
    return {"countdown": _countdown, "sudoku": _sudoku, "prosqa": _prosqa}[config.name](asked, words)


def _countdown(asked: list[str], words: list[str]) -> bool:
    slash = asked.index("/")
    left = [Fraction(word) for word in asked[1:slash]]
    for step in " ".join(words).split(" ; "):
        parts = step.split(" ")
        if len(parts) != 5 or parts[3] != "=" or not (parts[0] + parts[2] + parts[4]).isdecimal():
            return False
        a, b, c = Fraction(parts[0]), Fraction(parts[2]), Fraction(parts[4])
        value = {"+": a + b, "-": a - b, "*": a * b, "//": a / b if b else None}.get(parts[1])
        if value != c or (parts[1] == "-" and value < 1) or not (a in left and b in left) or len(left) < 2:
            return False
        left.remove(a)
        if b not in left:
            return False
        left.remove(b)
        left.append(c)
    return len(left) == 1 and left[0] == int(asked[slash + 1])


def _maze(asked: list[str], words: list[str], width: int) -> bool:
    slash = asked.index("/")
    open_at = dict(zip(asked[1:slash:2], asked[2:slash:2], strict=True))
    return words[:1] == [asked[slash + 1]] and words[-1:] == [asked[slash + 2]] and _walk(open_at, width, words)


def _walk(open_at: dict[str, str], width: int, words: list[str]) -> bool:
    move = {"N": -width, "S": width, "E": 1, "W": -1}
    steps = all(
        a in open_at and any(str(int(a) + move[side]) == b for side in open_at[a]) for a, b in itertools.pairwise(words)
    )
    return steps and len(set(words)) == len(words)


def _sudoku(asked: list[str], words: list[str]) -> bool:
    known = dict(word.split("=") for word in asked[1 : asked.index("/")])
    try:
        filled = dict(word.split("=") for word in words)
    except ValueError:
        return False
    grid = known | filled
    size = int(len(grid) ** 0.5)
    cells = [f"r{r}c{c}" for r in range(1, size + 1) for c in range(1, size + 1)]
    if len(words) != len(filled) or size not in (4, 6) or sorted(grid) != sorted(cells) or known.keys() & filled.keys():
        return False
    if list(filled) != [cell for cell in cells if cell not in known]:
        return False
    height, width = {4: (2, 2), 6: (2, 3)}[size]
    units: dict[object, list[str]] = {}
    for cell in cells:
        r, c = int(cell[1]) - 1, int(cell[3]) - 1
        for unit in (("r", r), ("c", c), ("b", r // height, c // width)):
            units.setdefault(unit, []).append(grid[cell])
    return all(sorted(unit) == [str(v) for v in range(1, size + 1)] for unit in units.values())


def _prosqa(asked: list[str], words: list[str]) -> bool:
    slash = asked.index("/")
    edges = {(asked[i], asked[i + 1]) for i in range(1, slash, 3)}
    root, *pair = asked[slash + 1 : slash + 4]
    reached = {root}
    while more := {v for u, v in edges if u in reached} - reached:
        reached |= more
    (target,) = [node for node in pair if node in reached]
    return bool(words) and words[-1] == target and set(words) <= {node for edge in edges for node in edge}


def right(task: Task, problem: Problem, words: list[str]) -> bool:
    if task.name == "prosqa_strict":
        asked = problem.prompt.split()
        edges = {(asked[i], asked[i + 1]) for i in range(1, asked.index("/"), 3)}
        legal = words[:1] == [asked[asked.index("/") + 1]] and all(pair in edges for pair in itertools.pairwise(words))
        return legal and oracle(task, problem, words)
    return oracle(task, problem, words)


def body(task: Task, text: str) -> list[str]:
    assert text.startswith(task.preamble)
    return text.removeprefix(task.preamble).split()


@each_task
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(-(2**63), 2**63), index=st.integers(0, 2**40), split=st.sampled_from(SPLITS))
def test_solutions_and_attempts_are_judged_as_the_oracle_judges_them(
    task: Task, seed: int, index: int, split: str
) -> None:
    problem = task.generate(seed, split, index)
    assert problem.split == split == split_of(problem.key)
    assert task.verify(problem, problem.solution) and right(task, problem, body(task, problem.solution))
    for attempt in task.attempts(problem, np.random.default_rng(index), 12):
        assert task.verify(problem, attempt.text) == attempt.correct == right(task, problem, body(task, attempt.text))
        TOKENIZER.encode(attempt.text)
    TOKENIZER.encode(f"{problem.prompt} {problem.solution}")
    assert task.generate(seed, split, index) == problem


@each_task
@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 2**40), data=st.data())
def test_a_solution_with_one_word_changed_is_wrong_unless_the_oracle_knows_better(
    task: Task, index: int, data: st.DataObject
) -> None:
    problem = task.generate(3, "train", index)
    words = body(task, problem.solution)
    place = data.draw(st.integers(0, len(words) - 1))
    changed = data.draw(st.sampled_from([word for word in task.words() if word not in ("yes", "no", words[place])]))
    words[place] = changed
    assert task.verify(problem, " ".join(words)) == right(task, problem, words)


@each_task
def test_about_half_of_the_attempts_are_right_and_a_seed_fixes_them(task: Task) -> None:
    drawn = [task.attempts(problem, np.random.default_rng(0), 40) for problem in problems(task, 1, "train", 60)]
    assert 0.4 < np.mean([a.correct for attempts in drawn for a in attempts]) < 0.7
    again = [task.attempts(problem, np.random.default_rng(0), 40) for problem in problems(task, 1, "train", 60)]
    assert drawn == again


@each_task
@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.text(), st.lists(st.sampled_from([*"0123456789", "=", ";", "/", "yes", "+", "//"])).map(" ".join))
)
def test_garbage_is_wrong(task: Task, text: str) -> None:
    problem = task.generate(0, "test", 0)
    words = text.partition("<eos>")[0].split()
    assert task.verify(problem, text) is False or right(task, problem, body(task, " ".join(words)))
    for hostile in ("", "yes", "9**9**9", "1 " * 100_000, "٣ + ٤ = ٧", "__import__('os')", "\0", "-1", "=" * 10_000):
        assert task.verify(problem, hostile) is False
    assert task.verify(problem, f"{problem.solution} no <eos> 1") and not task.verify(
        problem, f"yes {problem.solution}"
    )


@each_task
def test_no_test_problem_among_training_draws(task: Task) -> None:
    count = 400 if task.name == "sudoku_6" else 3000
    held_out = {problem.key for split in ("valid", "test") for problem in problems(task, 7, split, 40)}
    assert not held_out & {task.generate(0, "train", index).key for index in range(count)}


@each_task
def test_decisions_are_among_the_words_of_the_solution(task: Task) -> None:
    problem = task.generate(0, "valid", 0)
    positions = task.decision_positions(problem)
    first = len(task.preamble.split())
    assert all(first <= position < len(problem.solution.split()) for position in positions)


def test_a_task_can_be_sent_to_another_process() -> None:
    for task in TASKS:
        assert pickle.loads(pickle.dumps(task)).generate(3, "train", 4) == task.generate(3, "train", 4)


def test_problems_are_the_same_on_every_machine_and_release() -> None:
    shown = {task.name: task.generate(7, "train", 0) for task in TASKS}
    texts = {name: f"{problem.prompt} {problem.solution}" for name, problem in shown.items()}
    assert texts["countdown"] == "countdown 3 5 5 5 / 18 = the answer 5 + 3 = 8 ; 8 + 5 = 13 ; 13 + 5 = 18"
    assert texts["maze_wide"] == (
        "maze 0 ES 1 EW 2 ESW 3 SW 4 ES 5 SW 6 NS 7 S 8 NS 9 NE 10 NSW 11 N 12 NE 13 NW 14 N 15 E 16"
        " NEW 17 W / 13 0 = 13 12 6 0"
    )
    assert texts["sudoku"] == (
        "sudoku r1c1=2 r1c2=4 r2c2=3 r2c3=4 r4c3=2 r4c4=3 / = the answer r1c3=3 r1c4=1 r2c1=1 r2c4=2"
        " r3c1=3 r3c2=2 r3c3=1 r3c4=4 r4c1=4 r4c2=1"
    )
    assert texts["prosqa_strict"] == (
        "prosqa 13 26 | 14 21 | 42 34 | 11 40 | 26 21 | 34 14 | 24 11 | 42 7 | 14 22 | 21 22 | 26 34 |"
        " / 13 40 22 = the path 13 26 21 22"
    )


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_the_solver_knows_what_can_be_reached(numbers: list[int]) -> None:
    def every_end(left: tuple[int, ...]) -> set[int]:
        if len(left) == 1:
            return {left[0]}
        ends: set[int] = set()
        for i, j in itertools.permutations(range(len(left)), 2):
            a, b, rest = left[i], left[j], [left[k] for k in range(len(left)) if k not in (i, j)]
            for value in (a + b, a - b, a * b, a // b if a % b == 0 else 0):
                if 1 <= value <= 99:
                    ends |= every_end((*rest, value))
        return ends

    ends = every_end(tuple(numbers))
    assert reachable(tuple(sorted(numbers)), 99) == ends
    for target in list(ends)[:5]:
        for step in live_steps(tuple(sorted(numbers)), target, 99):
            assert target in every_end(step.rest)


def test_a_key_does_not_depend_on_how_a_problem_is_written() -> None:
    countdown = build_task(CountdownConfig(numbers=2, max_number=4, min_target=1))
    keys: dict[str, set[str]] = {}
    for index in range(300):
        problem = countdown.generate(0, "train", index)
        keys.setdefault(problem.key, set()).add(problem.prompt)
    assert any(len(prompts) == 2 for prompts in keys.values())
    maze = build_task(MazeConfig(height=2, width=2, min_moves=2))
    keys = {}
    for split in SPLITS:
        for index in range(200):
            try:
                problem = maze.generate(0, split, index)
            except ValueError:
                break
            keys.setdefault(problem.key, set()).add(problem.prompt)
    # A wall stands between two of the four cells: ways of two moves around or past it, of eight images each.
    assert all(len(prompts) in (4, 8) for prompts in keys.values())
    sudoku = build_task(SudokuConfig(givens=15))
    keys = {}
    for index in range(4000):
        problem = sudoku.generate(0, "train", index)
        keys.setdefault(problem.key, set()).add(problem.prompt)
    assert max(len(prompts) for prompts in keys.values()) > 12


@pytest.mark.parametrize("size", [4, 6])
def test_a_sudoku_has_one_solution_by_another_search(size: int) -> None:
    task = build_task(SudokuConfig(size=size))
    height, width = {4: (2, 2), 6: (2, 3)}[size]
    for index in range(20 if size == 4 else 5):
        problem = task.generate(0, "test", index)
        grid = [problem.data["grid"][c] if c in problem.data["givens"] else None for c in range(size * size)]

        def count(cell: int, grid: list[int | None] = grid) -> int:
            if cell == size * size:
                return 1
            if grid[cell] is not None:
                return count(cell + 1)
            total = 0
            r, c = divmod(cell, size)
            for value in range(size):
                if any(
                    grid[o] == value
                    and (
                        o // size == r
                        or o % size == c
                        or (o // size // height, o % size // width) == (r // height, c // width)
                    )
                    for o in range(size * size)
                ):
                    continue
                grid[cell] = value
                total += count(cell + 1)
                grid[cell] = None
            return total

        assert count(0) == 1


def test_two_tasks_of_a_kind_live_in_one_mix_and_settings_reach_them() -> None:
    config = load_config(None, ["tasks=[{name: path_star, id: star_2, arms: 2}, {name: path_star, arms: 5}]"])
    assert [task.name for task in build_tasks(config.tasks)] == ["star_2", "path_star"]
    tree = {"tasks": [task.model_dump() for task in config.tasks]}
    from crsm.config import apply_override

    apply_override(tree, "tasks.star_2.labels=50")
    apply_override(tree, "tasks.path_star.length=5")
    assert (tree["tasks"][0]["labels"], tree["tasks"][1]["length"]) == (50, 5)
    with pytest.raises(ValueError, match="each name once"):
        Config(tasks=(PathStarConfig(), PathStarConfig(arms=2)))


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (CountdownConfig, {"max_number": 200}, "max_number = 200; allowed: at most max_value = 99"),
        (MazeConfig, {"max_moves": 2}, "max_moves = 2; allowed: at least min_moves = 4"),
        (MazeConfig, {"min_moves": 9}, "min_moves = 9; allowed: at most 8"),
        (SudokuConfig, {"givens": 3}, "givens = 3; allowed: 4 to 15"),
        (SudokuConfig, {"size": 5}, "size"),
        (ProsqaConfig, {"labels": 20}, "labels = 20; allowed: at least max_nodes = 28"),
        (ProsqaConfig, {"min_steps": 7}, "max_steps = 6; allowed: at least min_steps = 7"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(kind: type, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


# --- the public ProsQA file --------------------------------------------------------------------------------------

RECORD = {
    "question": "Every a is a b. … Is Tom a c or d?",
    "steps": ["Tom is a a."],
    "answer": "Tom is a c.",
    "idx_to_symbol": ["Tom", "Max", "a", "b", "c", "d"],
    "edges": [[0, 2], [2, 3], [3, 4], [1, 5], [0, 3]],
    "root": 0,
    "target": 4,
    "neg_target": 5,
}


def test_the_public_file_is_the_test_split(tmp_path: Path) -> None:
    path = tmp_path / "prosqa.json"
    path.write_text(json.dumps([RECORD, RECORD | {"edges": [*RECORD["edges"], [1, 2]]}]))
    task = build_task(ProsqaConfig(path=str(path)))
    assert (task.size("test"), task.size("train")) == (2, None)
    first, second = problems(task, 0, "test", 100)
    assert first.split == "test" and first.key != second.key and task.generate(9, "test", 2) == first
    assert oracle(TASKS[6], first, body(task, first.solution)) and task.verify(first, first.solution)
    assert len(body(task, first.solution)) == 3  # the shortest way, 0 3 4
    assert not task.verify(first, str(first.data["other"])) and task.verify(first, str(first.data["goal"]))
    assert task.generate(0, "train", 0) == TASKS[6].generate(0, "train", 0)
    labels = [problem.solution for problem in (first, second)]
    assert labels[0] != labels[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "at least one problem"),
        ("[1]", "record 0 holds a int; allowed: an object"),
        ([RECORD | {"edges": [[0, 9]]}], r"record 0: edges = \[\[0, 9\]\]; allowed: pairs of numbers below 6"),
        ([RECORD, RECORD | {"root": True}], "record 1: root = True; allowed: 0 to 5"),
        ([RECORD | {"target": 5}], "the target cannot be reached"),
        ([RECORD | {"idx_to_symbol": ["x"] * 51}], "idx_to_symbol has 51 names; allowed: 1 to labels = 50"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        build_task(ProsqaConfig(path=str(path)))
    with pytest.raises(ValueError, match=r"nowhere.json' cannot be read"):
        build_task(ProsqaConfig(path=str(tmp_path / "nowhere.json")))
