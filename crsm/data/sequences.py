"""Training batches out of problems: pure functions of a seed and a step.

Letters: ``B`` rows, ``T`` positions, ``A`` attempts per problem, ``t`` positions of an answer.

A *sequence* is one prompt, one answer and the token of its verdict. Every worker draws the whole batch of a step and
keeps its part, so that any number of workers together see what one worker sees; a batch also carries the totals of the
whole step. A loss that is ``world · Σ own positions / step total`` on each worker, averaged over workers as
data-parallel training does, is then the same whatever their number.

Conventions. A token at ``t`` that is a target is predicted by the logits of ``t - 1``. The value heads are trained at
``t`` after the token at ``t`` was consumed: on every token of the answer, its preamble included, but not on the prompt
and not on the verdict. (A verdict in the data always tells the truth, so a head trained there would read the token
instead of the path, and a search could raise its value by *saying* "right".)
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from crsm.data.tokenizer import Tokenizer
from crsm.tasks.base import Problem, Split, Task, keyed_rng

if TYPE_CHECKING:
    from crsm.data.loader import TextLoader
    from crsm.data.mixture import Mixture

_STRIDE = 1 << 32
"""Distance in a stream of problems from one that is too long to its replacement: farther than any run gets."""
_MAX_REPLACEMENTS = 1000
TEXT = -1
"""In the place of a task's index: rows of text that is no task's."""
_MAX_REDRAWS = 8
"""Attempts drawn in the place of one that is too long, before the solution takes it."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt with one answer, as tokens."""

    tokens: np.ndarray
    """(T,) int64"""
    answer_start: int
    """Index of the answer's first token."""
    answer_end: int
    """Index after its last token, verdict excluded."""
    correct: bool
    judged: bool = True
    """Whether the value heads learn from it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens with everything that the losses need. One document a row, or several packed into each."""

    tokens_BT: np.ndarray
    """(B, T) int64, padded on the right"""
    targets_mask_BT: np.ndarray
    """Positions whose token is a training target (never position 0 of a document). (B, T) bool"""
    value_mask_BT: np.ndarray
    """Positions after which the value heads are trained. (B, T) bool"""
    outcome_BT: np.ndarray
    """Outcome of the answer that a position belongs to. (B, T) float32, 0 or 1"""
    segment_BT: np.ndarray
    """Documents of a row, counted from 0: the state is reset where it changes. Padding belongs to the last document.
    (B, T) int32"""
    answer_start_B: np.ndarray
    """First token of the (first) answer. (B,) int64"""
    lengths_B: np.ndarray
    """Tokens of a row without its padding. (B,) int64"""
    task_index_B: np.ndarray
    """``TEXT`` for open text. (B,) int64"""
    step_targets: int
    """Target positions of the whole step, over all tasks and workers."""
    step_values: int
    """Value positions of the whole step, over all tasks and workers."""

    @property
    def outcome_B(self) -> np.ndarray:
        """Outcome of each row. (B,) float32

        Raises:
            ValueError: the rows are packed, so that they have several; use ``outcome_BT``.
        """
        if self.packed:
            raise ValueError("packed rows have no single outcome; allowed: outcome_BT")
        return np.ascontiguousarray(self.outcome_BT[:, 0])

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one document."""
        return bool(self.segment_BT.any())

    @property
    def is_blank(self) -> bool:
        """Whether no loss looks at any of it: a worker without rows takes part in a step with such a batch."""
        return not self.targets_mask_BT.any()

    @property
    def num_rows(self) -> int:
        return len(self.tokens_BT)

    def rows(self, index: slice) -> Batch:
        """Some of the rows; the totals stay those of the step."""
        return replace(
            self,
            tokens_BT=self.tokens_BT[index],
            targets_mask_BT=self.targets_mask_BT[index],
            value_mask_BT=self.value_mask_BT[index],
            outcome_BT=self.outcome_BT[index],
            segment_BT=self.segment_BT[index],
            answer_start_B=self.answer_start_B[index],
            lengths_B=self.lengths_B[index],
            task_index_B=self.task_index_B[index],
        )


@dataclass(frozen=True, slots=True)
class WholeGroup:
    """What every worker knows of a group whose rows are divided over all of them."""

    lengths_B: np.ndarray
    """Tokens of each answer of all problems, verdicts included; a problem's attempts neighbour each other. int64"""
    first_row: int
    """Of these, the first that is this worker's."""
    checksum: int
    """Sum of all answers' tokens."""


