"""Made-up text with the statistics that matter here: words of some length, sentences, paragraphs, stop words."""

import json

import numpy as np

from crsm.data_config import DataConfig

STOP_WORDS = ("the", "of", "and", "to", "that")


def vocabulary(count=4000, seed=1):
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(rng.choice(letters, size=length)) for length in rng.integers(3, 9, size=count)]


WORDS = vocabulary()


def prose(seed, words=120, paragraph=40):
    """A text of random words, another one for every seed."""
    rng = np.random.default_rng((7, seed))
    chosen = [WORDS[i] if i % 5 else STOP_WORDS[i % 25 // 5] for i in rng.integers(0, len(WORDS), size=words).tolist()]
    sentences = [" ".join(chosen[i : i + 10]).capitalize() + "." for i in range(0, words, 10)]
    step = max(1, paragraph // 10)
    return "\n\n".join(" ".join(sentences[i : i + step]) for i in range(0, len(sentences), step))


def edited(text, share, seed=0):
    """The text with a share of its words replaced by others."""
    rng = np.random.default_rng((11, seed))
    words = text.split(" ")
    for place in rng.choice(len(words), size=max(1, int(share * len(words))), replace=False).tolist():
        words[place] = WORDS[int(rng.integers(len(WORDS)))]
    return " ".join(words)


def write_jsonl(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tiny_config(*sources, **others):
    """Parts and shards so small that a handful of documents makes several."""
    tree = {
        "name": "tiny",
        "sources": [{"kind": "files", "max_bad": 3, **source} for source in sources],
        "tokenizer": {"kind": "bpe", "vocab_size": 300, "sample_mb": 0.05},
        "part_mb": 0.004,
        "shard_tokens": 3000,
        **others,
    }
    return DataConfig.model_validate(tree)
