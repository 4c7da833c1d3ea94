"""A search tree as a picture."""

import pytest
from matplotlib.colors import same_color

from crsm.evaluation.figures import SYSTEM_2
from crsm.evaluation.tree_figure import most_visited, tree_figure


def node(token, visits, *children, value=0.5, terminal=False):
    return {
        "token": token,
        "visits": visits,
        "value": value,
        "prior": 0.25,
        "terminal": terminal,
        "children": list(children),
    }


TREE = node(
    None,
    8,
    node(3, 5, node(4, 3, node(9, 1, value=1.0, terminal=True), value=0.9), node(5, 1)),
    node(7, 2, node(4, 1, value=0.1)),
)


def texts(figure):
    (axes, _) = figure.axes
    return [text.get_text() for text in axes.texts]


def test_the_most_visited_nodes_are_kept_with_their_parents():
    kept = most_visited(TREE, (3, 4), 4)
    assert [(drawn.node["token"], drawn.parent, drawn.on_line) for drawn in kept] == [
        (None, -1, True),
        (3, 0, True),
        (4, 1, True),
        (7, 0, False),
    ]
    assert len(most_visited(TREE, (), 100)) == 7


def test_a_token_of_the_line_marks_its_place_in_the_tree_and_no_other():
    # Token 4 stands below 7 as well, which the line does not go through.
    marked = [drawn.node["visits"] for drawn in most_visited(TREE, (3, 4, 9), 100) if drawn.on_line]
    assert marked == [8, 5, 3, 1]
    assert [drawn.on_line for drawn in most_visited(TREE, (8, 4), 100)] == [True] + [False] * 6


def test_the_picture_shows_words_visits_values_and_what_system_1_thought():
    figure = tree_figure(TREE, "abcdefghij".__getitem__, (3, 4, 9), title="a plan")
    said = texts(figure)
    for part in ("now", "d", "e", "j", "h", "5×\n0.50", "3×\n0.90", "1×\n1.00"):
        assert part in said
    assert said.count("prior 0.25") == 2  # of the root's children only
    assert figure.axes[0].get_title(loc="left") == "a plan"
    blue = [line for line in figure.axes[0].lines if same_color(line.get_color(), SYSTEM_2)]
    assert len(blue) == 3 and len(figure.axes[0].lines) == 6


def test_a_value_a_hair_below_zero_is_written_as_zero():
    assert "1×\n0.00" in texts(tree_figure(node(None, 2, node(3, 1, value=-0.001)), str))


def test_a_tree_of_a_single_node_is_drawn():
    assert texts(tree_figure(node(None, 1), str))[0] == "now"


def test_at_least_the_root_is_drawn():
    with pytest.raises(ValueError, match="max_nodes = 0; allowed: at least 1"):
        tree_figure(TREE, str, max_nodes=0)
