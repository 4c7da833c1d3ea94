"""Settings of the tasks and of the tokenizer that their words make."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crsm.settings import Positive, Settings

Preamble = Annotated[int, Field(ge=0)]
"""Tokens said before the answer has to decide anything: time to think."""


class TaskSettings(Settings):
    """What the settings of every task hold."""

    name: str
    """The kind of task."""
    id: Annotated[str | None, Field(pattern="^[a-z][a-z0-9_]*$")] = None
    """What the task is called; None: as its kind. Two of a kind in one mix differ by it (``star_2``, ``star_5``)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training mix."""
    plan: bool = True
    """Whether stages 2 to 4 teach System 2 this task. One that the critics cannot judge would keep the gates shut for
    all of them."""

    @property
    def label(self) -> str:
        """What the task is called."""
        return self.id or self.name


class PathStarConfig(TaskSettings):
    """Star graph: arms from one centre, the goal at the end of one arm (arXiv 2403.06963)."""

    name: Literal["path_star"] = "path_star"
    arms: Annotated[int, Field(ge=2)] = 3
    length: Annotated[int, Field(ge=2)] = 4
    """Nodes of an arm, the centre included."""
    labels: Positive = 30
    preamble: Preamble = 2

    @model_validator(mode="after")
    def _labels_suffice(self) -> PathStarConfig:
        need = 1 + self.arms * (self.length - 1)
        if self.labels < need:
            raise ValueError(f"labels = {self.labels}; allowed: at least {need} for this graph")
        return self


class TreePathConfig(TaskSettings):
    """Complete binary tree; the answer is the path from the root to a goal leaf: several decisions in a row."""

    name: Literal["tree_path"] = "tree_path"
    depth: Annotated[int, Field(ge=1)] = 3
    labels: Positive = 30
    preamble: Preamble = 2

    @model_validator(mode="after")
    def _labels_suffice(self) -> TreePathConfig:
        need = 2 ** (self.depth + 1) - 1
        if self.labels < need:
            raise ValueError(f"labels = {self.labels}; allowed: at least {need} for this tree")
        return self


class CountdownConfig(TaskSettings):
    """Numbers and a target; the answer is a line of steps that uses every number once and ends at the target."""

    name: Literal["countdown"] = "countdown"
    numbers: Annotated[int, Field(ge=2, le=5)] = 4
    max_number: Annotated[int, Field(ge=2)] = 12
    """Numbers are drawn from 1 … max_number."""
    max_value: Annotated[int, Field(ge=2, le=9999)] = 99
    """Largest result of a step; each number up to it is a word."""
    min_target: Positive = 10
    preamble: Preamble = 2

    @model_validator(mode="after")
    def _values_are_ordered(self) -> CountdownConfig:
        for name in ("max_number", "min_target"):
            if getattr(self, name) > self.max_value:
                raise ValueError(f"{name} = {getattr(self, name)}; allowed: at most max_value = {self.max_value}")
        return self


class MazeConfig(TaskSettings):
    """A maze without loops as a grid of cells; the answer is the way from start to goal, cell by cell."""

    name: Literal["maze"] = "maze"
    height: Annotated[int, Field(ge=2, le=30)] = 5
    width: Annotated[int, Field(ge=2, le=30)] = 5
    min_moves: Positive = 4
    max_moves: Positive = 10
    """Length of the way."""
    preamble: Preamble = 2

    @model_validator(mode="after")
    def _moves_fit(self) -> MazeConfig:
        if self.max_moves < self.min_moves:
            raise ValueError(f"max_moves = {self.max_moves}; allowed: at least min_moves = {self.min_moves}")
        # The corners of any maze without loops are at least this far apart, so that a way is always found.
        if self.min_moves > self.height + self.width - 2:
            most = self.height + self.width - 2
            raise ValueError(f"min_moves = {self.min_moves}; allowed: at most {most}, the distance of the corners")
        return self


class SudokuConfig(TaskSettings):
    """A sudoku with one solution; the answer fills its empty cells in reading order."""

    name: Literal["sudoku"] = "sudoku"
    size: Literal[4, 6, 9] = 4
    """Boxes of 2 × 2, 2 × 3 or 3 × 3 cells."""
    givens: Positive | None = None
    """Cells that are given, more where one solution needs more; None: 4, 14 or 36, by size."""
    preamble: Preamble = 2

    @model_validator(mode="after")
    def _givens_fit(self) -> SudokuConfig:
        least = {4: 4, 6: 8, 9: 17}[self.size]
        if self.givens is not None and not least <= self.givens < self.size**2:
            raise ValueError(f"givens = {self.givens}; allowed: {least} to {self.size**2 - 1} for this size")
        return self


class ProsqaConfig(TaskSettings):
    """Which of two things is the root? Reachability in a graph of "every X is a Y" (arXiv 2412.06769)."""

    name: Literal["prosqa"] = "prosqa"
    labels: Positive = 50
    """Node labels, the words ``0`` … ``labels - 1``."""
    min_nodes: Annotated[int, Field(ge=6)] = 17
    max_nodes: Annotated[int, Field(ge=6)] = 28
    min_steps: Positive = 3
    max_steps: Positive = 6
    """Edges from the root to the target."""
    path: str | None = None
    """A file of the public form, whose problems are then the test split; the others are generated all the same."""
    judge: Literal["answer", "path"] = "answer"
    """``answer``: the last node has to be the target, as in the published figures; ``path``: every step an edge too."""
    preamble: Preamble = 2

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> ProsqaConfig:
        if self.max_nodes < self.min_nodes:
            raise ValueError(f"max_nodes = {self.max_nodes}; allowed: at least min_nodes = {self.min_nodes}")
        if self.max_steps < self.min_steps:
            raise ValueError(f"max_steps = {self.max_steps}; allowed: at least min_steps = {self.min_steps}")
        if self.labels < self.max_nodes:
            raise ValueError(f"labels = {self.labels}; allowed: at least max_nodes = {self.max_nodes}")
        if self.min_steps > self.min_nodes // 3:
            raise ValueError(f"min_steps = {self.min_steps}; allowed: at most {self.min_nodes // 3}, min_nodes / 3")
        return self


class ArithmeticConfig(TaskSettings):
    """Expressions, worked out step by step."""

    name: Literal["arithmetic"] = "arithmetic"
    style: Literal["words", "marks"] = "words"
    """``words``: closed vocabulary, steps as in countdown; ``marks``: open text with calculator marks, as in GSM8K."""
    min_operations: Annotated[int, Field(ge=1, le=12)] = 2
    max_operations: Annotated[int, Field(ge=1, le=12)] = 3
    max_number: Positive = 12
    max_value: Annotated[int, Field(ge=2, le=99_999)] = 99
    """Largest result of a step; in words, each number up to it is one."""
    max_tokens: Positive = 256
    """Of open text: problems whose text is longer are left out."""
    preamble: Preamble = 2

    @model_validator(mode="after")
    def _values_are_ordered(self) -> ArithmeticConfig:
        if self.max_operations < self.min_operations:
            least = self.min_operations
            raise ValueError(f"max_operations = {self.max_operations}; allowed: at least min_operations = {least}")
        if self.max_number > self.max_value:
            raise ValueError(f"max_number = {self.max_number}; allowed: at most max_value = {self.max_value}")
        return self


class ArcAgiConfig(TaskSettings):
    """Grids that are changed by a rule, of which a few examples are shown (ARC-AGI-1, arXiv 1911.01547)."""

    name: Literal["arc_agi"] = "arc_agi"
    path: str = "sample"
    """A jsonl with one task a line, or a folder of the public repository; ``sample``: the shipped tasks."""
    augment: bool = True
    """Training problems with other colours, turned or mirrored, their pairs in another order and any one asked."""
    max_tokens: Positive = 1024
    """Problems whose text is longer are left out, and counted."""


class GymConfig(TaskSettings):
    """A task of reasoning-gym (extra ``gym``), whose scorer runs in a child process with limits."""

    name: Literal["gym"] = "gym"
    dataset: str = "chain_sum"
    """Its name there; one of those that are known to score soundly."""
    seconds: Annotated[float, Field(gt=0)] = 2.0
    """For scoring one answer."""
    memory_mb: Annotated[int, Field(ge=64)] = 1024
    """Address space that scoring may add."""
    max_tokens: Positive = 256
    """Problems whose text is longer are left out."""


class Gsm8kConfig(TaskSettings):
    """Grade-school word problems with worked steps (arXiv 2110.14168)."""

    name: Literal["gsm8k"] = "gsm8k"
    path: str | None = None
    """A local jsonl; ``sample``: the 200 shipped problems; None: ``openai/gsm8k`` from the hub (extra ``hub``)."""
    hub_split: Literal["train", "test"] = "train"
    """What is read from the hub. The official test set is for evaluations alone."""
    attempts_path: str | None = None
    """A jsonl of model-made attempts with verdicts (fields ``question``, ``attempt``, ``correct``)."""
    true_marks: bool = False
    """Leave out problems with a calculator mark that is false or cannot be read (2 of 7,473 in the training file)."""
    max_tokens: Positive = 256
    """Problems whose text is longer are left out, and counted."""


class ArcConfig(TaskSettings):
    """Multiple-choice questions of grade-school science (arXiv 1803.05457)."""

    name: Literal["arc_easy", "arc_challenge"] = "arc_easy"
    path: str | None = None
    """A folder of ``ARC-Easy-train.jsonl`` and so on; a jsonl, which is then the test split; None: ``allenai/ai2_arc``
    from the hub (extra ``hub``)."""
    max_tokens: Positive = 256
    """Problems whose text is longer are left out of the training, and counted."""


TaskConfig = Annotated[
    PathStarConfig
    | TreePathConfig
    | CountdownConfig
    | MazeConfig
    | SudokuConfig
    | ProsqaConfig
    | ArithmeticConfig
    | ArcAgiConfig
    | GymConfig
    | Gsm8kConfig
    | ArcConfig,
    Field(discriminator="name"),
]


class TokenizerConfig(Settings):
    kind: Literal["closed", "bpe", "file"] = "closed"
    """``closed``: the words of the tasks, nothing else; ``bpe``: byte-level BPE trained on the tasks' text; ``file``:
    the byte-level BPE of a ``tokenizer.json``, as the preparation of data leaves one beside its shards."""
    path: str | None = None
    """Of the ``file``."""
    vocab_size: Positive = 4096
    """Entries of a BPE; a closed vocabulary has as many as the tasks need, a file as many as it has."""

    @model_validator(mode="after")
    def _path_fits(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(f"path = {self.path!r} with kind = {self.kind!r}; allowed: a path for 'file', none else")
        return self
