"""Rows of text are functions of seed and step: every window once an epoch, and the same rows for any workers."""

import dataclasses

import numpy as np
import pytest

from crsm.config import BackboneStageConfig, PathStarConfig, TokenizerConfig
from crsm.data import Tokenizer, training_batch
from crsm.data.loader import TextLoader, text_batch
from crsm.data.mixture import build_mixture
from crsm.data.preparation import SerialExecutor, prepare
from crsm.data.sequences import TEXT
from crsm.data.tokenizer import build_tokenizer
from crsm.tasks import build_tasks
from crsm.training_config import TextConfig
from tests.data.corpora import prose, tiny_config, write_jsonl

LENGTH = 64
TASKS = build_tasks([PathStarConfig(arms=2, length=3, labels=12)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    write_jsonl(place / "a.jsonl", [prose(seed) for seed in range(20)])
    write_jsonl(place / "b.jsonl", [prose(seed, words=40) for seed in range(100, 140)])
    sources = [{"name": name, "path": str(place / f"{name}.jsonl"), "valid_share": 0.2} for name in ("a", "b")]
    prepare(tiny_config(*sources), place / "out", SerialExecutor())
    return place / "out"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder / "tokenizer.json")


def load(folder, tokenizer, seed=0, **others):
    return TextLoader(TextConfig(shards=str(folder), length=LENGTH, **others), tokenizer, seed)


def test_a_batch_resets_after_each_end_of_text_and_never_asks_for_a_first_token():
    rows = [np.array([5, 6, 1, 7, 8]), np.array([1, 9, 1])]
    batch = text_batch(rows, 5, eos_id=1, pad_id=0)
    assert batch.tokens_BT.tolist() == [[5, 6, 1, 7, 8], [1, 9, 1, 0, 0]]
    assert batch.segment_BT.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert batch.targets_mask_BT.astype(int).tolist() == [[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert not batch.value_mask_BT.any() and (batch.step_targets, batch.step_values) == (4, 0)
    assert (batch.task_index_B == TEXT).all()


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(folder, tokenizer):
    loader = load(folder, tokenizer)
    windows = loader.windows("a")
    stream = loader.shards.streams("train")["a"]
    whole = sorted(stream.read(i * LENGTH, LENGTH).tolist() for i in range(windows))
    epochs = []
    for epoch in range(2):
        batch = loader.batch({"a": windows, "b": 0}, {"a": epoch * windows, "b": 0})
        rows = [row[:n].tolist() for row, n in zip(batch.tokens_BT, batch.lengths_B, strict=True)]
        assert sorted(rows) == whole
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    other = load(folder, tokenizer, seed=1).batch({"a": windows, "b": 0}, {"a": 0, "b": 0})
    assert [row[:n].tolist() for row, n in zip(other.tokens_BT, other.lengths_B, strict=True)] != epochs[0]


def step_parts(folder, tokenizer, step, world, batch=11):
    settings = BackboneStageConfig.model_validate({"steps": 40, "text": {"shards": str(folder), "length": LENGTH}})
    loader = TextLoader(settings.text, tokenizer, 0)
    mixture = build_mixture(settings, {"path_star": 1.0}, loader.tokens(), rows=batch, steps=40)
    return [
        training_batch(
            TASKS,
            tokenizer,
            settings,
            seed=0,
            step=step,
            batch=batch,
            rank=rank,
            world=world,
            mixture=mixture,
            text=loader,
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_workers_share_the_rows_that_one_worker_sees(folder, tokenizer, world):
    for step in (0, 7):
        (alone,) = step_parts(folder, tokenizer, step, 1)
        parts = step_parts(folder, tokenizer, step, world)
        assert sum(batch.num_rows for batch in alone) == 11
        assert [int(batch.task_index_B[0]) for batch in alone] == [0, TEXT]
        for index, whole in zip((0, TEXT), alone, strict=True):
            mine = [batch for part in parts for batch in part if batch.task_index_B[0] == index]
            for field in dataclasses.fields(whole):
                if not field.name.startswith("step_"):
                    joined = np.concatenate([getattr(batch, field.name) for batch in mine])
                    assert np.array_equal(joined, getattr(whole, field.name)), field.name
        totals = {(batch.step_targets, batch.step_values) for part in parts for batch in part}
        assert totals == {(sum(b.targets_mask_BT.sum() for b in alone), sum(b.value_mask_BT.sum() for b in alone))}


def test_steps_differ_and_repeat_exactly(folder, tokenizer):
    (first,), (again,), (other,) = (step_parts(folder, tokenizer, step, 1) for step in (3, 3, 4))
    assert np.array_equal(first[1].tokens_BT, again[1].tokens_BT)
    assert first[1].tokens_BT.shape != other[1].tokens_BT.shape or not np.array_equal(
        first[1].tokens_BT, other[1].tokens_BT
    )


def test_held_out_windows_are_spread_over_the_text_and_none_of_them_is_trained_on(folder, tokenizer):
    loader = load(folder, tokenizer)
    assert set(loader.tokens("valid")) == {"a", "b"}
    parts = list(loader.held_out("a", 1000, chunk=2))
    tokens = np.concatenate([row[:n] for part in parts for row, n in zip(part.tokens_BT, part.lengths_B, strict=True)])
    stream = loader.shards.streams("valid")["a"]
    assert np.array_equal(tokens, stream.read(0, len(stream)))
    assert sum(part.num_rows for part in loader.held_out("a", 2, chunk=8)) == 2


def test_another_tokenizer_than_the_models_is_refused_with_what_to_do(folder, tokenizer):
    other = Tokenizer.train_bpe([prose(1)], 290)
    with pytest.raises(
        ValueError, match=r"another tokenizer .*the model's has 290\); allowed: tokenizer: \{kind: file, path"
    ):
        load(folder, other)
    closed = build_tokenizer(TokenizerConfig(), TASKS)
    with pytest.raises(ValueError, match="another tokenizer than the model's wrote them"):
        load(folder, closed)
    assert load(folder, build_tokenizer(TokenizerConfig(kind="file", path=str(folder / "tokenizer.json")), TASKS))


def test_shards_without_training_text_are_refused(tmp_path, folder, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [prose(0), prose(1)])
    source = {"name": "a", "path": str(tmp_path / "a.jsonl"), "split": "valid"}
    own = {"kind": "file", "path": str(folder / "tokenizer.json")}
    prepare(tiny_config(source, tokenizer=own), tmp_path / "out", SerialExecutor())
    with pytest.raises(ValueError, match="hold no training text; allowed: a source of it"):
        load(tmp_path / "out", tokenizer)
