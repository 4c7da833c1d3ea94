"""A search tree as a picture: what was looked at, how often, what it was thought worth, and the line that came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from crsm.evaluation.figures import GOAL, GREY, INK, SYSTEM_2, new_figure, tree_layout

Node = Mapping[str, Any]
"""As :func:`crsm.search.sketch.nested` and :func:`crsm.search.tree.export_tree` give it."""

VALUES = LinearSegmentedColormap.from_list("values", ("#FFFFFF", "#BFE6D8", GOAL))
"""Colours of the values 0 to 1."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A node that is drawn."""

    node: Node
    parent: int
    """Index of its parent; -1: the root."""
    on_line: bool


def tree_figure(
    root: Node, word: Callable[[int], str], line: Sequence[int] = (), *, max_nodes: int = 32, title: str = ""
) -> Figure:
    """One search tree with a scale of its values.

    Args:
        root: the tree.
        word: how a token is written.
        line: the principal variation.
        max_nodes: nodes that are drawn; the least visited are left out.
        title: above the tree.

    Raises:
        ValueError: ``max_nodes`` is below 1.
    """
    nodes = most_visited(root, line, max_nodes)
    parents = {node.parent for node in nodes}
    leaves = sum(index not in parents for index in range(len(nodes)))
    depth = max(_depths(nodes))
    figure = new_figure(min(18.0, max(8.0, 0.8 * leaves + 2.0)), 1.8 + 1.15 * depth)
    axes = figure.add_axes((0.02, 0.03, 0.86, 0.85))
    draw_tree(axes, nodes, word)
    axes.set_title(title, fontsize=12.5, loc="left", color=INK)
    scale = figure.colorbar(ScalarMappable(Normalize(0, 1), VALUES), cax=figure.add_axes((0.91, 0.15, 0.014, 0.6)))
    scale.set_label("value (consensus of all layers)", fontsize=9.5, color=INK)
    scale.outline.set_visible(False)
    return figure


def most_visited(root: Node, line: Sequence[int], max_nodes: int) -> list[_Drawn]:
    """The nodes to draw, parents before their children: the most visited ones, which are connected, since a node has
    at least its children's visits."""
    if max_nodes < 1:
        raise ValueError(f"max_nodes = {max_nodes}; allowed: at least 1")
    every = list(_walk(root, line))
    # The sort is stable, and parents come first in the walk.
    kept = sorted(range(len(every)), key=lambda index: -every[index].node["visits"])[:max_nodes]
    place = {index: position for position, index in enumerate(sorted(kept))}
    return [
        _Drawn(every[index].node, place.get(every[index].parent, -1), every[index].on_line) for index in sorted(kept)
    ]


def _walk(root: Node, line: Sequence[int]) -> Iterator[_Drawn]:
    """All nodes, each before its children; ``on_line`` while they follow the line."""
    waiting: list[tuple[Node, int, int | None]] = [(root, -1, 0)]
    """Node, index of its parent, and tokens of the line up to it, if it is on the line."""
    count = 0
    while waiting:
        node, parent, along = waiting.pop()
        yield _Drawn(node, parent, along is not None)
        for child in reversed(node["children"]):
            follows = along is not None and along < len(line) and child["token"] == line[along]
            waiting.append((child, count, along + 1 if follows and along is not None else None))
        count += 1


def _depths(nodes: Sequence[_Drawn]) -> list[int]:
    depths: list[int] = []
    for node in nodes:
        depths.append(0 if node.parent < 0 else depths[node.parent] + 1)
    return depths


def draw_tree(axes: Axes, nodes: Sequence[_Drawn], word: Callable[[int], str]) -> None:
    """Discs (squares, where an answer ends) as large as their visits and as green as their values; the line in blue."""
    places = tree_layout([(drawn.parent, index) for index, drawn in enumerate(nodes) if drawn.parent >= 0], 0)
    most = nodes[0].node["visits"]
    for index, drawn in enumerate(nodes):
        node, (x, y) = drawn.node, places[index]
        share = node["visits"] / most
        if drawn.parent >= 0:
            above = places[drawn.parent]
            axes.plot(
                (above[0], x),
                (above[1], y),
                color=SYSTEM_2 if drawn.on_line else GREY,
                linewidth=1.0 + 6.0 * share,
                alpha=1.0 if drawn.on_line else 0.45,
                solid_capstyle="round",
                zorder=1,
            )
        axes.scatter(
            x,
            y,
            s=260 + 900 * share**0.5,
            marker="s" if node["terminal"] else "o",
            color=VALUES(node["value"]),
            edgecolor=SYSTEM_2 if drawn.on_line else GREY,
            linewidth=2.6 if drawn.on_line else 1.0,
            zorder=2,
        )
        name = "now" if node["token"] is None else word(node["token"])
        weight = "bold" if drawn.on_line else "normal"
        axes.text(x, y, name, ha="center", va="center", fontsize=9.5, color=INK, fontweight=weight, zorder=3)
        axes.annotate(
            # A consensus may lie a hair below 0; nobody wants to read "-0.00".
            f"{node['visits']}×\n{round(node['value'], 2) + 0.0:.2f}",
            (x, y),
            (12 + 7 * share**0.5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
            zorder=4,
        )
        if drawn.parent == 0:  # what System 1 thinks of the choice, beside what the search does with it
            axes.annotate(
                f"prior {node['prior']:.2f}",
                (x, y),
                (0, 12 + 8 * share**0.5),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=GREY,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
                zorder=4,
            )
    axes.margins(0.10, 0.14)
    axes.axis("off")
