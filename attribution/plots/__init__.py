"""Pictures. Each function returns a figure and shows or saves nothing by itself: `figure.savefig(path)`.

The figures are matplotlib's, made without pyplot, so that no window opens and no setting of the caller's changes.
"""

from attribution.plots.circuits import plot_circuit
from attribution.plots.clusters import dendrogram
from attribution.plots.graphs import PlainEdge, PlainNode, curves, graph_map, graph_picture
from attribution.plots.grids import grid_attention
from attribution.plots.interactive import interactive_head_map, interactive_pattern_map
from attribution.plots.lens import lens_map
from attribution.plots.maps import head_map, pattern_map
from attribution.plots.sweeps import sweep_map

__all__ = [
    "PlainEdge",
    "PlainNode",
    "curves",
    "dendrogram",
    "graph_map",
    "graph_picture",
    "grid_attention",
    "head_map",
    "interactive_head_map",
    "interactive_pattern_map",
    "lens_map",
    "pattern_map",
    "plot_circuit",
    "sweep_map",
]
