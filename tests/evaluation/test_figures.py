"""Pictures are drawn from plain data and saved whole."""

import pytest

from crsm.evaluation.figures import (
    Accuracies,
    GraphExample,
    SaidToken,
    Thought,
    Timeline,
    compute_figure,
    demo_figure,
    percent,
    save_figure,
    tree_layout,
)

EDGES = ((7, 3), (3, 12), (7, 9), (9, 4))
EXAMPLE = GraphExample("a problem", EDGES, 7, 12, (7, 9, 4), (7, 3, 12), False, True)
BARS = Accuracies("path_star", 0.5, (0.4, 0.3, 0.5), (0.9, 0.8, 1.0), 1e-9)
TIMELINE = Timeline(
    (SaidToken(0.0, "the", False), SaidToken(0.1, "3", True)),
    (Thought(0.0, 0.05, "3 12", "", 0.1), Thought(0.1, 0.12, "12", "not needed", None)),
    10.0,
    1,
    "a note",
)
CURVES = {
    "task": "path_star",
    "problems": 4,
    "lag": 1,
    "methods": {
        name: [
            {"budget": 1, "accuracy": 0.5, "interval": (0.4, 0.6), "multiply_adds": 1e6},
            {"budget": 2, "accuracy": 0.7, "interval": (0.6, 0.8), "multiply_adds": 2e6},
        ]
        for name in ("system_2", "best_of", "self_consistency", "beam_search")
    },
}


def texts(figure):
    return " ".join(
        text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title)
    ) + " ".join(text.get_text() for text in figure.texts)


def test_a_tree_is_laid_out_with_parents_over_the_middle_of_their_children():
    places = tree_layout(EDGES, 7)
    assert places == {7: (0.5, 0.0), 3: (0.0, -1.0), 12: (0.0, -2.0), 9: (1.0, -1.0), 4: (1.0, -2.0)}


def test_the_demo_shows_problem_bars_and_timeline():
    figure = demo_figure([EXAMPLE], [BARS], TIMELINE)
    assert len(figure.axes) == 3
    said = texts(figure)
    for part in ("System 1 goes astray", "System 2 arrives", "goal", "40%", "90%", "plan “3 12” written", "a note"):
        assert part in said
    assert len(demo_figure([EXAMPLE], [BARS], None).axes) == 2


def test_many_tasks_share_one_panel_and_only_countable_ends_have_a_level_of_guessing():
    unknown = Accuracies("maze", None, (0.2, 0.1, 0.3), (0.7, 0.6, 0.8), 1e-9)
    figure = demo_figure([], [unknown, BARS, unknown, unknown], None)
    (axes,) = figure.axes
    guessing = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [(line.get_label(), tuple(line.get_ydata())) for line in guessing] == [("guessing", (0.5, 0.5))]
    assert "4 kinds of problems, 25% → 75% on average" in texts(figure)


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "demo.png"
    save_figure(demo_figure([EXAMPLE], [BARS], TIMELINE), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    save_figure(compute_figure(CURVES), path)
    assert [file.name for file in path.parent.iterdir()] == ["demo.png"]
    with pytest.raises(ValueError, match="ending 'gif'; allowed: pdf, png, svg"):
        save_figure(compute_figure(CURVES), tmp_path / "demo.gif")


def test_the_curves_are_named():
    (axes,) = compute_figure(CURVES).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "System 2, one plan",
        "best of N by the critics",
        "majority of N",
        "beam search",
    ]


def test_a_percentage_never_rounds_to_all_or_nothing():
    shares = (0.0, 0.002, 0.36, 0.994, 0.995, 1.0)
    assert [percent(share) for share in shares] == ["0%", "0.2%", "36%", "99%", "99.5%", "100%"]
