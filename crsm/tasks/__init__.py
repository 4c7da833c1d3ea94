"""Problem generators and verifiers behind one protocol."""

from __future__ import annotations

from collections.abc import Iterable

from crsm.config import (
    ArcAgiConfig,
    ArcConfig,
    ArithmeticConfig,
    CountdownConfig,
    Gsm8kConfig,
    GymConfig,
    MazeConfig,
    PathStarConfig,
    ProsqaConfig,
    SudokuConfig,
    TaskConfig,
    TreePathConfig,
)
from crsm.tasks.base import (
    EOS,
    PAD,
    TOKEN_RIGHT,
    TOKEN_WRONG,
    VERDICT_RIGHT,
    VERDICT_WRONG,
    Attempt,
    Problem,
    Split,
    Task,
    problems,
    split_of,
)

__all__ = [
    "EOS",
    "PAD",
    "TOKEN_RIGHT",
    "TOKEN_WRONG",
    "VERDICT_RIGHT",
    "VERDICT_WRONG",
    "Attempt",
    "Problem",
    "Split",
    "Task",
    "build_task",
    "build_tasks",
    "problems",
    "split_of",
]


def build_task(config: TaskConfig) -> Task:
    """The task that a group of settings describes; reads its data, if it has any.

    Raises:
        ValueError: its data cannot be read, naming the file and line, or a setting is out of range.
    """
    match config:
        case PathStarConfig():
            from crsm.tasks.path_star import path_star

            return path_star(config)
        case TreePathConfig():
            from crsm.tasks.tree_path import tree_path

            return tree_path(config)
        case CountdownConfig():
            from crsm.tasks.countdown import Countdown

            return Countdown(config)
        case MazeConfig():
            from crsm.tasks.maze import Maze

            return Maze(config)
        case SudokuConfig():
            from crsm.tasks.sudoku import Sudoku

            return Sudoku(config)
        case ProsqaConfig():
            from crsm.tasks.prosqa import Prosqa

            return Prosqa(config)
        case ArithmeticConfig():
            from crsm.tasks.arithmetic import Arithmetic

            return Arithmetic(config)
        case ArcAgiConfig():
            from crsm.tasks.arc_agi import ArcAgi

            return ArcAgi(config)
        case GymConfig():
            from crsm.tasks.gym import Gym

            return Gym(config)
        case Gsm8kConfig():
            from crsm.tasks.gsm8k import Gsm8k

            return Gsm8k(config)
        case ArcConfig():
            from crsm.tasks.arc import Arc

            return Arc(config)


def build_tasks(configs: Iterable[TaskConfig]) -> list[Task]:
    """The tasks of a run, in the order of the settings."""
    return [build_task(config) for config in configs]
