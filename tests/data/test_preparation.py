"""The same shards whatever the parts, the workers or the moments at which a run was stopped; broken input is named."""

import gzip
import hashlib
import itertools
import json
import os

import numpy as np
import pytest

from crsm.data import Tokenizer
from crsm.data import shards as shard_files
from crsm.data.preparation import SerialExecutor, prepare
from crsm.data.shards import open_shards
from crsm.data_config import DataConfig, load_data_config
from jobs.command import ROOT
from tests.data.corpora import edited, prose, tiny_config, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources: 30 documents with an exact and a near duplicate between them, one long, one contaminated."""
    folder = tmp_path_factory.mktemp("corpus")
    question = prose(99, words=20)
    first = [prose(seed) for seed in range(14)] + [prose(50, words=3000)]
    second = [prose(seed + 20) for seed in range(12)] + [prose(3), edited(prose(4), 0.02), prose(60) + " " + question]
    write_jsonl(folder / "a-0.jsonl", first[:8])
    (folder / "a-1.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "x" / "y.jsonl", first[8:]).read_bytes()))
    write_jsonl(folder / "b.jsonl", second)
    write_jsonl(folder / "questions.jsonl", [question], field="question")
    return folder


@pytest.fixture
def config(corpus):
    return make_config(corpus)


def make_config(corpus, **others):
    return tiny_config(
        {"name": "a", "path": str(corpus / "a-*"), "valid_share": 0.2, "licence": "CC0"},
        {"name": "b-2", "path": str(corpus / "b.jsonl"), "attribution": "Somebody"},
        **{
            "duplicates": {"section_chars": 2000},
            "decontamination": {"sets": [{"kind": "files", "name": "q", "path": str(corpus / "questions.jsonl")}]},
            **others,
        },
    )


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    report = prepare(make_config(corpus), folder, SerialExecutor())
    return folder, report


def contents(folder):
    """Hash of every file below a folder, by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_left_is_every_text_that_is_neither_a_duplicate_nor_contaminated(undisturbed):
    folder, report = undisturbed
    a, b = report["sources"]
    assert (a["counts"]["records"], b["counts"]["records"]) == (15, 15)
    assert a["duplicates"] == {"exact": 0, "near": 0} and b["duplicates"] == {"exact": 1, "near": 1}
    assert b["counts"]["contaminated"] == {"q": 1} and a["counts"]["contaminated"] == {}
    assert {entry["exact"] for entry in report["duplicates"]} == {True, False}
    assert [entry["repeats"].rsplit("/", 1)[1] for entry in report["duplicates"]] == ["a-0.jsonl:4", "a-0.jsonl:5"]

    shards = open_shards(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert shards.tokenizer_fingerprint == tokenizer.fingerprint
    texts = {"train": [], "valid": []}
    for split, found in texts.items():
        for stream in shards.streams(split).values():
            tokens = stream.read(0, len(stream))
            ends = np.flatnonzero(tokens == shards.eos_id)
            assert ends[-1] == len(tokens) - 1  # every document is closed
            found += [
                tokenizer.decode(piece[piece != shards.eos_id].tolist()) for piece in np.split(tokens, ends + 1)[:-1]
            ]
    expected = [prose(seed) for seed in range(14)] + [prose(50, words=3000)] + [prose(seed + 20) for seed in range(12)]
    assert sorted(texts["train"] + texts["valid"]) == sorted(expected)
    assert 0 < len(texts["valid"]) < 10 and not set(texts["valid"]) & set(expected[15:])
    sizes = {(s["name"], split): f["bytes"] for s in report["sources"] for split, f in s["splits"].items()}
    assert sum(sizes.values()) == sum(len(text.encode()) for text in expected)


def test_the_index_tells_everything_and_the_card_in_words(undisturbed):
    folder, report = undisturbed
    index = json.loads((folder / "index.json").read_text())
    assert [source["licence"] for source in index["sources"]] == ["CC0", "unknown"]
    assert index["identity"]["settings"]["duplicates"]["threshold"] == 0.7
    assert {entry["name"].rsplit("/", 1)[1]: entry["size"] for entry in index["identity"]["inputs"]}["b.jsonl"] > 0
    assert sum(entry["tokens"] for entry in index["shards"]) == sum(
        split["tokens"] for source in index["sources"] for split in source["splits"].values()
    )
    assert all(entry["tokens"] == 3000 for entry in index["shards"] if entry["file"].endswith("a-train-00000.bin"))
    card = (folder / "card.md").read_text()
    for word in ("CC0", "Somebody", "| q | 1 | 0 | 1 |", "5-word shingles"):
        assert word in card
    assert not (folder / "work").exists() and report["had_finished"] is False


def test_a_second_run_finds_it_finished_and_other_settings_are_refused(config, corpus, tmp_path):
    prepare(config, tmp_path / "out", SerialExecutor())
    before = contents(tmp_path / "out")
    assert prepare(config, tmp_path / "out", None)["had_finished"] is True
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"settings.seed = 0; now it is 1; allowed: .*--fresh"):
        prepare(make_config(corpus, seed=1), tmp_path / "out", SerialExecutor())


