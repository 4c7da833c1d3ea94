"""Tokenizers: round trips, refusals, files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from crsm.config import Gsm8kConfig, PathStarConfig, TokenizerConfig, TreePathConfig
from crsm.data import Tokenizer, build_tokenizer
from crsm.tasks import build_tasks

GRAPHS = build_tasks([PathStarConfig(), TreePathConfig()])
CLOSED = build_tokenizer(TokenizerConfig(), GRAPHS)
BPE = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=600), build_tasks([Gsm8kConfig(path="sample")]))

both = pytest.mark.parametrize("tokenizer", [CLOSED, BPE], ids=["closed", "bpe"])


def test_the_closed_vocabulary_is_specials_structure_verdicts_preamble_labels() -> None:
    tokens = [CLOSED.token(i) for i in range(CLOSED.vocab_size)]
    assert tokens[:9] == ["<pad>", "<eos>", "|", "/", "=", "yes", "no", "the", "path"]
    assert tokens[-30:] == [str(label) for label in range(30)] and len(set(tokens)) == len(tokens)


def test_more_labels_of_a_second_task_come_last() -> None:
    tasks = build_tasks([PathStarConfig(labels=10), TreePathConfig(labels=15)])
    tokenizer = build_tokenizer(TokenizerConfig(), tasks)
    assert tokenizer.decode(range(tokenizer.vocab_size - 15, tokenizer.vocab_size)).split() == [
        str(i) for i in range(15)
    ]


@both
def test_special_ids(tokenizer: Tokenizer) -> None:
    right, wrong = tokenizer.verdict_id(True), tokenizer.verdict_id(False)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert sorted(tokenizer.terminal_ids) == sorted({1, right, wrong}) and len(tokenizer.terminal_ids) == 3
    shown = ("yes", "no") if tokenizer.kind == "closed" else ("<right>", "<wrong>")
    assert (tokenizer.token(right), tokenizer.token(wrong)) == shown


def test_closed_text_comes_back() -> None:
    for task in GRAPHS:
        problem = task.generate(0, "train", 0)
        text = f"{problem.prompt} {problem.solution} no"
        ids = CLOSED.encode(text)
        assert CLOSED.decode(ids) == text and len(ids) == len(text.split())


def test_the_bare_library_reads_the_closed_file_alike() -> None:
    bare = tokenizers.Tokenizer.from_str(CLOSED.to_json())
    text = GRAPHS[0].generate(0, "train", 0).prompt
    assert bare.encode(text).ids == CLOSED.encode(text) and bare.decode(CLOSED.encode(text)) == text
    with pytest.raises(Exception, match="WordLevel error"):
        bare.encode("apple")


@given(st.text(min_size=1))
def test_bpe_brings_back_any_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@given(st.lists(st.integers(0, BPE.vocab_size - 1)))
def test_streamed_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    stream = BPE.stream()
    pieces = [stream.push(i) for i in ids]
    joined = "".join(pieces) + stream.flush()
    assert joined == BPE.decode(ids) == b"".join(BPE._bytes[i] for i in ids).decode("utf-8", "replace")


def test_bytes_of_half_a_character_are_held_back() -> None:
    ids = BPE.encode("🙂")
    stream = BPE.stream()
    assert len(ids) == 4 and [stream.push(i) for i in ids] == ["", "", "", "🙂"] and stream.flush() == ""
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"


def test_closed_streams_put_spaces_between_words() -> None:
    stream = CLOSED.stream()
    assert [stream.push(i) for i in CLOSED.encode("the path 3")] == ["the", " path", " 3"]


@pytest.mark.parametrize("text", ["<eos>", "a<right>b", "<pad> <wrong>"])
def test_a_users_text_cannot_hold_special_tokens(text: str) -> None:
    assert min(BPE.encode(text)) >= 4 and BPE.decode(BPE.encode(text)) == text
    with pytest.raises(ValueError, match="unknown word"):
        CLOSED.encode(text)


@pytest.mark.parametrize(
    ("text", "named"), [("3 apple 4", "'apple'"), ("30", "'30'"), ("3|4", "'3|4'"), ("３", "'３'")]
)
def test_unknown_words_are_named_with_what_is_allowed(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=r"unknown word ") as caught:
        CLOSED.encode(text)
    assert named in str(caught.value) and "allowed: | / = yes no the path" in str(caught.value)
    assert str(caught.value).endswith("0…29") and "\n" not in str(caught.value)


def test_many_unknown_words_stay_one_short_line() -> None:
    with pytest.raises(ValueError, match=r"unknown words 'a0', .*, …; allowed") as caught:
        CLOSED.encode(" ".join(f"a{i}" for i in range(1000)) + "b" * 10_000)
    assert len(str(caught.value)) < 400


@both
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_refused(tokenizer: Tokenizer, text: str) -> None:
    if text and tokenizer.kind == "bpe":
        assert tokenizer.decode(tokenizer.encode(text)) == text  # white space is text to a BPE
        return
    with pytest.raises(ValueError, match="the text is empty; allowed"):
        tokenizer.encode(text)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\\ud800' is half of a surrogate pair"):
        BPE.encode("a\ud800")


@both
@pytest.mark.parametrize("token_id", [-1, 100_000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token_id}; allowed: 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([token_id])


@both
def test_saved_loaded_and_pickled_tokenizers_are_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    text = "the path 3 4 5"
    for copy in (Tokenizer.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.to_json() == tokenizer.to_json() and copy.kind == tokenizer.kind
        assert copy.encode(text) == tokenizer.encode(text) and copy.terminal_ids == tokenizer.terminal_ids
    assert min(pickle.loads(pickle.dumps(BPE)).encode("<eos>")) >= 4


@both
def test_a_file_cut_anywhere_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tokenizer.to_json()
    path = tmp_path / "tokenizer.json"
    for end in [0, 1, 10, len(text) // 2, len(text) - 1]:
        path.write_text(text[:end], encoding="utf-8")
        with pytest.raises(ValueError, match=r"tokenizer.json' is cut short or not JSON"):
            Tokenizer.load(path)


def _without(token: str, tokenizer: Tokenizer) -> str:
    tree = json.loads(tokenizer.to_json())
    tree["model"]["vocab"] = {f"{t}x" if t == token else t: i for t, i in tree["model"]["vocab"].items()}
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] != token]
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no tokenizer model"),
        ("{}", "holds no tokenizer model"),
        ('{"model": {}}', "is not a tokenizer.json"),
        (tokenizers.Tokenizer(tokenizers.models.Unigram()).to_str(), "is a Unigram model; allowed: WordLevel, BPE"),
        (tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), "has '<pad>' at id None; allowed: id 0"),
        (_without("<eos>", CLOSED), "has '<eos>' at id None; allowed: id 1"),
        (_without("yes", CLOSED), "lacks the verdict token 'yes'"),
        (_without("<wrong>", BPE), "has '<wrong>' at id None; allowed: id 3"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer file .*" + message):
        Tokenizer.load(path)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Tokenizer.load(tmp_path / "nothing.json")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="is not text"):
        Tokenizer.load(tmp_path / "model.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    BPE.save(path)

    def full(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        CLOSED.save(path)
    monkeypatch.undo()
    assert Tokenizer.load(path).kind == "bpe" and len(list(tmp_path.iterdir())) == 1


def test_bpe_training_is_the_same_in_another_process() -> None:
    code = (
        "from tests.data.test_tokenizer import BPE; import hashlib; "
        "print(hashlib.sha256(BPE.to_json().encode()).hexdigest())"
    )
    import hashlib

    root = Path(__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == hashlib.sha256(BPE.to_json().encode()).hexdigest()


def test_digits_are_single_tokens() -> None:
    assert [BPE.token(i) for i in BPE.encode("+48")] == ["+", "4", "8"]


def test_a_bpe_needs_room_for_every_byte() -> None:
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size = 259; allowed: at least 260"):
        Tokenizer.train_bpe(["text"], 259)
    assert Tokenizer.train_bpe(["text"], 260).vocab_size == 260


def test_open_text_has_no_closed_vocabulary() -> None:
    with pytest.raises(ValueError, match="'closed' cannot write task 'gsm8k'"):
        build_tokenizer(TokenizerConfig(), build_tasks([Gsm8kConfig(path="sample")]))
    with pytest.raises(ValueError, match="'two words' cannot be a word"):
        Tokenizer.closed(["yes", "no", "two words"])


# ------------------------------------------------------------------------------------------- of imported weights


def _imported() -> Tokenizer:
    """A byte-level BPE as public weights bring one along: own names, no verdicts, runs of spaces as added tokens."""
    tree = json.loads(BPE.to_json())
    ours = {entry["content"] for entry in tree["added_tokens"]}
    kept = ["<|endoftext|>", "<|padding|>", *(token for token in tree["model"]["vocab"] if token not in ours)]
    tree["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    entry = tree["added_tokens"][0]
    spaces = entry | {"id": len(kept), "content": "    ", "special": False, "normalized": True}
    tree["added_tokens"] = [entry | {"id": i, "content": kept[i]} for i in range(2)] + [spaces]
    return Tokenizer.from_json(json.dumps(tree))


IMPORTED = _imported()


def test_a_tokenizer_of_imported_weights_ends_a_text_and_knows_no_verdicts() -> None:
    imported = _imported()
    assert imported.is_foreign and not imported.has_verdicts
    assert not BPE.is_foreign and BPE.has_verdicts and CLOSED.has_verdicts and not CLOSED.is_foreign
    assert (imported.eos_id, imported.pad_id, imported.terminal_ids) == (0, 1, (0,))
    with pytest.raises(ValueError, match="lacks the verdict tokens '<wrong>' and '<right>'"):
        imported.verdict_id(True)
    assert Tokenizer.from_json(imported.to_json()).terminal_ids == (0,)


@given(st.text(min_size=1))
def test_a_tokenizer_of_imported_weights_writes_any_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    text += "    <|endoftext|>  "
    ids = IMPORTED.encode(text)
    assert IMPORTED.decode(ids) == text
    assert IMPORTED.eos_id not in ids


def test_rows_of_an_embedding_beyond_the_vocabulary_say_nothing_readable() -> None:
    assert IMPORTED.decode([IMPORTED.vocab_size + 7]) == "�"
    with pytest.raises(ValueError, match="token id -1"):
        IMPORTED.decode([-1])


@pytest.mark.parametrize(
    ("tokenizer", "text"), [(BPE, "Tom has 3 apples"), (IMPORTED, "  a 水 b  "), (CLOSED, "1 2 |  yes")]
)
def test_places_are_where_tokens_begin(tokenizer: Tokenizer, text: str) -> None:
    ids, places = tokenizer.encode_with_places(text)
    assert ids == tokenizer.encode(text) and len(places) == len(ids)
    assert places == sorted(places) and all(0 <= place <= len(text) for place in places)
    for place, token in zip(places, ids, strict=True):
        first = tokenizer.token(token).lstrip()[:1]
        assert not first or first == "�" or text[place:].lstrip()[:1] == first