@dataclass(frozen=True, slots=True)
class AttemptGroup:
    """Problems of one task with several answers each; the prompt need be run only once for all of them."""

    prompts_BT: np.ndarray
    """(B, T) int64, padded on the right where prompts differ in length"""
    prompt_lengths_B: np.ndarray
    """(B,) int64"""
    answers_BAt: np.ndarray
    """Answers with their verdict. (B, A, t) int64, padded on the right"""
    answer_mask_BAt: np.ndarray
    """Real tokens, the verdict included. (B, A, t) bool"""
    outcome_BA: np.ndarray
    """(B, A) float32, 0 or 1"""
    task_index: int
    problems: tuple[Problem, ...]
    """The problems of the rows."""
    step_problems: int
    """Problems of the whole step, over all tasks and workers."""
    step_answer_tokens: int
    """True entries of ``answer_mask_BAt`` of the whole step."""
    part_of: WholeGroup | None = None
    """None: these rows are all there are."""

    @property
    def whole(self) -> WholeGroup:
        """What these rows are a part of."""
        return self.part_of or WholeGroup(self.answer_lengths_BA.reshape(-1), 0, int(self.answers_BAt.sum()))

    @property
    def answer_lengths_BA(self) -> np.ndarray:
        """Tokens of each answer, the verdict included. (B, A) int64"""
        return np.asarray(self.answer_mask_BAt.sum(axis=2))

    @property
    def equal_prompts(self) -> bool:
        """Whether no prompt is padded, so that all can be run as one batch."""
        return bool((self.prompt_lengths_B == self.prompts_BT.shape[1]).all())

    @property
    def prompts(self) -> tuple[np.ndarray, ...]:
        """Each prompt without padding. (T_b,) int64"""
        return tuple(row[:length] for row, length in zip(self.prompts_BT, self.prompt_lengths_B, strict=True))

    def rows(self, index: slice) -> AttemptGroup:
        """Some of the problems; the totals stay those of the step, and nothing is known of the other rows."""
        return replace(
            self,
            part_of=None,
            prompts_BT=self.prompts_BT[index],
            prompt_lengths_B=self.prompt_lengths_B[index],
            answers_BAt=self.answers_BAt[index],
            answer_mask_BAt=self.answer_mask_BAt[index],
            outcome_BA=self.outcome_BA[index],
            problems=self.problems[index],
        )


class MixSettings(Protocol):
    """What ``training_batch`` reads of a stage's settings."""

    @property
    def solution_share(self) -> float: ...


def encode_prompt(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a prompt."""
    return tokenizer.encode(problem.prompt)


def encode_answer(answer: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of the answer that follows a prompt, verdict not included."""
    # Only a BPE sees the space between the last word of the prompt and the first of the answer.
    return tokenizer.encode(answer if answer[:1].isspace() else f" {answer}")


def make_sequence(
    problem: Problem, answer: str, correct: bool, tokenizer: Tokenizer, *, judged: bool = True
) -> Sequence:
    """One prompt, one answer and its verdict as tokens."""
    prompt = encode_prompt(problem, tokenizer)
    ids = prompt + encode_answer(answer, tokenizer) + [tokenizer.verdict_id(correct)]
    return Sequence(np.array(ids, dtype=np.int64), len(prompt), len(ids) - 1, correct, judged)


def make_batch(
    sequences: Seq[Sequence],
    *,
    pad_id: int,
    task_index: int = 0,
    all_targets: bool = False,
    length: int | None = None,
) -> Batch:
    """Sequences as rows, one each, padded on the right to ``length`` (None: to the longest).

    Args:
        sequences: the rows; at least one.
        pad_id: token of the padding.
        task_index: what ``task_index_B`` says.
        all_targets: train on the tokens of prompts too (open text), not on answers alone.
        length: positions of a row.
    """
    return _lay_out([[sequence] for sequence in sequences], length, pad_id, task_index, all_targets)


def pack_batch(
    sequences: Seq[Sequence], length: int, *, pad_id: int, task_index: int = 0, all_targets: bool = False
) -> Batch:
    """Sequences packed into rows of ``length``: none is cut, and each goes where it leaves least room (best fit)."""
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.tokens)):
        need = len(sequence.tokens)
        fitting = [(free, row) for row, free in enumerate(room) if free >= need]
        if fitting:
            row = min(fitting)[1]
            rows[row].append(sequence)
            room[row] -= need
        else:
            rows.append([sequence])
            room.append(length - need)
    return _lay_out(rows, length, pad_id, task_index, all_targets)


