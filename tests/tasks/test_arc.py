"""AI2 ARC: its files in all their forms, the place of the right option, and everything that a file can have wrong.

All records are made up: the data set's licence would come with it.
"""

import gzip
import json
import sys

import numpy as np
import pytest

from crsm.config import ArcConfig
from crsm.tasks import build_task, problems
from crsm.tasks.arc import MultipleChoice

STAR = {
    "id": "made_1",
    "question": "Which of these gives off light of its own?",
    "choices": {"text": ["a stone", "a star", "a spoon"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
FIVE = {
    "id": "made_2",
    "question": " What is wet? ",
    "choices": {"text": ["sand", "salt", "wood", "glass", "rain"], "label": ["A", "B", "C", "D", "E"]},
    "answerKey": "E",
}
SHUFFLED = {
    "id": "made_3",
    "question": "What is cold?",
    "choices": {"text": ["fire", "ice"], "label": ["D", "A"]},
    "answerKey": "A",
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def arc(path, name="arc_easy"):
    return build_task(ArcConfig(name=name, path=str(path)))


def only(task, split="test"):
    (problem,) = problems(task, 0, split, 10)
    return problem


def test_the_prompt_and_the_solution_are_those_of_the_harness(tmp_path):
    problem = only(arc(write(tmp_path / "some.jsonl", STAR)))
    assert problem.prompt == "Question: Which of these gives off light of its own?\nAnswer:"
    assert problem.solution == " a star"


@pytest.mark.parametrize(("record", "place"), [(STAR, 1), (FIVE, 4), (SHUFFLED, 1)])
def test_the_right_option_is_the_place_of_its_label(tmp_path, record, place):
    task = arc(write(tmp_path / "some.jsonl", record))
    texts, right = task.choices(only(task))
    assert isinstance(task, MultipleChoice)
    assert (texts, right) == (tuple(record["choices"]["text"]), place)


def test_a_folder_holds_the_official_splits_under_either_name(tmp_path):
    write(tmp_path / "ARC-Easy-train.jsonl", STAR)
    write(tmp_path / "ARC-Easy-Dev.jsonl", FIVE)
    write(tmp_path / "ARC-Challenge-Test.jsonl", SHUFFLED)
    easy, challenge = arc(tmp_path), arc(tmp_path, "arc_challenge")
    assert [easy.size(split) for split in ("train", "valid", "test")] == [1, 1, 0]
    assert [challenge.size(split) for split in ("train", "valid", "test")] == [0, 0, 1]
    assert only(easy, "train").split == "train" and only(easy, "valid").split == "valid"
    with pytest.raises(ValueError, match="task 'arc_easy' has no test problems"):
        problems(easy, 0, "test", 1)


def test_a_file_is_the_test_split_packed_or_not(tmp_path):
    packed = tmp_path / "some.jsonl.gz"
    packed.write_bytes(gzip.compress((json.dumps(STAR) + "\n\n" + json.dumps(FIVE)).encode()))
    task = arc(packed)
    assert [task.size(split) for split in ("train", "valid", "test")] == [0, 0, 2]


def test_records_as_ai2_publishes_them_are_the_same_problems(tmp_path):
    options = [{"text": t, "label": k} for t, k in zip(FIVE["choices"]["text"], "ABCDE", strict=True)]
    theirs = {"id": "made_2", "question": {"stem": FIVE["question"], "choices": options}, "answerKey": "E"}
    assert only(arc(write(tmp_path / "a.jsonl", theirs))) == only(arc(write(tmp_path / "b.jsonl", FIVE)))


def test_a_question_counts_once_and_again_with_other_options(tmp_path):
    other = STAR | {"choices": {"text": ["a lamp", "a star", "a spoon"], "label": ["1", "2", "3"]}}
    task = arc(write(tmp_path / "some.jsonl", STAR, STAR | {"id": "again"}, other))
    assert task.size("test") == 2


def test_an_answer_is_right_if_it_is_the_options_text(tmp_path):
    task = arc(write(tmp_path / "some.jsonl", STAR))
    problem = only(task)
    for right in (" a star", "A  STAR\n", "a star<right>", " a star<eos> and more"):
        assert task.verify(problem, right)
    for wrong in ("a stone", "2", "", "a star, no: a spoon", "__import__('os').system('true')", "\x00"):
        assert not task.verify(problem, wrong)


def test_attempts_are_options_with_their_outcome(tmp_path):
    task = arc(write(tmp_path / "some.jsonl", STAR))
    problem = only(task)
    drawn = task.attempts(problem, np.random.default_rng(0), 40)
    assert {attempt.text for attempt in drawn} == {" a stone", " a star", " a spoon"}
    assert all(attempt.correct == task.verify(problem, attempt.text) for attempt in drawn)


BROKEN = [
    ("nonsense", "line 1 is not JSON"),
    ("[1]", "line 1 holds a list; allowed: an object"),
    ({"question": "x = <<1+1=2>>", "answer": "#### 2"}, "line 1: choices = 'None'; allowed: a dict"),
    (STAR | {"question": "  "}, "line 1: question is empty"),
    (STAR | {"question": 3}, "line 1: question = '3'; allowed: a str"),
    (STAR | {"answerKey": "B"}, r"line 1: answerKey = 'B'; allowed: one of choices.label, \['1', '2', '3'\]"),
    (STAR | {"answerKey": 2}, "line 1: answerKey = '2'; allowed: a str"),
    (STAR | {"choices": {"text": ["a", "b"], "label": ["1"]}}, "choices.label = .* one label each, no two alike"),
    (STAR | {"choices": {"text": ["a", "b"], "label": ["1", "1"]}}, "choices.label = .* one label each, no two alike"),
    (STAR | {"choices": {"text": ["a", " "], "label": ["1", "2"]}}, "line 1: choices.text = "),
    (STAR | {"choices": {"text": ["a", 7], "label": ["1", "2"]}}, "line 1: choices.text holds '7'; allowed: texts"),
    (STAR | {"choices": {"text": ["a"], "label": ["1"]}}, "at least two, none of them empty"),
    ({"question": {"stem": "x", "choices": ["a", "b"]}, "answerKey": "A"}, "choices.text holds 'None'"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_a_file_of_another_form_is_named_with_line_and_field(tmp_path, record, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"broken\.jsonl' {message}|broken\.jsonl' line 1: .*{message}"):
        arc(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl' cannot be read: No such file"):
        arc(tmp_path / "nothing.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz' is not a whole gzip file"):
        arc(tmp_path / "cut.jsonl.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no problems"):
        arc(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"none of the files of ARC-Easy; allowed: any of ARC-Easy-train\.jsonl"):
        arc(tmp_path)


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"tasks\.arc_challenge\.path = None loads allenai/ai2_arc .* extra `hub`"):
        build_task(ArcConfig(name="arc_challenge"))


def test_the_hub_gives_all_splits_of_the_subset(monkeypatch):
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(name, subset, split):
            asked.append((name, subset, split))
            return [{"train": STAR, "validation": FIVE, "test": SHUFFLED}[split]]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    task = build_task(ArcConfig(name="arc_challenge"))
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", split) for split in ("train", "validation", "test")]
    assert [task.size(split) for split in ("train", "valid", "test")] == [1, 1, 1]
