"""Shards hold what was written, however it came; what is damaged is named."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsm.data.shards import FORMAT, INDEX, dtype_for, open_shards, write_stream, write_whole

TOKENS = np.random.default_rng(0).integers(2, 300, size=1000)
TOKENS[[99, 500, 999]] = 1


def write(folder, pieces, size=300, vocab=300, **index):
    entries = write_stream(folder, "a", "train", pieces, eos_id=1, shard_tokens=size, dtype=dtype_for(vocab))
    about = {
        "format": FORMAT,
        "dtype": dtype_for(vocab).str,
        "tokenizer": {"eos_id": 1, "fingerprint": "f", "vocab_size": vocab},
        "shards": entries,
        **index,
    }
    (folder / INDEX).write_text(json.dumps(about))
    return entries


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=8), st.integers(90, 1200))
def test_the_shards_do_not_depend_on_how_the_tokens_came(tmp_path_factory, cuts, size):
    folder = tmp_path_factory.mktemp("shards")
    whole = write(folder, [TOKENS], size)
    assert write(folder, np.split(TOKENS, sorted(cuts)), size) == whole
    assert [entry["tokens"] for entry in whole[:-1]] == [size] * (len(whole) - 1)
    assert sum(entry["tokens"] for entry in whole) == 1000 and sum(entry["documents"] for entry in whole) == 3
    stream = open_shards(folder).streams("train")["a"]
    assert np.array_equal(stream.read(0, 2000), TOKENS)
    assert np.array_equal(stream.read(250, 400), TOKENS[250:650])
    assert stream.read(1000, 5).tolist() == []


def test_entries_hold_hashes_and_the_type_follows_the_vocabulary(tmp_path):
    entries = write(tmp_path, [TOKENS])
    for entry in entries:
        assert hashlib.sha256((tmp_path / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert (tmp_path / entries[0]["file"]).stat().st_size == 600
    large = TOKENS + 100_000
    write(tmp_path, [large], vocab=1 << 17)
    assert np.array_equal(open_shards(tmp_path).streams("train")["a"].read(0, 1000), large)


def test_a_changed_shard_is_named_with_both_hashes_and_a_short_or_missing_one_too(tmp_path):
    entries = write(tmp_path, [TOKENS])
    path = tmp_path / entries[1]["file"]
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a-train-00001.bin' is corrupt: .*{entries[1]['sha256'][:16]}"):
        open_shards(tmp_path)
    assert open_shards(tmp_path, verify=False)
    path.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=r"a-train-00001.bin' has 598 bytes; its index names 600"):
        open_shards(tmp_path, verify=False)
    path.unlink()
    with pytest.raises(ValueError, match=r"a-train-00001.bin' cannot be read: No such file"):
        open_shards(tmp_path)


def test_a_folder_without_a_whole_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"index.json' cannot be read: .*allowed: a folder that jobs.prepare_data"):
        open_shards(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index.json' is not JSON"):
        open_shards(tmp_path)
    write(tmp_path, [TOKENS], format=99)
    with pytest.raises(ValueError, match="is not an index of token shards; allowed: format 1"):
        open_shards(tmp_path)


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
