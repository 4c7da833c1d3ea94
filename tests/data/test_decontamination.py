"""Every planted evaluation text is found wherever it stands, and none of a thousand controls is dropped."""

import pytest

from crsm.data.decontamination import Contamination
from crsm.data.parts import Part, clean_part
from crsm.data.sources import Document
from crsm.data.word_hashes import hash_ngrams, hash_words, split_words
from crsm.data_config import DecontaminationConfig
from tests.data.corpora import prose, tiny_config

QUESTIONS = [prose(50_000 + i, words=30) for i in range(40)]
SHORT = [" ".join(prose(60_000 + i, words=10).split()[:9]) for i in range(10)]
SETS = [("questions", QUESTIONS), ("short", [*SHORT, "far too short"])]


@pytest.fixture(scope="module")
def contamination():
    return Contamination.build(SETS, DecontaminationConfig())


def cleaned(texts, contamination, **duplicates):
    config = tiny_config({"name": "a", "path": "x"}, duplicates={"enabled": False, **duplicates})
    part = Part("a", 0, 0, tuple(Document(str(i), text) for i, text in enumerate(texts)), (), last=True)
    return clean_part(part, config.sources[0], config, contamination)


def test_all_planted_texts_are_found_and_none_of_a_thousand_controls(contamination):
    controls = [prose(seed) for seed in range(1000)]
    planted = []
    for number, question in enumerate([*QUESTIONS, *SHORT]):
        words = question.split()
        if number < 40:  # half of the question, in other letters and with other punctuation
            words = " ".join(words[5:19]).upper().replace(" ", ", ").split(" ")
        text = prose(70_000 + number).split(" ")
        planted.append(" ".join([*text[:40], *words, *text[40:]]))
    clean = cleaned(controls + planted, contamination)
    assert not clean.contaminated[:1000].any()
    assert clean.contaminated[1000:].all()
    assert clean.counts.contaminated == {"questions": 40, "short": 10}
    named = clean.counts.contaminated_named[0]
    assert named["set"] == "questions" and named["example"] == 0 and len(named["words"].split()) == 13


def test_twelve_words_in_a_row_are_not_enough(contamination):
    words = QUESTIONS[0].split()[:12]
    assert not cleaned([prose(1) + " " + " ".join(words)], contamination).contaminated.any()
    words = QUESTIONS[0].split()[:13]
    assert cleaned([prose(1) + " " + " ".join(words)], contamination).contaminated.all()


def test_of_a_long_document_only_the_section_goes_that_holds_the_text(contamination):
    paragraphs = prose(2, words=4000).split("\n\n")
    paragraphs.insert(50, QUESTIONS[3].replace("\n\n", " "))
    clean = cleaned(["\n\n".join(paragraphs)], contamination, section_chars=1000)
    assert len(clean.ends[0]) > 10
    assert clean.contaminated.sum() == 1
    place = int(clean.contaminated.argmax())
    start, end = [0, *clean.ends[0]][place], clean.ends[0][place]
    assert QUESTIONS[3].replace("\n\n", " ") in clean.texts[0][start:end]


def test_what_is_compared_is_counted(contamination):
    assert contamination.examples == {"questions": 40, "short": 11}
    assert contamination.too_short == {"questions": 0, "short": 1}
    assert contamination.lengths == (9, 13)


def test_a_match_names_its_place():
    found = Contamination.build([("one", ["a b c"]), ("two", ["d e f g"])], DecontaminationConfig(ngram=4, min_words=3))
    words = split_words("x a b c y d e f g")
    matches = found.find(hash_ngrams(hash_words(words), found.lengths))
    assert [(m.evaluation, m.example, m.word, m.length) for m in matches] == [("two", 0, 5, 4), ("one", 0, 1, 3)]


def test_ngrams_tell_order_and_length_apart():
    hashes = hash_ngrams(hash_words("a b a b a".split()), (1, 2, 5, 6))
    assert hashes[1][0] == hashes[1][2] != hashes[1][1]
    assert hashes[2].tolist()[:2] == hashes[2].tolist()[2:] and hashes[2][0] != hashes[2][1]
    assert len(hashes[5]) == 1 and len(hashes[6]) == 0
