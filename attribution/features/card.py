"""The card of an autoencoder: what it is, how it was made, and how good it is, as Markdown beside its weights."""

from collections.abc import Mapping

from attribution.features.autoencoder import Autoencoder
from attribution.features.measuring import Figures
from attribution.features.places import Place

FORMULAS = """\
- *explained variance*: 1 − Σ|y − ŷ|² / Σ|y − ȳ|² over all rows; y is what the place holds, ŷ the reconstruction.
- *L0*: features that are active in a row, in the mean; *dead*: features that no row activates.
- *loss*: mean cross-entropy in nats of the tokens that are scored; *spliced* with ŷ in the place of y at every row,
  *zero* with zeros, *mean* with ȳ there. *Loss recovered* is (zero − spliced) / (zero − loss), or the same with mean.
"""


def figure_rows(figures: Figures) -> list[tuple[str, str]]:
    """The figures by name, in words."""
    return [
        ("rows measured", f"{figures.rows:,}"),
        ("L0", f"{figures.l0:.2f}"),
        ("explained variance", f"{figures.explained_variance:.4f}"),
        ("dead features", f"{figures.dead} of {figures.n_features}"),
        ("tokens scored", f"{figures.tokens:,}"),
        ("loss", f"{figures.loss:.4f}"),
        ("loss, spliced", f"{figures.spliced:.4f}"),
        ("loss, zero", f"{figures.zero:.4f}"),
        ("loss, mean", f"{figures.mean:.4f}"),
        ("loss recovered (of zero)", f"{figures.recovered:.4f}"),
        ("loss recovered (of mean)", f"{figures.recovered_of_mean:.4f}"),
    ]


def card(
    autoencoder: Autoencoder, reads: Place, writes: Place, model_id: str, figures: Figures, made: Mapping[str, str]
) -> str:
    """The card; `made` is how it was made, by name."""
    kind = "An autoencoder" if reads == writes else "A transcoder"
    where = f"`{reads}`" if reads == writes else f"`{reads}` to `{writes}`"
    width = f"{autoencoder.d_in}" if reads == writes else f"{autoencoder.d_in} to {autoencoder.d_out}"
    lines = [
        f"# {kind} of {model_id}, {where}",
        "",
        f"{autoencoder.n_features} features ({autoencoder.activation}), width {width}, "
        f"{str(autoencoder.dtype).removeprefix('torch.')}, in the directory format of SAELens.",
        "",
        "## How it was made",
        "",
        *(f"- {name}: {value}" for name, value in made.items()),
        "",
        "## Figures, on texts that it was not trained on",
        "",
        "| figure | |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in figure_rows(figures)),
        "",
        FORMULAS,
    ]
    return "\n".join(lines)
