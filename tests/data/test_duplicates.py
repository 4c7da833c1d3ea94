"""Every planted duplicate is found, and nothing else is dropped."""

import numpy as np
import pytest

from crsm.data.decontamination import Contamination
from crsm.data.duplicates import find_duplicates, signatures
from crsm.data.parts import Part, clean_part
from crsm.data.sections import runs_of, section_ends
from crsm.data.sources import Document
from crsm.data.word_hashes import hash_ngrams, hash_words, split_words
from crsm.data_config import DataConfig, DuplicatesConfig
from tests.data.corpora import edited, prose, tiny_config

CONTROLS = 1000


def sections_of(texts, config=None):
    config = config or tiny_config({"name": "a", "path": "x"})
    part = Part("a", 0, 0, tuple(Document(str(i), text) for i, text in enumerate(texts)), (), last=True)
    return clean_part(part, config.sources[0], config, Contamination()), config


def dropped(texts, config=None):
    """Number of each dropped text, and of the one that it repeats; every text is one section."""
    clean, config = sections_of(texts, config)
    assert len(clean.texts) == len(texts) == len(clean.digests)
    digests = np.frombuffer(b"".join(clean.digests), np.dtype((np.void, 16)))
    found = find_duplicates(digests, clean.signatures_UP, np.ones(len(texts), bool), config.duplicates)
    return {verdict.unit: verdict for verdict in found}


def test_all_planted_duplicates_are_found_and_none_of_a_thousand_controls():
    controls = [prose(seed) for seed in range(CONTROLS)]
    exact = [controls[i] for i in range(50)]
    near = [edited(controls[i], 0.02, seed=i) for i in range(50, 100)]
    spaced = [controls[i].replace(". ", " .  ").upper() for i in range(100, 120)]
    longer = [controls[i] + "\n\n" + prose(10_000 + i, words=10) for i in range(120, 140)]
    planted = exact + near + spaced + longer
    found = dropped(controls + planted)
    assert set(found) == set(range(CONTROLS, CONTROLS + len(planted)))
    for place in range(len(planted)):
        verdict = found[CONTROLS + place]
        assert verdict.first == place and verdict.exact == (place < 50)
        assert verdict.similarity >= 0.7


def test_what_is_kept_is_the_first_and_a_chain_of_edits_goes_as_long_as_it_resembles_what_is_kept():
    text = prose(1, words=300)
    found = dropped([text, text, edited(text, 0.01), prose(2, words=300)])
    assert {unit: verdict.first for unit, verdict in found.items()} == {1: 0, 2: 0}


def test_the_estimate_is_the_jaccard_similarity_of_the_shingles():
    config = DuplicatesConfig(permutations=512, bands=32)
    first = prose(3, words=400)
    for share in (0.01, 0.05, 0.1):
        second = edited(first, share, seed=5)
        sets = [set(hash_ngrams(hash_words(split_words(text)), (5,))[5].tolist()) for text in (first, second)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        arrays = [np.array(sorted(entry), np.uint64) for entry in sets]
        one, two = signatures(arrays, config, seed=0)
        assert (one == two).mean() == pytest.approx(jaccard, abs=0.1)


def test_texts_without_a_shingle_are_compared_by_their_hash_alone():
    config = tiny_config({"name": "a", "path": "x", "clean": False}, duplicates={"ngram": 50})
    found = dropped(["four words are here", "four words are there", "four words are here"], config)
    assert list(found) == [2] and found[2].exact


def test_a_chapter_is_found_in_a_book_and_the_rest_of_the_book_stays():
    config = tiny_config({"name": "a", "path": "x"}, duplicates={"section_chars": 1000})
    book = prose(4, words=6000)
    paragraphs = book.split("\n\n")
    chapter = "\n\n".join(paragraphs[40:90])
    clean, _ = sections_of([book, chapter + "\n\n" + prose(5, words=600)], config)
    digests = np.frombuffer(b"".join(clean.digests), np.dtype((np.void, 16)))
    found = find_duplicates(digests, clean.signatures_UP, np.ones(len(digests), bool), config.duplicates)
    in_book = len(clean.ends[0])
    dropped_units = {verdict.unit - in_book for verdict in found}
    assert min(dropped_units) >= 0  # nothing of the book goes
    kept = [unit not in dropped_units for unit in range(len(clean.ends[1]))]
    left = sum(end - start for start, end in runs_of(kept, clean.ends[1]))
    repeated = len(clean.texts[1]) - left
    assert repeated > 0.5 * len(chapter)
    assert left > 0.9 * len(prose(5, words=600))


def test_an_insertion_moves_only_the_cuts_beside_it():
    text = prose(6, words=8000)
    paragraphs = text.split("\n\n")
    changed = "\n\n".join([*paragraphs[:30], prose(7, words=30), *paragraphs[30:]])
    pieces = [
        {text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)}
        for text, ends in ((text, section_ends(text, 1000)), (changed, section_ends(changed, 1000)))
    ]
    assert len(pieces[0]) > 20
    assert len(pieces[0] - pieces[1]) <= 3


@pytest.mark.parametrize("words", [1, 100, 3000])
def test_sections_cover_the_text_within_their_bounds(words):
    text = prose(8, words=words)
    ends = section_ends(text, 500)
    assert ends[-1] == len(text) and ends == sorted(set(ends))
    sizes = np.diff([0, *ends])
    if len(ends) > 1:
        assert sizes.min() >= 125 and sizes.max() <= 4 * 500 + max(map(len, text.split("\n\n"))) + 2


def test_another_seed_gives_other_signatures_and_the_same_verdicts():
    texts = [prose(seed) for seed in range(20)] + [edited(prose(3), 0.01)]
    found = []
    for seed in (0, 1):
        config = DataConfig.model_validate({**tiny_config({"name": "a", "path": "x"}).model_dump(), "seed": seed})
        found.append(sorted(dropped(texts, config)))
    assert found[0] == found[1] == [20]
