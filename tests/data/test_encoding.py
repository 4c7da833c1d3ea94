"""Encoding by words gives the very tokens of encoding whole texts, for this project's tokenizers and foreign ones."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from crsm.data import Tokenizer, encoding
from crsm.data.encoding import TextEncoder
from tests.data.corpora import prose

TEXTS = [prose(seed) for seed in range(5)] + [
    "don't 'tis we've\n'twas 12,345.67  x_y  (“quoted”) naïve ½ ²\n\n\n end  "
]
OWN = Tokenizer.train_bpe(TEXTS, 400)


def foreign_file(path, pre_tokenizer=None, normalizer=None):
    """A tokenizer like that of GPT-NeoX: its own end of text at 0, runs of spaces as added tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizer or normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    path.write_text(backend.to_str())
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return Tokenizer.adopt(foreign_file(tmp_path_factory.mktemp("foreign") / "tokenizer.json"))


ALPHABET = st.sampled_from(list("ab'sdtlmve12,.-_\"(“’é½²_ \n\t\r\u00a0\u3000"))


@settings(max_examples=400)
@example("\n'tis the 'twas'd x's' 's\"'t")
@example("  a   b    'll_'re")
@given(st.text(ALPHABET, min_size=1, max_size=40))
def test_tokens_by_words_are_those_of_the_whole_text(foreign, text):
    for tokenizer in (OWN, foreign):
        encoder = TextEncoder(tokenizer)
        assert encoder.cuts_words
        for _ in range(2):  # new words, and known ones
            assert encoder.encode(text).tolist() == tokenizer.encode(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_any_unicode_is_written_and_read_back(text):
    encoder = TextEncoder(OWN)
    assert OWN.decode(encoder.encode(text).tolist()) == text
    assert OWN.byte_counts[encoder.encode(text)].sum() == len(text.encode())


def test_a_full_table_begins_anew(monkeypatch):
    monkeypatch.setattr(encoding, "_MAX_KNOWN", 20)
    encoder = TextEncoder(OWN)
    for text in TEXTS * 2:
        assert encoder.encode(text).tolist() == OWN.encode(text)
    assert encoder.encode("").tolist() == []


def test_a_tokenizer_that_splits_otherwise_encodes_whole_texts(tmp_path):
    newline = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"[^\s]+[\r\n]*|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = Tokenizer.adopt(foreign_file(tmp_path / "t.json", newline))
    encoder = TextEncoder(tokenizer)
    assert not encoder.cuts_words
    assert [encoder.encode(text).tolist() for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    lower = Tokenizer.adopt(foreign_file(tmp_path / "l.json", normalizer=normalizers.Lowercase()))
    assert not TextEncoder(lower).cuts_words


def test_a_foreign_tokenizer_keeps_its_ids_and_gets_what_it_lacks_after_them(foreign, tmp_path):
    path = foreign_file(tmp_path / "tokenizer.json")
    before = tokenizers.Tokenizer.from_file(str(path))
    size = before.get_vocab_size()
    assert foreign.vocab_size == size + 3 and foreign.eos_id == 0
    assert {foreign.pad_id, foreign.verdict_id(True), foreign.verdict_id(False)} == {size, size + 1, size + 2}
    text = "a    b\n  c don't"
    assert foreign.encode(text) == before.encode(text).ids
    assert foreign.decode(foreign.encode(text)) == text
    assert 0 not in foreign.encode("<|endoftext|>")  # a user's text cannot end a document
    again = Tokenizer.from_json(foreign.to_json())
    assert again.fingerprint == foreign.fingerprint != OWN.fingerprint
    assert (again.eos_id, again.pad_id) == (foreign.eos_id, foreign.pad_id)


def test_what_is_adopted_must_be_a_byte_level_bpe_with_an_end_of_text(tmp_path):
    OWN.save(tmp_path / "own.json")
    assert Tokenizer.adopt(tmp_path / "own.json").fingerprint == OWN.fingerprint
    tree = json.loads(foreign_file(tmp_path / "t.json").read_text())
    tree["added_tokens"] = []
    tree["model"]["vocab"] = {f"t{i}": i for i in range(5)}
    tree["model"]["merges"] = []
    (tmp_path / "none.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"none.json' has '<pad>' at id None; allowed: id 0"):
        Tokenizer.adopt(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"missing.json' cannot be read"):
        Tokenizer.adopt(tmp_path / "missing.json")


def test_special_tokens_have_no_bytes():
    counts = OWN.byte_counts
    assert counts.shape == (OWN.vocab_size,) and counts.dtype == np.int64
    assert all(counts[token] == 0 for token in (OWN.pad_id, *OWN.terminal_ids))