def training_batch(
    tasks: Seq[Task],
    tokenizer: Tokenizer,
    settings: MixSettings,
    *,
    seed: int,
    step: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    split: Split = "train",
    mixture: Mixture | None = None,
    text: TextLoader | None = None,
    every_batch: bool = False,
) -> list[Batch]:
    """One worker's part of the sequences of a step, one batch per task, and one of open text.

    A task's share of the sequences follows its weight, and ``solution_share`` of them hold the solution, spread evenly;
    the others hold an attempt. Tasks whose text is open are packed into rows of ``max_tokens``.

    Args:
        tasks: the mix.
        tokenizer: writes all of them.
        settings: of stage 1.
        seed: of the run.
        step: each step has other problems.
        batch: sequences over all workers.
        rank: this worker.
        world: number of workers.
        split: another one for held-out losses.
        mixture: says who has how many of the sequences of the step, instead of ``batch`` and the tasks' weights.
        text: where the rows of open text come from; with a mixture only.
        every_batch: a worker without rows of a batch gets a blank one, so that all have equally many batches.

    Raises:
        ValueError: ``batch`` is too small for the tasks or the workers.
    """
    if mixture is None:
        counts = dict(zip((task.name for task in tasks), _shares(tasks, batch), strict=True))
        firsts = {name: step * count for name, count in counts.items()}
    else:
        counts, firsts = mixture.counts(step), mixture.firsts(step)
    batches = []
    for task_index, task in enumerate(tasks):
        count, first = counts[task.name], firsts[task.name]
        if not count:
            continue
        # Where counts change, the even spread of solutions goes on from step to step.
        spread = 0 if mixture is None else first
        sequences = _sequences(task, tokenizer, settings.solution_share, seed, step, count, split, first, spread)
        if task.max_tokens is None:
            batches.append(make_batch(sequences, pad_id=tokenizer.pad_id, task_index=task_index))
        else:
            batches.append(
                pack_batch(sequences, task.max_tokens, pad_id=tokenizer.pad_id, task_index=task_index, all_targets=True)
            )
    if text is not None and (rows := text.batch(counts, firsts)) is not None:
        batches.append(rows)
    return _worker_part(batches, rank, world, every_batch)


def text_windows(
    tasks: Seq[Task],
    tokenizer: Tokenizer,
    *,
    seed: int,
    step: int,
    batch: int,
    length: int | None = None,
    solution_share: float = 0.5,
    rank: int = 0,
    world: int = 1,
    split: Split = "train",
) -> list[Batch]:
    """Packed windows of documents, for the stages that look at open text from every position.

    The same documents as ``training_batch`` draws for these arguments, of the tasks with open text only.

    Args:
        tasks: the mix; tasks with a fixed form are passed over.
        tokenizer: writes all of them.
        seed: of the run.
        step: each step has other problems.
        batch: documents over all workers.
        length: positions of a window; None: the task's ``max_tokens``. Each starts with a document;
            one that is longer than the window fills it and loses its end.
        solution_share: share of documents that hold the solution.
        rank: this worker.
        world: number of workers.
        split: where problems come from.
    """
    open_tasks = [(i, task) for i, task in enumerate(tasks) if task.max_tokens is not None]
    if not open_tasks:
        raise ValueError("no task has open text; allowed: attempt_groups for tasks of a fixed form")
    batches = []
    for (task_index, task), count in zip(open_tasks, _shares([task for _, task in open_tasks], batch), strict=True):
        sequences = _sequences(task, tokenizer, solution_share, seed, step, count, split)
        size = length if length is not None else task.max_tokens
        assert size is not None
        batches.append(
            pack_batch(
                [_cut(sequence, size) for sequence in sequences],
                size,
                pad_id=tokenizer.pad_id,
                task_index=task_index,
                all_targets=True,
            )
        )
    return _worker_part(batches, rank, world)


