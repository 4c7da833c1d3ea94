"""Every step has its rows, shares are exact in the long run, and a curriculum moves them as it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crsm.config import BackboneStageConfig
from crsm.data.mixture import build_mixture

TEXT = {"shards": "x", "share": 0.5}


def build(settings=None, tasks=None, sources=None, rows=10, steps=100):
    config = BackboneStageConfig.model_validate(settings if settings is not None else {"text": TEXT})
    return build_mixture(
        config,
        tasks or {"star": 1.0},
        {"books": 3e6, "web": 1e6} if sources is None else sources,
        rows=rows,
        steps=steps,
    )


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(1, 40),
)
def test_counts_fill_every_step_and_keep_within_a_few_rows_of_the_shares(tasks, sources, share, rows):
    tasks = {f"t{i}": weight for i, weight in enumerate(tasks)}
    sources = {f"s{i}": weight for i, weight in enumerate(sources)}
    mixture = build({"text": {**TEXT, "share": share}}, tasks, sources, rows, steps=200)
    counts = np.diff(mixture.before_SM, axis=0)
    assert (counts >= 0).all() and (counts.sum(axis=1) == rows).all()
    wanted = [(1 - share) * w / sum(tasks.values()) for w in tasks.values()]
    wanted += [share * w / sum(sources.values()) for w in sources.values()]
    assert np.abs(counts - np.array(wanted) * rows).max() <= 1 + 1e-6
    assert np.abs(counts.sum(axis=0) - 200 * rows * np.array(wanted)).max() <= 8


def test_a_small_share_is_not_rounded_away():
    mixture = build({"text": {**TEXT, "share": 0.03}}, rows=8, steps=1000)
    total = mixture.before_SM[-1]
    assert total.sum() == 8000 and abs(total[1:].sum() - 240) <= 3


def test_firsts_are_the_sums_of_the_counts_before():
    mixture = build()
    sums = dict.fromkeys(mixture.names, 0)
    for step in range(100):
        assert mixture.firsts(step) == sums
        sums = {name: sums[name] + count for name, count in mixture.counts(step).items()}
    with pytest.raises(ValueError, match="step = 100; allowed: 0 to 99"):
        mixture.counts(100)


def test_sources_have_rows_by_their_tokens_or_by_their_weights():
    by_tokens = build(rows=8, steps=100).before_SM[-1]
    assert by_tokens.tolist() == pytest.approx([400, 300, 100], abs=2)
    by_weight = build({"text": {**TEXT, "weights": {"web": 2.0}}}, rows=8, steps=100).before_SM[-1]
    assert by_weight.tolist() == pytest.approx([400, 0, 400], abs=2)


def test_a_curriculum_moves_shares_evenly_between_its_points():
    points = [
        {"at": 0.2, "share": 1.0, "weights": {"web": 0}},
        {"at": 0.6, "share": 0.0},
        {"at": 0.8, "share": 0.5, "weights": {"books": 0}},
    ]
    mixture = build({"text": TEXT, "curriculum": points}, rows=100, steps=100)
    star, books, web = (np.diff(mixture.before_SM, axis=0)[:, i] for i in range(3))
    assert (books[:20] == 100).all() and (star[:20] == 0).all()
    assert books[40] == pytest.approx(50, abs=1) and star[40] == pytest.approx(50, abs=1)
    assert star[60] == 100
    assert (web[80:] == 50).all() and (books[80:] == 0).all()


def test_tasks_have_a_curriculum_without_text_too():
    points = [{"at": 0.0, "weights": {"tree": 0}}, {"at": 1.0, "weights": {"star": 0}}]
    mixture = build({"curriculum": points}, {"star": 1.0, "tree": 1.0}, {}, rows=10, steps=10)
    counts = np.diff(mixture.before_SM, axis=0)
    assert counts[0].tolist() == [10, 0] and counts[9].tolist() == pytest.approx([1, 9], abs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": {**TEXT, "weights": {"none": 1}}}, r"stage_1.text.weights: 'none' is not known; allowed: books, web"),
        (
            {"text": TEXT, "curriculum": [{"at": 0, "weights": {"none": 1}}]},
            r"stage_1.curriculum\[0\].weights: 'none' is not known; allowed: star, books, web",
        ),
        ({"text": TEXT, "curriculum": [{"at": 0, "weights": {"star": 0}}]}, r"no task has a weight, .* share is 0.5"),
        ({"text": {**TEXT, "weights": {"web": 0}}}, r"stage_1.text: no source of text has a weight"),
    ],
)
def test_a_mixture_that_is_impossible_says_why(settings, message):
    with pytest.raises(ValueError, match=message):
        build(settings)


def test_names_must_differ_and_points_ascend():
    with pytest.raises(ValueError, match="'books' is a task and a source of text"):
        build(tasks={"books": 1.0})
    with pytest.raises(ValueError, match="ascending, each once"):
        BackboneStageConfig.model_validate({"curriculum": [{"at": 0.5}, {"at": 0.2}]})
    with pytest.raises(ValueError, match="share without text"):
        BackboneStageConfig.model_validate({"curriculum": [{"at": 0.5, "share": 0.2}]})
