"""The tree of a clustering, with the mean pattern of its groups."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list
from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument
from attribution.heads import Head
from attribution.plots.style import AMOUNT, COLOURS, OTHERS, Picture, every

_NAMED = 64  # leaves that have room for a name
_TO_SPEAK_OF = 0.05  # of the largest mean


def dendrogram(
    linkage: np.ndarray,
    patterns: Mapping[Head, Float[Tensor, "*samples query key"]],
    groups: Sequence[Sequence[Head]],
    title: str,
    *,
    threshold: float | None = None,
    labels: Sequence[str] | None = None,
    shown: int = 6,
) -> Figure:
    """The tree of `cluster_heads` above the mean patterns of its largest groups, each in the group's colour.

    Args:
        linkage: as from `cluster_heads`, its leaves in the order of `patterns`.
        groups: as from `cluster_heads`; groups beyond `shown`, and heads alone, are grey.
        threshold: where the tree was cut: a dashed line.
        labels: a name per group, such as those of `label_by_source`.
        shown: how many groups get a colour and a mean pattern.

    Raises:
        InvalidArgument: a group has a head without a pattern, or `shown` is below 1.
        ShapeMismatch: the linkage is not that of these patterns, or there is not one label per group.
    """
    heads = list(patterns)
    if not heads or np.shape(linkage) != (len(heads) - 1, 4):
        raise checks.mismatch("linkage", f"the shape {list(np.shape(linkage))}", f"[{len(heads)} heads − 1, 4]")
    if labels is not None and len(labels) != len(groups):
        raise checks.mismatch("labels", f"{len(labels)} entries", f"{len(groups)}, one per group")
    if missing := [head for group in groups for head in group if head not in patterns]:
        raise InvalidArgument(f"groups has the head {missing[0]}, which has no pattern", param="groups")
    if shown < 1:
        raise InvalidArgument(f"shown is {shown}; at least one group is", param="shown")
    drawn = [group for group in groups if len(group) > 1][: min(shown, len(COLOURS))] or list(groups[:1])
    colours = {head: colour for group, colour in zip(drawn, COLOURS, strict=False) for head in group}
    width = max(1.9 * len(drawn) + 1, min(16.0, 2 + 0.22 * len(heads)), 6.0)
    figure = Picture(figsize=(width, 6.2), layout="constrained")
    spots = GridSpec(2, len(drawn), figure, height_ratios=[1.2, 1])
    tree = figure.add_subplot(spots[0, :])
    _draw_tree(tree, linkage, heads, colours)
    if threshold is not None:
        tree.axhline(threshold, linestyle="--", color="black", linewidth=0.8)
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # over the tree
        tree.annotate(f"cut at {threshold:g}", (1, threshold), bbox=box, **place)
        tree.set_ylim(0, 1.1 * max(threshold, *np.asarray(linkage)[:, 2], 1e-9))
    tree.set_title(title)
    names = dict(zip(map(tuple, groups), labels or [""] * len(groups), strict=True))
    means = [figure.add_subplot(spots[1, number]) for number in range(len(drawn))]
    _draw_means(figure, means, [(group, names[tuple(group)]) for group in drawn], patterns)
    return figure


def _draw_tree(axes: Axes, linkage: np.ndarray, heads: Sequence[Head], colours: Mapping[Head, str]) -> None:
    """Join after join from the leaves up; a join of one group is in its colour. No recursion: chains can be long."""
    count = len(heads)
    order = leaves_list(linkage).tolist() if count > 1 else [0]
    x = dict(zip(order, map(float, range(count)), strict=True))
    height = dict.fromkeys(range(count), 0.0)
    colour = {number: colours.get(head, OTHERS) for number, head in enumerate(heads)}
    for number, (left, right, distance, _) in enumerate(linkage, start=count):
        one, other = int(left), int(right)
        colour[number] = colour[one] if colour[one] == colour[other] else OTHERS
        sides = [x[one], x[one], x[other], x[other]]
        axes.plot(sides, [height[one], distance, distance, height[other]], color=colour[number], linewidth=1.2)
        x[number], height[number] = (x[one] + x[other]) / 2, float(distance)
    if count <= _NAMED:
        names = [f"{heads[leaf][0]}.{heads[leaf][1]}" for leaf in order]
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        for tick, leaf in zip(axes.get_xticklabels(), order, strict=True):
            tick.set_color(colour[leaf])
    else:
        axes.set_xticks([])
    axes.set(xlim=(-0.7, count - 0.3), ylabel="distance (nats)")
    axes.set_xlabel("layer.head" if count <= _NAMED else f"{count} heads")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_means(
    figure: Figure,
    places: Sequence[Axes],
    groups: Sequence[tuple[Sequence[Head], str]],
    patterns: Mapping[Head, Tensor],
) -> None:
    """The mean over heads and samples of each group, all in one scale of colours."""
    means = []
    for group, _ in groups:
        mean = torch.stack([patterns[head].detach().cpu().double() for head in group]).mean(0)
        means.append(mean.flatten(0, -3).mean(0) if mean.dim() > 2 else mean)
    largest = max(float(mean.max()) for mean in means)
    first, last = _looked_at(torch.stack(means), largest)
    colours = ScalarMappable(Normalize(0, largest), AMOUNT)
    for number, (axes, (group, name), mean) in enumerate(zip(places, groups, means, strict=True)):
        queries = len(mean)
        axes.imshow(
            mean[:, first : last + 1].numpy(),
            cmap=AMOUNT,
            vmin=0,
            vmax=largest,
            aspect="auto",
            extent=(first - 0.5, last + 0.5, queries - 0.5, -0.5),
        )
        heads = "1 head" if len(group) == 1 else f"{len(group)} heads"
        axes.set_title(f"{heads}\n{name}".strip().replace("$", r"\$"), fontsize=8, color=COLOURS[number])
        axes.set_xlabel("key", fontsize=8)
        axes.set_yticks(range(0, queries, every(queries, 8)))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelsize=7)
    places[0].set_ylabel("query", fontsize=8)
    figure.colorbar(colours, ax=list(places), label="mean attention")


def _looked_at(means: Float[Tensor, "group query key"], largest: float) -> tuple[int, int]:
    """The first and the last key that any group looks at to speak of: the others would only take room."""
    keys = (means.amax((0, 1)) >= _TO_SPEAK_OF * largest).nonzero().flatten()
    return int(keys[0]), int(keys[-1])
