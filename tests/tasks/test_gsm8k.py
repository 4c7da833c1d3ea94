"""GSM8K: reading, normalising, judging; hostile answers and broken files."""

from __future__ import annotations

import json
import pickle
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crsm.config import Gsm8kConfig
from crsm.tasks import build_task, problems, split_of
from crsm.tasks.gsm8k import SAMPLE_PATH, final_number

SAMPLE = build_task(Gsm8kConfig(path="sample"))
SPLITS = ("train", "valid", "test")


def _write(path: Path, records: list[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_the_sample_ships_200_problems_whose_solutions_verify() -> None:
    lines = SAMPLE_PATH.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200 and all(set(json.loads(line)) == {"question", "answer"} for line in lines)
    assert "MIT License" in SAMPLE_PATH.with_suffix(".LICENSE").read_text(encoding="utf-8")
    known = [p for split in SPLITS for p in problems(SAMPLE, 0, split, 1000)]
    assert len(known) == 200 == sum(SAMPLE.size(split) or 0 for split in SPLITS)
    for problem in known:
        assert problem.split == split_of(problem.key)
        assert problem.prompt.startswith("Question: ") and problem.prompt.endswith("\nAnswer:")
        assert problem.solution.startswith(" ") and "\n#### " in problem.solution
        for verdict in ("", "\nyes", "<right>", "<wrong>", "<eos><pad>"):
            assert SAMPLE.verify(problem, problem.solution + verdict)
        assert not SAMPLE.verify(problem, f"#### {Decimal(problem.data['answer']) + 1}")


def test_every_epoch_is_a_shuffle_of_the_split() -> None:
    size = SAMPLE.size("train")
    assert size is not None
    epochs = [[SAMPLE.generate(5, "train", e * size + i).key for i in range(size)] for e in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == size
    assert epochs[0] != [SAMPLE.generate(6, "train", i).key for i in range(size)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("work\n#### $1,234.50.", "1234.5"),
        ("####-3", "-3"),
        ("#### -$3", "-3"),
        ("#### 72.0", "72"),
        ("#### .5", "0.5"),
        ("#### 7\nQuestion: next? #### 9", "7"),
        ("#### 007<right>", "7"),
    ],
)
def test_numbers_are_normalised(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "", "72", "####", "#### ", "#### seventy", "#### 9**9**9", "#### 36*2", "#### 72 apples", "#### ７２",
        "#### ٧٢", "#### 7²", "#### 1e9999999", "#### nan", "#### Infinity", "#### 0x48", "#### 7_2",
        "#### __import__('os')",
        "#### " + "9" * 1_000_000, "#### " + "9," * 1_000_000, "####" * 500_000, "#### 7 2", "#### --72", "#### 72..",
        "#### ,72", "###\n# 72", "\0#### \x0072",
    ],
)  # fmt: skip
def test_hostile_answers_are_no_number_and_are_refused_at_once(text: str) -> None:
    problem = SAMPLE.generate(0, "test", 0)
    start = time.perf_counter()
    assert final_number(text) is None and not SAMPLE.verify(problem, text)
    assert time.perf_counter() - start < 0.5


@given(st.text())
def test_any_text_has_a_verdict(text: str) -> None:
    assert SAMPLE.verify(SAMPLE.generate(0, "test", 0), "#### " + text) in (True, False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q?", "answ', r"bad.jsonl' line 3 is not JSON"),
        ("[1]", r"bad.jsonl' line 3 holds a list; allowed: an object"),
        ('{"question": "Q?"}', r"bad.jsonl' line 3: answer = 'None'; allowed: a str"),
        ('{"question": " ", "answer": "#### 1"}', r"bad.jsonl' line 3: the question is empty"),
        ('{"question": "Q?", "answer": "no mark"}', r"bad.jsonl' line 3: the answer ends in 'no mark'; allowed"),
        ("[" * 100_000, r"bad.jsonl' line 3 is not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"question": "Q", "answer": "A\\n#### 1"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        build_task(Gsm8kConfig(path=str(path)))


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.jsonl' cannot be read: No such file"):
        build_task(Gsm8kConfig(path=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(ValueError, match="holds no problems"):
        build_task(Gsm8kConfig(path=_write(tmp_path / "empty.jsonl", [])))
    (tmp_path / "binary.jsonl").write_bytes(b'{"question": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"binary.jsonl' line 1 is not JSON"):
        build_task(Gsm8kConfig(path=str(tmp_path / "binary.jsonl")))


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of a missing package looks like
    with pytest.raises(ValueError, match=r"needs the extra `hub`.*allowed: tasks.gsm8k.path = a local jsonl"):
        build_task(Gsm8kConfig())


def test_attempts_are_the_recorded_ones(tmp_path: Path) -> None:
    problem = SAMPLE.generate(0, "train", 0)
    question, answer = problem.data["question"], problem.data["answer"]
    path = _write(
        tmp_path / "attempts.jsonl",
        [
            {"question": question, "attempt": f" Right.\n#### {answer}<right>", "correct": True},
            {"question": f"  {question}\n", "attempt": "Wrong.\n#### 123456", "correct": False},
            {"question": "Another data set's?", "attempt": "#### 1", "correct": True},
        ],
    )
    task = build_task(Gsm8kConfig(path="sample", attempts_path=path))
    drawn = task.attempts(problem, np.random.default_rng(0), 50)
    assert len(drawn) == 50 and task.has_attempts
    assert {(a.text, a.correct) for a in drawn} == {
        (f" Right.\n#### {answer}", True),
        (" Wrong.\n#### 123456", False),
    }
    assert all(task.verify(problem, a.text) == a.correct for a in drawn)
    assert task.attempts(task.generate(0, "train", 1), np.random.default_rng(0), 5) == []
    assert not SAMPLE.has_attempts and SAMPLE.attempts(problem, np.random.default_rng(0), 5) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"attempt": "#### 123456", "correct": True}, r"line 1: correct = True contradicts the verifier"),
        ({"attempt": "#### 1", "correct": 1}, r"line 1: correct = '1'; allowed: a bool"),
        ({"attempt": " \n", "correct": False}, r"line 1: the attempt is empty"),
    ],
)
def test_a_wrong_record_of_an_attempt_is_refused(tmp_path: Path, record: dict[str, object], message: str) -> None:
    question = SAMPLE.generate(0, "train", 0).data["question"]
    path = _write(tmp_path / "attempts.jsonl", [{"question": question, **record}])
    with pytest.raises(ValueError, match=message):
        build_task(Gsm8kConfig(path="sample", attempts_path=path))


def test_problems_with_a_false_mark_can_be_left_out(tmp_path: Path) -> None:
    answers = ("<<1+1=2>>2\n#### 2", "<<1+1=3>>3\n#### 3", "<<7//2=3>>\n#### 3", "two\n#### 2")
    path = _write(tmp_path / "marks.jsonl", [{"question": f"{i}?", "answer": a} for i, a in enumerate(answers)])
    for true_marks, count in ((False, 4), (True, 2)):
        task = build_task(Gsm8kConfig(path=path, true_marks=true_marks))
        assert sum(task.size(split) or 0 for split in SPLITS) == count


def test_repeated_questions_count_once(tmp_path: Path) -> None:
    path = _write(tmp_path / "twice.jsonl", [{"question": q, "answer": "#### 1"} for q in ("A  b?", "a b? ", "c?")])
    task = build_task(Gsm8kConfig(path=path))
    assert sum(task.size(split) or 0 for split in SPLITS) == 2


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    task = build_task(Gsm8kConfig(path=_write(tmp_path / "one.jsonl", [{"question": "Q?", "answer": "#### 1"}])))
    empty = next(split for split in SPLITS if not task.size(split))
    with pytest.raises(ValueError, match=f"no {empty} problems"):
        task.generate(0, empty, 0)
    with pytest.raises(ValueError, match=f"no {empty} problems"):
        problems(task, 0, empty, 3)


def test_a_task_can_be_sent_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(SAMPLE))
    assert copy.generate(3, "train", 4) == SAMPLE.generate(3, "train", 4)