@pytest.mark.parametrize("part_mb", [0.001, 1.0])
def test_the_shards_do_not_depend_on_the_size_of_the_parts(corpus, undisturbed, tmp_path, part_mb):
    prepare(make_config(corpus, part_mb=part_mb), tmp_path, SerialExecutor())
    mine, other = contents(tmp_path), contents(undisturbed[0])
    assert {n: h for n, h in mine.items() if "shards" in n} == {n: h for n, h in other.items() if "shards" in n}


def test_the_order_in_which_parts_come_does_not_matter(config, undisturbed, tmp_path):
    class Backwards(SerialExecutor):
        def clean(self, plan, inputs, contamination):
            yield from super().clean(plan, inputs[::-1], contamination)

        def encode(self, plan, keys):
            yield from super().encode(plan, keys[::-1])

    prepare(config, tmp_path, Backwards())
    assert contents(tmp_path) == contents(undisturbed[0])


class Killed(BaseException):
    """Nobody catches it, like a kill."""


def kill_at(monkeypatch, moment):
    """Stops the process at its ``moment``-th renaming of a file: before it if odd, after it if even."""
    count = itertools.count()
    rename = os.replace

    def replace(source, target):
        now = next(count)
        if now == moment // 2:
            if moment % 2 == 0:
                rename(source, target)
            else:  # the half-written file stays, as after a kill
                monkeypatch.setattr(type(target), "unlink", lambda *_, **__: None)
            raise Killed
        rename(source, target)

    monkeypatch.setattr(shard_files.os, "replace", replace)
    return count


def test_killed_at_every_moment_and_restarted_the_shards_are_the_same_bit_for_bit(
    config, undisturbed, tmp_path, monkeypatch
):
    expected = contents(undisturbed[0])
    with monkeypatch.context() as patch:
        count = kill_at(patch, -2)
        prepare(config, tmp_path / "count", SerialExecutor())
        moments = 2 * (next(count) - 1)
    assert moments > 20
    for moment in range(0, moments, 3):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                prepare(config, folder, SerialExecutor())
        finished = (folder / "index.json").is_file()
        assert finished == (moment == moments - 2)
        assert prepare(config, folder, SerialExecutor())["had_finished"] is finished
        found = {name: digest for name, digest in contents(folder).items() if not name.endswith(".part")}
        assert found == expected, moment


def test_a_finished_input_is_not_read_again(config, tmp_path, monkeypatch):
    class Stops(SerialExecutor):
        def encode(self, plan, keys):
            raise Killed

    with pytest.raises(Killed):
        prepare(config, tmp_path, Stops())

    def unread(*_):
        raise AssertionError("an input was read again")

    monkeypatch.setattr("crsm.data.preparation.read_input", unread)
    assert prepare(config, tmp_path, SerialExecutor())["had_finished"] is False


