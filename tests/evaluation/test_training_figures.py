"""Curves of a training."""

import pytest

from crsm.evaluation.training_figures import curves_figure, series

CURVE = [
    {"step": 1.0, "loss": 3.0, "valid/auc/a": 0.5, "valid/auc/b": None},
    {"step": 2.0, "loss": 2.0},
    {"step": 3.0, "valid/auc/a": 0.75, "valid/auc/b": 0.25},
]


def test_a_series_has_the_steps_at_which_a_figure_is_known():
    assert series(CURVE, "valid/auc/") == {"a": ([1.0, 3.0], [0.5, 0.75]), "b": ([3.0], [0.25])}
    assert series(CURVE, "loss") == {"": ([1.0, 2.0], [3.0, 2.0])}
    assert series([], "loss") == {}


def test_every_panel_has_its_title_and_a_line_per_figure():
    figure = curves_figure(CURVE, {"one": ["loss"], "two": ["valid/auc/"], "both": ["loss", "valid/auc/a"]})
    drawn = {axes.get_title(loc="left"): {line.get_label() for line in axes.lines} for axes in figure.axes}
    assert drawn["two"] == {"a", "b"}
    assert drawn["both"] == {"loss", "valid/auc/a"}
    assert len(drawn["one"]) == 1
    assert list(figure.axes[0].lines[0].get_xdata()) == [1.0, 2.0]


def test_a_name_that_no_figure_has_is_refused():
    with pytest.raises(ValueError, match="prefix 'los/' begins no name; allowed: loss, step, valid/auc/a"):
        curves_figure(CURVE, {"one": ["los/"]})
