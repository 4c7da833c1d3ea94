"""Files of every kind give the same documents; what is broken is named; what cannot be read is an error."""

import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crsm.config import PathStarConfig
from crsm.data.sources import Broken, Document, evaluation_texts, find_files, list_inputs, read_input
from crsm.data_config import (
    EvaluationFiles,
    EvaluationHub,
    EvaluationTask,
    FilesSource,
    HubSource,
    TaskSource,
    TracesSource,
)
from crsm.tasks import build_task

TEXTS = ["first\ndocument", "zweites Stück", "third"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd(data):
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def read(source):
    return [record for given in list_inputs(source) for record in read_input(source, given)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:20], mtime=0) + gzip.compress(LINES[20:], mtime=0)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.jsonl.zst", zstd(LINES[:20]) + zstd(LINES[20:])),
        ("a.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
    ],
)
def test_every_format_gives_the_same_texts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    records = read(FilesSource(name="a", path=str(tmp_path / name)))
    assert [record.text for record in records] == TEXTS
    assert all(name in record.origin for record in records)


def test_parquet_and_plain_text(tmp_path):
    pq.write_table(pa.table({"content": TEXTS, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    source = FilesSource(name="a", path=str(tmp_path / "a.parquet"), field="content")
    assert [record.text for record in read(source)] == TEXTS
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "3.md.gz").write_bytes(gzip.compress(b"# four"))
    records = read(FilesSource(name="a", path=str(tmp_path), format="auto"))
    assert {record.text for record in records if isinstance(record, Document)} >= {*TEXTS, "# four"}


def test_a_line_that_is_not_json_and_a_record_without_text_are_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b"{not json\n\n[1]\n" + b'{"other": 1}\n{"text": 3}\n' + b'{"text": "\xff"}\n' + LINES)
    records = read(FilesSource(name="a", path=str(path)))
    broken = [record for record in records if isinstance(record, Broken)]
    assert [record.text for record in records if isinstance(record, Document)] == TEXTS * 2
    assert [record.origin.rsplit(":", 1)[1] for record in broken] == ["4", "6", "7", "8", "9"]
    assert [record.reason.split(":")[0] for record in broken] == [
        "is not JSON",
        "holds a list",
        "text = 'None' is no text",
        "text = '3' is no text",
        "is not JSON",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-10], "cannot be decompressed, or is cut short"),
        ("a.jsonl.gz", b"not gzip", "cannot be decompressed"),
        ("a.jsonl.zst", zstd(LINES)[:-4], "cannot be decompressed, or is cut short"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("a.parquet", b"no parquet", "cannot be read as parquet"),
        ("a.json", b"{}", "holds a dict; allowed: an array of objects"),
        ("a.json", b"[", "is not JSON"),
        ("a.doc", b"", "format = 'auto' does not know this name; allowed: .jsonl"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_the_files_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(FilesSource(name="a", path=str(tmp_path / name)))
    assert name in str(error.value)


def test_a_missing_file_and_an_empty_folder_are_named_with_their_setting(tmp_path):
    with pytest.raises(ValueError, match=r"sources.books.path = '.*none.jsonl': no such file"):
        list_inputs(FilesSource(name="books", path=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match=r"sources.books.path = '.*' holds no files to read"):
        list_inputs(FilesSource(name="books", path=str(tmp_path)))


def test_inputs_are_in_the_order_of_their_names_with_size_and_hash(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(LINES)
    inputs = list_inputs(FilesSource(name="x", path=str(tmp_path / "*.jsonl")))
    assert [given.name for given in inputs] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert all(given.size == len(LINES) and len(given.sha256 or "") == 64 for given in inputs)
    assert [path.name for path in find_files(str(tmp_path), "auto", "x")] == ["a.jsonl", "b.jsonl", "c.txt"]


def test_a_task_gives_its_solutions_and_attempts_with_their_verdicts():
    config = PathStarConfig()
    source = TaskSource(name="star", task=config, documents=60, solution_share=0.5)
    documents = read(source)
    task = build_task(config)
    assert len(documents) == 60 and len({document.text for document in documents}) == 60
    for index, document in enumerate(documents):
        problem = task.generate(0, "train", index)
        answer = document.text.removeprefix(problem.prompt)
        assert answer != document.text and task.verify(problem, answer) == document.verdict
        assert document.verdict or index % 2 == 0
    assert 30 <= sum(bool(document.verdict) for document in documents) < 60


def test_traces_are_written_by_the_template_with_their_verdict(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"q": "1+1?", "a": " 2", "ok": true}\n{"q": "2+2?", "a": "5", "ok": false}\n{"q": "x", "a": "y"}\n'
    )
    source = TracesSource(
        name="t", path=str(path), prompt_field="q", answer_field="a", correct_field="ok", template="{prompt} {answer}"
    )
    first, second, third = read(source)
    assert (first.text, first.verdict) == ("1+1? 2", True)
    assert (second.text, second.verdict) == ("2+2? 5", False)
    assert isinstance(third, Broken) and "ok = 'None' is neither true nor false" in third.reason


def fake_hub(monkeypatch, records):
    asked = []

    def load_dataset(name, subset, *, split, revision, streaming):
        asked.append((name, subset, split, revision, streaming))
        if name == "gone":
            raise ConnectionError("no\nnetwork")
        return iter(records)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_of_the_hub_is_streamed_as_far_as_asked(monkeypatch):
    endless = ({"text": str(number)} for number in range(10**9))
    asked = fake_hub(monkeypatch, endless)
    source = HubSource(name="web", dataset="some/web", subset="en", revision="abc", documents=3)
    assert [record.text for record in read(source)] == ["0", "1", "2"]
    assert asked == [("some/web", "en", "train", "abc", True)]


def test_a_hub_that_cannot_be_reached_or_is_not_installed_is_one_line(monkeypatch):
    fake_hub(monkeypatch, [])
    with pytest.raises(ValueError, match="'gone' cannot be read from the hub: no network"):
        read(HubSource(name="web", dataset="gone"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the extra `hub` \(pip install 'crsm\[hub\]'\)"):
        read(HubSource(name="web", dataset="some/web"))


def test_evaluation_sets_come_from_files_tasks_and_the_hub(tmp_path, monkeypatch):
    path = tmp_path / "e.jsonl"
    path.write_text('{"question": "what", "answer": "that"}\n')
    entry = EvaluationFiles(name="e", path=str(path), fields=("question", "answer"))
    assert list(evaluation_texts(entry)) == ["what\n\nthat"]
    with pytest.raises(ValueError, match=r"e.jsonl:1: hint = 'None'; allowed: the fields"):
        list(evaluation_texts(EvaluationFiles(name="e", path=str(path), fields=("hint",))))
    fake_hub(monkeypatch, [{"question": "who"}])
    assert list(evaluation_texts(EvaluationHub(name="h", dataset="some/eval"))) == ["who"]
    texts = list(evaluation_texts(EvaluationTask(name="t", task=PathStarConfig(), splits=("test",), problems=3)))
    task = build_task(PathStarConfig())
    assert texts == [f"{p.prompt} {p.solution}" for p in (task.generate(0, "test", i) for i in range(3))]