def attempt_groups(
    tasks: Seq[Task],
    tokenizer: Tokenizer,
    *,
    seed: int,
    step: int,
    batch: int,
    attempts: int,
    rank: int = 0,
    world: int = 1,
    split: Split = "train",
) -> list[AttemptGroup]:
    """One worker's part of the problems of a step with ``attempts`` answers each, one group per task.

    With more than one answer, the first is the solution and the others are attempts; with one, solutions and attempts
    take turns. A task without attempts repeats its solution. Prompts of a group have one length where the task's
    prompts have; otherwise the group is sorted by length, so that neighbours are alike.

    Args:
        tasks: the mix.
        tokenizer: writes all of them.
        seed: of the run.
        step: each step has other problems.
        batch: problems over all workers.
        attempts: A.
        rank: this worker.
        world: number of workers.
        split: where problems come from.

    Raises:
        ValueError: ``batch`` is too small for the tasks or the workers.
    """
    if attempts < 1:
        raise ValueError(f"attempts = {attempts}; allowed: at least 1")
    groups = []
    for task_index, (task, count) in enumerate(zip(tasks, _shares(tasks, batch), strict=True)):
        rng = keyed_rng("attempt groups", task.name, seed, step, split)
        drawn = [_draw(task, tokenizer, seed, step * count + row, split) for row in range(count)]
        answers = [
            _answers(task, problem, tokenizer, rng, attempts, solution_first=attempts > 1 or row % 2 == 0)
            for row, problem in enumerate(drawn)
        ]
        groups.append(_group(drawn, answers, tokenizer, task_index))
    step_problems = sum(len(group.problems) for group in groups)
    step_answer_tokens = sum(int(group.answer_mask_BAt.sum()) for group in groups)
    parts = []
    for group, rows in zip(groups, _parts([len(group.problems) for group in groups], rank, world), strict=True):
        part = group.rows(rows)
        if part.problems:
            whole = replace(group.whole, first_row=rows.start * attempts)
            parts.append(
                replace(part, part_of=whole, step_problems=step_problems, step_answer_tokens=step_answer_tokens)
            )
    if not parts:
        raise ValueError(f"batch = {batch} leaves worker {rank} of {world} without a problem; allowed: a larger batch")
    return parts


def count_too_long(task: Task, tokenizer: Tokenizer, split: Split = "train") -> tuple[int, int]:
    """How many problems of a split are left out because their solution exceeds ``max_tokens``, and out of how many.

    (0, 0) for a task that leaves none out by construction.
    """
    size = task.size(split)
    if task.max_tokens is None or size is None:
        return 0, 0
    left_out = sum(not _fits(task, task.generate(0, split, index), tokenizer) for index in range(size))
    return left_out, size


def _shares(tasks: Seq[Task], batch: int) -> list[int]:
    """``batch`` divided by weight (largest remainder), the same in every step; at least one for every task."""
    if batch < len(tasks):
        raise ValueError(f"batch = {batch}; allowed: at least {len(tasks)}, one for every task")
    total = sum(task.weight for task in tasks)
    quota = [batch * task.weight / total for task in tasks]
    if min(quota) < 1:
        quota = [1 + (batch - len(tasks)) * task.weight / total for task in tasks]
    counts = [int(share) for share in quota]
    by_remainder = sorted(range(len(tasks)), key=lambda i: (counts[i] - quota[i], i))
    for i in by_remainder[: batch - sum(counts)]:
        counts[i] += 1
    return counts


