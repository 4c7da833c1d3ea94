"""Training batches: masks, outcomes, determinism, workers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.config import BackboneStageConfig, Gsm8kConfig, PathStarConfig, TokenizerConfig, TreePathConfig
from crsm.data import (
    Batch,
    Sequence,
    attempt_groups,
    build_tokenizer,
    count_too_long,
    make_batch,
    make_sequence,
    pack_batch,
    text_windows,
    training_batch,
)
from crsm.tasks import Task, build_task, build_tasks, split_of

GRAPHS = build_tasks([PathStarConfig(), TreePathConfig()])
CLOSED = build_tokenizer(TokenizerConfig(), GRAPHS)
STAGE = BackboneStageConfig()
TEXT = build_tasks([Gsm8kConfig(path="sample", max_tokens=320)])
BPE = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=2000), TEXT)


def _equal(first: Batch, second: Batch) -> bool:
    fields = [field.name for field in dataclasses.fields(Batch)]
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in fields)


def _joined(parts: list[list[Batch]], task_index: int) -> dict[str, np.ndarray]:
    """The rows of one task over all workers."""
    mine = [batch for part in parts for batch in part if batch.task_index_B[0] == task_index]
    names = [field.name for field in dataclasses.fields(Batch) if not field.name.startswith("step_")]
    return {name: np.concatenate([getattr(batch, name) for batch in mine]) for name in names}


def test_one_group_per_task_with_the_published_lengths_and_no_padding() -> None:
    star, tree = training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=3, batch=64)
    assert star.tokens_BT.shape == (32, 38) and tree.tokens_BT.shape == (32, 53)
    for batch, length, answer_start in ((star, 38, 31), (tree, 53, 46)):
        assert (batch.tokens_BT != CLOSED.pad_id).all() and (batch.lengths_B == length).all()
        assert (batch.answer_start_B == answer_start).all() and not batch.packed
        positions = np.arange(length)
        assert (batch.targets_mask_BT == (positions >= answer_start)).all()
        assert (batch.value_mask_BT == ((positions >= answer_start) & (positions < length - 1))).all()
        assert batch.step_targets == 64 * 7 and batch.step_values == 64 * 6
    assert (star.task_index_B == 0).all() and (tree.task_index_B == 1).all()


def test_rows_are_judged_by_the_verifier() -> None:
    for task, batch in zip(GRAPHS, training_batch(GRAPHS, CLOSED, STAGE, seed=1, step=0, batch=64), strict=True):
        for row, tokens in enumerate(batch.tokens_BT):
            start = batch.answer_start_B[row]
            problem = task.generate(1, "train", row)
            assert CLOSED.decode(tokens[:start]) == problem.prompt
            correct = task.verify(problem, CLOSED.decode(tokens[start:]))
            assert batch.outcome_B[row] == correct and tokens[-1] == CLOSED.verdict_id(correct)
            assert (batch.outcome_BT[row] == correct).all()


def test_solution_share_holds_and_the_rest_is_at_chance() -> None:
    only = BackboneStageConfig(solution_share=1.0)
    assert all(b.outcome_B.all() for b in training_batch(GRAPHS, CLOSED, only, seed=0, step=0, batch=64))
    half = [training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=step, batch=64) for step in range(30)]
    for task_index, chance in ((0, 1 / 3), (1, 1 / 8)):
        outcome = np.concatenate([step[task_index].outcome_B for step in half])
        attempts = outcome.mean() * 2 - 1  # half of the rows are solutions, exactly
        assert abs(attempts - chance) < 5 * (chance * (1 - chance) / 480) ** 0.5


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(-100, 2**40), step=st.integers(0, 10**7), world=st.integers(1, 5), batch=st.integers(5, 20))
def test_workers_together_see_what_one_sees(seed: int, step: int, world: int, batch: int) -> None:
    arguments = {"seed": seed, "step": step, "batch": batch}
    whole = training_batch(GRAPHS, CLOSED, STAGE, **arguments)
    parts = [training_batch(GRAPHS, CLOSED, STAGE, **arguments, rank=rank, world=world) for rank in range(world)]
    for task_index, one in enumerate(whole):
        for name, joined in _joined(parts, task_index).items():
            assert np.array_equal(joined, getattr(one, name)), name
    assert {b.step_targets for part in [whole, *parts] for b in part} == {
        sum(int(b.targets_mask_BT.sum()) for b in whole)
    }
    rows = [sum(b.num_rows for b in part) for part in parts]
    assert sum(rows) == batch and max(rows) - min(rows) <= 1


def test_a_step_is_a_pure_function_and_steps_differ() -> None:
    first, again, later = (training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=s, batch=8) for s in (5, 5, 6))
    assert all(_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].tokens_BT, later[0].tokens_BT)


def test_training_holds_training_problems_only() -> None:
    for task_index, task in enumerate(GRAPHS):
        prompts = {
            CLOSED.decode(tokens[: batch.answer_start_B[0]])
            for step in range(50)
            for batch in training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=step, batch=64)[task_index : task_index + 1]
            for tokens in batch.tokens_BT
        }
        held_out = {task.generate(0, split, i).prompt for split in ("valid", "test") for i in range(500)}
        assert len(prompts) == 1600 and not prompts & held_out


@pytest.mark.parametrize(
    ("weights", "batch", "counts"),
    [((1, 1), 64, [32, 32]), ((3, 1), 64, [48, 16]), ((2, 1), 4, [3, 1]), ((999, 1), 8, [7, 1])],
)
def test_the_mix_follows_the_weights(weights: tuple[float, float], batch: int, counts: list[int]) -> None:
    tasks = build_tasks([PathStarConfig(weight=weights[0]), TreePathConfig(weight=weights[1])])
    assert [b.num_rows for b in training_batch(tasks, CLOSED, STAGE, seed=0, step=0, batch=batch)] == counts


def test_too_small_a_batch_and_an_impossible_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="batch = 1; allowed: at least 2"):
        training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=0, batch=1)
    with pytest.raises(ValueError, match="rank = 2; allowed: 0 to 1"):
        training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=0, batch=8, rank=2, world=2)


def test_more_workers_than_rows_leave_a_row_without_losses() -> None:
    parts = [training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=0, batch=2, rank=r, world=4) for r in range(4)]
    idle = [part for part in parts if not any(b.targets_mask_BT.any() for b in part)]
    assert len(idle) == 2 and all(not b.value_mask_BT.any() and b.num_rows == 1 for part in idle for b in part)


def test_micro_batches_are_rows_with_the_totals_of_the_step() -> None:
    (batch, _) = training_batch(GRAPHS, CLOSED, STAGE, seed=0, step=0, batch=16)
    half = batch.rows(slice(4, 8))
    assert np.array_equal(half.tokens_BT, batch.tokens_BT[4:8]) and half.step_targets == batch.step_targets


def _document(length: int, correct: bool = True, judged: bool = True) -> Sequence:
    return Sequence(np.arange(100, 100 + length), 2, length - 1, correct, judged)


def test_packing_by_hand() -> None:
    batch = pack_batch(
        [_document(4, False), _document(7), _document(5, judged=False)], 10, pad_id=0, task_index=3, all_targets=True
    )
    # Longest first: 7; 5 opens a second row; 4 fits the second row only (3 left in the first).
    assert batch.tokens_BT.tolist() == [
        [100, 101, 102, 103, 104, 105, 106, 0, 0, 0],
        [100, 101, 102, 103, 104, 100, 101, 102, 103, 0],
    ]
    assert batch.segment_BT.tolist() == [[0] * 10, [0] * 5 + [1] * 5]
    assert batch.targets_mask_BT.astype(int).tolist() == [[0] + [1] * 6 + [0] * 3, [0, 1, 1, 1, 1, 0, 1, 1, 1, 0]]
    assert batch.value_mask_BT.astype(int).tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 7 + [1, 0, 0]]
    assert batch.outcome_BT.tolist() == [[1] * 7 + [0] * 3, [1] * 5 + [0] * 5]
    assert batch.lengths_B.tolist() == [7, 9] and batch.task_index_B.tolist() == [3, 3] and batch.packed
    assert (batch.step_targets, batch.step_values) == (13, 5)
    with pytest.raises(ValueError, match="outcome_BT"):
        _ = batch.outcome_B


def test_rows_of_different_lengths_are_padded_on_the_right() -> None:
    batch = make_batch([_document(3), _document(5)], pad_id=0)
    assert batch.tokens_BT.tolist() == [[100, 101, 102, 0, 0], [100, 101, 102, 103, 104]]
    assert batch.targets_mask_BT.tolist() == [[False, False, True, False, False], [False, False, True, True, True]]
    assert not batch.packed and batch.lengths_B.tolist() == [3, 5]
    with pytest.raises(ValueError, match="a row of 5 tokens; allowed: at most length = 4"):
        make_batch([_document(5)], pad_id=0, length=4)
    with pytest.raises(ValueError, match="no sequences"):
        make_batch([], pad_id=0)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(4, 40), min_size=1, max_size=30))
def test_packing_keeps_every_document_whole(lengths: list[int]) -> None:
    batch = pack_batch([_document(n) for n in lengths], 40, pad_id=0)
    documents = []
    for row in range(batch.num_rows):
        real = slice(0, batch.lengths_B[row])
        ids, counts = np.unique(batch.segment_BT[row, real], return_counts=True)
        assert ids.tolist() == list(range(len(ids)))
        documents += counts.tolist()
        starts = np.flatnonzero(np.diff(batch.segment_BT[row, real], prepend=-1))
        assert (batch.tokens_BT[row, starts] == 100).all()
    assert Counter(documents) == Counter(lengths)


def test_text_is_packed_whole_and_trained_everywhere() -> None:
    (batch,) = training_batch(TEXT, BPE, STAGE, seed=0, step=0, batch=32)
    assert batch.tokens_BT.shape[1] == 320 and batch.packed
    assert batch.step_values == 0  # without attempts there is nothing for a value head to tell apart
    documents = 0
    for row in range(batch.num_rows):
        for segment in range(batch.segment_BT[row].max() + 1):
            where = (batch.segment_BT[row] == segment) & (np.arange(320) < batch.lengths_B[row])
            text = BPE.decode(batch.tokens_BT[row, where])
            assert text.startswith("Question: ") and text.count("Question: ") == 1
            assert text.endswith("<right>") and text.count("\n#### ") == 1
            assert batch.targets_mask_BT[row, where].tolist() == [False] + [True] * (int(where.sum()) - 1)
            documents += 1
    assert documents == 32


def test_an_epoch_of_text_holds_every_problem_once() -> None:
    task = build_task(Gsm8kConfig(path="sample", max_tokens=4096))
    size = task.size("train")
    assert size == 182
    seen: Counter[str] = Counter()
    for step in range(size // 13):
        (batch,) = training_batch([task], BPE, STAGE, seed=0, step=step, batch=13)
        for row in range(batch.num_rows):
            seen.update(BPE.decode(batch.tokens_BT[row, : batch.lengths_B[row]]).split("<right>")[:-1])
    assert len(seen) == size and set(seen.values()) == {1}


def test_workers_share_the_rows_of_packed_text() -> None:
    arguments = {"seed": 0, "step": 2, "batch": 16}
    (whole,) = training_batch(TEXT, BPE, STAGE, **arguments)
    parts = [training_batch(TEXT, BPE, STAGE, **arguments, rank=rank, world=2) for rank in range(2)]
    for name, joined in _joined(parts, 0).items():
        assert np.array_equal(joined, getattr(whole, name)), name


def test_problems_that_are_too_long_are_counted_and_replaced() -> None:
    task = build_task(Gsm8kConfig(path="sample", max_tokens=150))
    left_out, size = count_too_long(task, BPE)
    lengths = [len(make_sequence(p, p.solution, True, BPE).tokens) for p in _all(task)]
    assert left_out == sum(length > 150 for length in lengths) and 0 < left_out < size == 182
    (batch,) = training_batch([task], BPE, STAGE, seed=0, step=0, batch=40)
    assert batch.tokens_BT.shape[1] == 150 and (batch.tokens_BT == BPE.verdict_id(True)).sum() == 40
    assert count_too_long(GRAPHS[0], CLOSED) == (0, 0)
    with pytest.raises(ValueError, match="no train problem of task 'gsm8k' fits max_tokens = 10"):
        training_batch([build_task(Gsm8kConfig(path="sample", max_tokens=10))], BPE, STAGE, seed=0, step=0, batch=1)


def _all(task: Task) -> list:
    return [task.generate(0, "train", index) for index in range(task.size("train") or 0)]


def _with_attempts(tmp_path: Path) -> Task:
    records = []
    for problem in _all(TEXT[0]):
        question, answer = problem.data["question"], problem.data["answer"]
        records += [
            {"question": question, "attempt": f"A guess.\n#### {answer}", "correct": True},
            {"question": question, "attempt": "Another.\n#### 987654", "correct": False},
            {"question": question, "attempt": "On and on" * 2000, "correct": False},
        ]
    path = tmp_path / "attempts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return build_task(Gsm8kConfig(path="sample", attempts_path=str(path), max_tokens=320))


def test_recorded_attempts_train_the_value_heads(tmp_path: Path) -> None:
    task = _with_attempts(tmp_path)
    (batch,) = training_batch([task], BPE, STAGE, seed=0, step=0, batch=32)
    texts = [BPE.decode(batch.tokens_BT[row, : batch.lengths_B[row]]) for row in range(batch.num_rows)]
    assert sum(text.count("987654<wrong>") for text in texts) == sum(text.count("<wrong>") for text in texts) > 0
    for row in range(batch.num_rows):
        trained = batch.value_mask_BT[row]
        assert BPE.decode(batch.tokens_BT[row, trained & (batch.outcome_BT[row] == 0)]).count("987654") == texts[
            row
        ].count("<wrong>")
        assert not np.isin(batch.tokens_BT[row, trained], BPE.terminal_ids).any()


def test_text_windows_hold_the_documents_of_the_training_batch() -> None:
    (window,) = text_windows(TEXT, BPE, seed=0, step=0, batch=8, length=640)
    assert window.tokens_BT.shape[1] == 640
    (batch,) = training_batch(TEXT, BPE, STAGE, seed=0, step=0, batch=8)
    documents = [
        Counter(d for row in b.tokens_BT for d in BPE.decode(row).replace("<pad>", "").split("<right>"))
        for b in (window, batch)
    ]
    assert set(documents[0]) == set(documents[1])
    (short,) = text_windows(TEXT, BPE, seed=0, step=0, batch=8, length=32)
    assert short.tokens_BT.shape == (8, 32) and (short.lengths_B == 32).all()
    with pytest.raises(ValueError, match="no task has open text"):
        text_windows(GRAPHS, CLOSED, seed=0, step=0, batch=8)


def test_attempt_groups_share_prompts() -> None:
    groups = attempt_groups(GRAPHS, CLOSED, seed=0, step=0, batch=24, attempts=4)
    for task, group, prompt_length in zip(GRAPHS, groups, (31, 46), strict=True):
        assert group.prompts_BT.shape == (12, prompt_length) and group.answers_BAt.shape == (12, 4, 7)
        assert group.equal_prompts and group.answer_mask_BAt.all() and (group.answer_lengths_BA == 7).all()
        assert group.outcome_BA[:, 0].all() and 0 < group.outcome_BA[:, 1:].mean() < 0.7
        assert (group.step_problems, group.step_answer_tokens) == (24, 24 * 4 * 7)
        for row, problem in enumerate(group.problems):
            assert CLOSED.decode(group.prompts_BT[row]) == problem.prompt and split_of(problem.key) == "train"
            for answer, outcome in zip(group.answers_BAt[row], group.outcome_BA[row], strict=True):
                assert task.verify(problem, CLOSED.decode(answer)) == outcome
                assert answer[-1] == CLOSED.verdict_id(bool(outcome))


def test_one_attempt_takes_turns_with_the_solution() -> None:
    group, _ = attempt_groups(GRAPHS, CLOSED, seed=0, step=0, batch=200, attempts=1)
    assert group.outcome_BA[::2].all() and not group.outcome_BA[1::2].all()


def test_attempt_groups_of_workers_join_to_one() -> None:
    arguments = {"seed": 3, "step": 1, "batch": 10, "attempts": 3}
    whole = attempt_groups(GRAPHS, CLOSED, **arguments)
    parts = [attempt_groups(GRAPHS, CLOSED, **arguments, rank=rank, world=2) for rank in range(2)]
    for i, one in enumerate(whole):
        for name in ("prompts_BT", "prompt_lengths_B", "answers_BAt", "answer_mask_BAt", "outcome_BA"):
            assert np.array_equal(np.concatenate([getattr(part[i], name) for part in parts]), getattr(one, name))
        assert parts[0][i].problems + parts[1][i].problems == one.problems
        assert parts[0][i].step_problems == one.step_problems == 10


def test_prompts_of_different_lengths_are_sorted_and_given_unpadded(tmp_path: Path) -> None:
    task = _with_attempts(tmp_path)
    (group,) = attempt_groups([task], BPE, seed=0, step=0, batch=6, attempts=2)
    assert not group.equal_prompts and (np.diff(group.prompt_lengths_B) >= 0).all()
    assert [BPE.decode(prompt) for prompt in group.prompts] == [problem.prompt for problem in group.problems]
    for row, problem in enumerate(group.problems):
        for a in range(2):
            answer = BPE.decode(group.answers_BAt[row, a, group.answer_mask_BAt[row, a]])
            assert task.verify(problem, answer) == group.outcome_BA[row, a]


def test_a_bpe_writes_graphs_that_verify() -> None:
    (batch,) = training_batch(GRAPHS[:1], BPE, STAGE, seed=0, step=0, batch=6)
    for row in range(6):
        start, end = batch.answer_start_B[row], batch.lengths_B[row]
        problem = GRAPHS[0].generate(0, "train", row)
        assert BPE.decode(batch.tokens_BT[row, :start]) == problem.prompt
        assert GRAPHS[0].verify(problem, BPE.decode(batch.tokens_BT[row, start:end])) == batch.outcome_B[row]
