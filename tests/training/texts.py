"""Attempts at made-up problems, with prompts of one length or of several."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from crsm.data import AttemptGroup
from crsm.training.traces import Texts

VERDICTS = (6, 5)
"""Token of a wrong and of a right end in the tiny vocabulary."""


def group_of(
    prompts: list[list[int]], answers: list[list[list[int]]], outcomes: list[list[int]] | None = None
) -> AttemptGroup:
    """Problems with their attempts; an answer's last token is its verdict."""
    problems, attempts = len(answers), len(answers[0])
    prompt_lengths_B = np.array([len(prompt) for prompt in prompts])
    prompts_BT = np.zeros((problems, prompt_lengths_B.max()), np.int64)
    longest = max(len(answer) for row in answers for answer in row)
    answers_BAt = np.zeros((problems, attempts, longest), np.int64)
    mask_BAt = np.zeros(answers_BAt.shape, bool)
    for b, prompt in enumerate(prompts):
        prompts_BT[b, : len(prompt)] = prompt
        for a, answer in enumerate(answers[b]):
            answers_BAt[b, a, : len(answer)] = answer
            mask_BAt[b, a, : len(answer)] = True
    outcome_BA = np.array(outcomes or [[(a + b) % 2 for a in range(attempts)] for b in range(problems)], np.float32)
    return AttemptGroup(
        prompts_BT=prompts_BT,
        prompt_lengths_B=prompt_lengths_B,
        answers_BAt=answers_BAt,
        answer_mask_BAt=mask_BAt,
        outcome_BA=outcome_BA,
        task_index=0,
        problems=(None,) * problems,  # type: ignore[arg-type]
        step_problems=problems,
        step_answer_tokens=int(mask_BAt.sum()),
    )


def drawn(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(7, 31, size=length).tolist()


def equal_group() -> AttemptGroup:
    """Two problems of one prompt length, two attempts each, answers of 5, 4, 5 and 3 tokens."""
    lengths = [[5, 4], [5, 3]]
    return group_of(
        [drawn(0, 6), drawn(1, 6)],
        [
            [[*drawn(10 * b + a, n - 1), VERDICTS[(a + b) % 2]] for a, n in enumerate(row)]
            for b, row in enumerate(lengths)
        ],
    )


def ragged_group() -> AttemptGroup:
    """The same answers after prompts of 4 and 6 tokens."""
    group = equal_group()
    return group_of(
        [drawn(0, 4), drawn(1, 6)],
        [
            [row[a, : group.answer_lengths_BA[b, a]].tolist() for a in range(2)]
            for b, row in enumerate(group.answers_BAt)
        ],
    )


def parts_of(group: AttemptGroup) -> list[AttemptGroup]:
    """A problem for each of two workers."""
    attempts = group.answers_BAt.shape[1]
    return [
        dataclasses.replace(
            group.rows(slice(row, row + 1)), part_of=dataclasses.replace(group.whole, first_row=row * attempts)
        )
        for row in (0, 1)
    ]


def whole_texts(group: AttemptGroup) -> list[list[int]]:
    """Prompt and answer of every attempt, as one list of tokens."""
    return [
        [*prompt.tolist(), *group.answers_BAt[b, a, : group.answer_lengths_BA[b, a]].tolist()]
        for b, prompt in enumerate(group.prompts)
        for a in range(group.answers_BAt.shape[1])
    ]


def prompt_of(texts: Texts, row: int) -> Tensor:
    """The prompt of a row of answers, without its padding."""
    problem = row // texts.attempts
    return texts.prompt_BT[problem, int(texts.padding_B[problem]) :]
