"""Pictures. Each function returns a matplotlib figure and shows or saves nothing by itself: `figure.savefig(path)`."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor


def head_map(
    scores: Float[Tensor, "layer column"], title: str, *, unit: str = "attribution (nats)", marked: int = 0
) -> Figure:
    """A heat map of one score per head and MLP: layers upwards, heads to the right, the MLP in a column of its own.

    Args:
        scores: `[layers, heads + 1]`, the MLP last, as `attribute_residual` gives it for one node.
        unit: what the colours mean.
        marked: how many of the highest scores get their value written into the cell.
    """
    values = scores.detach().cpu().double().numpy()
    layers, columns = values.shape
    spread = np.insert(values, columns - 1, np.nan, axis=1)  # a gap before the MLPs
    figure = Figure(figsize=(1.6 + 0.55 * (columns + 1), 1.4 + 0.5 * layers), layout="constrained")
    axes = figure.subplots()
    limit = float(np.abs(values).max()) or 1.0
    image = axes.imshow(spread, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    axes.set_xticks([*range(columns - 1), columns], [*(str(head) for head in range(columns - 1)), "MLP"])
    axes.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title)
    for spine in axes.spines.values():
        spine.set_visible(False)
    highest = np.argsort(values, axis=None)[::-1][:marked]
    for layer, column in zip(*np.unravel_index(highest, values.shape), strict=True):
        at = column if column < columns - 1 else columns
        colour = "white" if abs(values[layer, column]) > 0.6 * limit else "black"
        axes.text(at, layer, f"{values[layer, column]:.1f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label=unit)
    return figure
