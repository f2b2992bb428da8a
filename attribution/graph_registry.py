"""The current graph, in which `Node(layer, head, type)` finds its nodes.

This module is the only place that knows it, so that a notebook keeps its graph while it edits the rest:

    %load_ext autoreload
    %autoreload 2
    %aimport -attribution.graph_registry
"""

from typing import TYPE_CHECKING

from attribution.errors import InvalidArgument

if TYPE_CHECKING:
    from attribution.graph import Graph

_current: "Graph | None" = None


def current() -> "Graph":
    """The current graph.

    Raises:
        InvalidArgument: there is none.
    """
    if _current is None:
        raise InvalidArgument("there is no current graph; Graph(dataset_size, hidden_size) makes one", param="graph")
    return _current


def make_current(graph: "Graph | None") -> None:
    """Take `graph` as the current one; None: there is none from now."""
    global _current
    _current = graph