def test_broken_lines_are_counted_and_named_up_to_the_limit(tmp_path):
    lines = [json.dumps({"text": prose(seed)}) for seed in range(6)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines[:3], "{broken", *lines[3:], "also broken", '{"text": null}']))
    report = prepare(tiny_config({"name": "a", "path": str(path)}), tmp_path / "out", SerialExecutor())
    counts = report["sources"][0]["counts"]
    assert (counts["records"], counts["broken"], counts["documents"]) == (9, 3, 6)
    assert counts["broken_named"][0].startswith(f"{path}:4 is not JSON")
    assert f"{path}:8" in (tmp_path / "out" / "card.md").read_text()
    with pytest.raises(ValueError, match=r"a.jsonl:8 is not JSON.*: broken record number 2 of .*sources.a.max_bad = 1"):
        prepare(tiny_config({"name": "a", "path": str(path), "max_bad": 1}), tmp_path / "strict", SerialExecutor())
    assert not (tmp_path / "strict" / "index.json").exists()


def test_verdicts_close_the_documents_that_have_one(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"question": "one", "answer": "yes", "ok": true}\n{"question": "two", "answer": "no", "ok": false}\n'
    )
    source = {"kind": "traces", "name": "t", "path": str(path), "correct_field": "ok"}
    config = tiny_config(source, duplicates={"enabled": False})
    prepare(config, tmp_path / "out", SerialExecutor())
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    stream = open_shards(tmp_path / "out").streams("train")["t"]
    tokens = stream.read(0, 1000).tolist()
    right, wrong, eos = tokenizer.verdict_id(True), tokenizer.verdict_id(False), tokenizer.eos_id
    assert tokens == [
        *tokenizer.encode("Question: one\nAnswer: yes"), right, eos,
        *tokenizer.encode("Question: two\nAnswer: no"), wrong, eos,
    ]  # fmt: skip


def test_an_existing_tokenizer_is_used_and_one_that_is_missing_is_named(config, corpus, undisturbed, tmp_path):
    path = undisturbed[0] / "tokenizer.json"
    prepare(make_config(corpus, tokenizer={"kind": "file", "path": str(path)}), tmp_path, SerialExecutor())
    mine, other = contents(tmp_path), contents(undisturbed[0])
    assert {n: h for n, h in mine.items() if "shards" in n} == {n: h for n, h in other.items() if "shards" in n}
    with pytest.raises(ValueError, match=r"none.json' cannot be read"):
        prepare(make_config(corpus, tokenizer={"kind": "file", "path": "none.json"}), tmp_path / "n", SerialExecutor())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, r"sources = \[\]; allowed: at least one"),
        ({"sources": [{"kind": "web", "name": "a"}]}, r"'web'.*'files', 'hub', 'task', 'traces'"),
        ({"sources": [{"kind": "files", "name": "../a", "path": "x"}]}, r"name = '../a'; allowed: letters"),
        (
            {"sources": [{"kind": "files", "name": "a", "path": "x"}] * 2},
            r"sources = \['a', 'a'\]; allowed: each name once",
        ),
        ({"duplicates": {"bands": 7}}, r"bands = 7; allowed: a divisor of permutations = 128"),
        ({"tokenizer": {"kind": "file"}}, r"path = None with kind = 'file'; allowed: a path for 'file'"),
        ({"colour": 1}, r"unknown key 'colour'; allowed: "),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(changes, message, tmp_path):
    tree = {"sources": [{"kind": "files", "name": "a", "path": "x"}], **changes}
    path = tmp_path / "wrong.yaml"
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message) as error:
        load_data_config(path)
    assert "\n" not in str(error.value)


def test_settings_are_overridden_by_the_name_of_a_source():
    config = load_data_config(ROOT / "configs/data/text.yaml", ["sources.books.path=other"], seed=3)
    assert config.sources[0].path == "other" and config.seed == 3
    assert isinstance(config, DataConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_names_itself(path):
    assert load_data_config(path).name == path.stem