def _parts(rows: Seq[int], rank: int, world: int) -> list[slice]:
    """One worker's rows of each group; over all groups, workers differ by one row at most.

    Each group is cut into runs in the order of the workers. The rows that do not divide go to one worker each, and the
    next group goes on with the worker at which this one stopped.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank = {rank}; allowed: 0 to {world - 1}")
    slices, first_extra = [], 0
    for count in rows:
        base, extra = divmod(count, world)
        sizes = [base + ((worker - first_extra) % world < extra) for worker in range(world)]
        start = sum(sizes[:rank])
        slices.append(slice(start, start + sizes[rank]))
        first_extra = (first_extra + extra) % world
    return slices


def _worker_part(batches: list[Batch], rank: int, world: int, every_batch: bool = False) -> list[Batch]:
    step_targets = sum(int(batch.targets_mask_BT.sum()) for batch in batches)
    step_values = sum(int(batch.value_mask_BT.sum()) for batch in batches)
    parts = []
    for batch, rows in zip(batches, _parts([batch.num_rows for batch in batches], rank, world), strict=True):
        if rows.start < rows.stop:
            parts.append(batch.rows(rows))
        elif every_batch:
            parts.append(_blank(batch))
    # Every worker must take part in a step.
    parts = parts or [_blank(batches[0])]
    return [replace(part, step_targets=step_targets, step_values=step_values) for part in parts]


def _blank(batch: Batch) -> Batch:
    """A short row that no loss looks at."""
    tokens_BT = batch.tokens_BT[:1, :2]
    nothing_BT = np.zeros(tokens_BT.shape, dtype=bool)
    return replace(
        batch.rows(slice(0, 1)),
        tokens_BT=tokens_BT,
        targets_mask_BT=nothing_BT,
        value_mask_BT=nothing_BT,
        outcome_BT=batch.outcome_BT[:1, :2],
        segment_BT=np.zeros_like(batch.segment_BT[:1, :2]),
        lengths_B=np.zeros(1, dtype=np.int64),
    )


def _fits(task: Task, problem: Problem, tokenizer: Tokenizer, answer: str | None = None) -> bool:
    if task.max_tokens is None:
        return True
    text = problem.solution if answer is None else answer
    return len(make_sequence(problem, text, True, tokenizer).tokens) <= task.max_tokens


def _draw(task: Task, tokenizer: Tokenizer, seed: int, index: int, split: Split) -> Problem:
    """The problem at ``index``, or the replacement of one that is too long."""
    for trial in range(_MAX_REPLACEMENTS):
        problem = task.generate(seed, split, index + trial * _STRIDE)
        if _fits(task, problem, tokenizer):
            return problem
    raise ValueError(f"no {split} problem of task {task.name!r} fits max_tokens = {task.max_tokens}; allowed: more")


def _answers(
    task: Task, problem: Problem, tokenizer: Tokenizer, rng: np.random.Generator, count: int, solution_first: bool
) -> list[tuple[str, bool]]:
    """``count`` answers with outcomes: the solution first if asked, then attempts, solutions where there are none."""
    answers = [(problem.solution, True)] if solution_first else []
    missing = count - len(answers)
    for _ in range(_MAX_REDRAWS if missing else 0):
        drawn = task.attempts(problem, rng, count - len(answers))
        answers += [(a.text, a.correct) for a in drawn if _fits(task, problem, tokenizer, a.text)]
        if len(answers) == count or not drawn:
            break
    return answers + [(problem.solution, True)] * (count - len(answers))


def _sequences(
    task: Task,
    tokenizer: Tokenizer,
    solution_share: float,
    seed: int,
    step: int,
    count: int,
    split: Split,
    first: int | None = None,
    spread: int = 0,
) -> list[Sequence]:
    """``count`` sequences from number ``first`` of the task's stream on (None: ``step`` times ``count``); solutions are
    spread evenly from number ``spread`` on."""
    first = step * count if first is None else first
    rng = keyed_rng("sequences", task.name, seed, step, split)
    sequences = []
    for row in range(count):
        problem = _draw(task, tokenizer, seed, first + row, split)
        # Row r holds the solution where the running total of the share passes a whole number: an even spread.
        is_solution = int((spread + row + 1) * solution_share) > int((spread + row) * solution_share)
        ((text, correct),) = _answers(task, problem, tokenizer, rng, 1, solution_first=is_solution)
        sequences.append(make_sequence(problem, text, correct, tokenizer, judged=task.has_attempts))
    return sequences


def _cut(sequence: Sequence, length: int) -> Sequence:
    if len(sequence.tokens) <= length:
        return sequence
    return replace(
        sequence,
        tokens=sequence.tokens[:length],
        answer_start=min(sequence.answer_start, length),
        answer_end=min(sequence.answer_end, length),
    )


def _lay_out(rows: Seq[Seq[Sequence]], length: int | None, pad_id: int, task_index: int, all_targets: bool) -> Batch:
    if not rows:
        raise ValueError("a batch of no sequences; allowed: at least one")
    lengths = [sum(len(sequence.tokens) for sequence in row) for row in rows]
    longest = max(lengths)
    if length is not None and longest > length:
        raise ValueError(f"a row of {longest} tokens; allowed: at most length = {length}")
    shape = (len(rows), longest if length is None else length)
    tokens_BT = np.full(shape, pad_id, dtype=np.int64)
    targets_mask_BT = np.zeros(shape, dtype=bool)
    value_mask_BT = np.zeros(shape, dtype=bool)
    outcome_BT = np.zeros(shape, dtype=np.float32)
    segment_BT = np.zeros(shape, dtype=np.int32)
    for b, row in enumerate(rows):
        start = 0
        for segment, sequence in enumerate(row):
            end = start + len(sequence.tokens)
            tokens_BT[b, start:end] = sequence.tokens
            targets_mask_BT[b, start + (1 if all_targets else max(1, sequence.answer_start)) : end] = True
            if sequence.judged:
                value_mask_BT[b, start + sequence.answer_start : start + sequence.answer_end] = True
            outcome_BT[b, start:end] = sequence.correct
            segment_BT[b, start:] = segment
            start = end
    return Batch(
        tokens_BT=tokens_BT,
        targets_mask_BT=targets_mask_BT,
        value_mask_BT=value_mask_BT,
        outcome_BT=outcome_BT,
        segment_BT=segment_BT,
        answer_start_B=np.array([row[0].answer_start for row in rows], dtype=np.int64),
        lengths_B=np.array(lengths, dtype=np.int64),
        task_index_B=np.full(len(rows), task_index, dtype=np.int64),
        step_targets=int(targets_mask_BT.sum()),
        step_values=int(value_mask_BT.sum()),
    )


def _group(
    drawn: Seq[Problem], answers: Seq[Seq[tuple[str, bool]]], tokenizer: Tokenizer, task_index: int
) -> AttemptGroup:
    prompts = [encode_prompt(problem, tokenizer) for problem in drawn]
    encoded = [[[*encode_answer(text, tokenizer), tokenizer.verdict_id(ok)] for text, ok in row] for row in answers]
    order = sorted(range(len(drawn)), key=lambda b: len(prompts[b]))
    prompts_BT = np.full((len(drawn), max(map(len, prompts))), tokenizer.pad_id, dtype=np.int64)
    longest = max(len(answer) for row in encoded for answer in row)
    answers_BAt = np.full((len(drawn), len(encoded[0]), longest), tokenizer.pad_id, dtype=np.int64)
    answer_mask_BAt = np.zeros(answers_BAt.shape, dtype=bool)
    for row, b in enumerate(order):
        prompts_BT[row, : len(prompts[b])] = prompts[b]
        for a, answer in enumerate(encoded[b]):
            answers_BAt[row, a, : len(answer)] = answer
            answer_mask_BAt[row, a, : len(answer)] = True
    return AttemptGroup(
        prompts_BT=prompts_BT,
        prompt_lengths_B=np.array([len(prompts[b]) for b in order], dtype=np.int64),
        answers_BAt=answers_BAt,
        answer_mask_BAt=answer_mask_BAt,
        outcome_BA=np.array([[ok for _, ok in answers[b]] for b in order], dtype=np.float32),
        task_index=task_index,
        problems=tuple(drawn[b] for b in order),
        step_problems=len(drawn),
        step_answer_tokens=int(answer_mask_BAt.sum()),
    )
